"""A budget finds its own shapes: which matrix gets which factors, for the least harm to the loss.

For every matrix a list of candidates is priced: low rank at many ranks (exact, from one spectrum),
balanced Kronecker sums at several numbers of terms (fitted), and the dense matrix. Harm is in nats
a token for all of them (fit.py), so that layers and structures can be weighed against each other;
one of each list is chosen by an exact multiple-choice knapsack.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from transformers import PreTrainedModel

from krony import calibrate, fit, info
from krony.calibrate import Moments
from krony.errors import KronyError
from krony.families import Target, dense_weight, find_targets
from krony.kron import Shape
from krony.plan import MatrixPlan, Plan
from krony.schemes import Factors

Objective = Literal["size", "throughput"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

# Shares of a matrix's parameters at which candidates are priced.
LOW_RANK_SHARES = np.geomspace(0.03, 0.9, 40)
KRONECKER_SHARES = (0.12, 0.2, 0.3, 0.42, 0.6)
PRICING_STEPS = 8  # of L-BFGS: enough to compare, the final fit takes more
SIDES = (16, 8)  # sides of the small factor, the first that divide the matrix


@dataclass(frozen=True)
class Candidate:
    """One way to store a matrix: groups of factors (none: dense), its costs and its harm."""

    groups: tuple[Factors, ...]
    parameters: int
    multiply_adds: int
    harm: float

    def cost(self, objective: str) -> int:
        """In the currency of the objective: parameters, or multiply-adds a token."""
        return self.parameters if objective == "size" else self.multiply_adds


def make_candidates(
    target: Target, weight: torch.Tensor, moments: Moments, objective: str
) -> list[Candidate]:
    """Candidates for one matrix (m, n), none of them dearer than the dense one.

    Under "throughput" only low rank is priced beside dense: a balanced sum takes several times the
    multiply-adds of the dense matrix.
    """
    m, n = target.shape
    inputs = moments.inputs.covariance if target.bias else moments.inputs.second
    metric = fit.Metric.of(inputs, moments.gradient, m)
    found = [Candidate((), m * n, m * n, 0.0)]
    tail = fit.spectrum(weight, metric).square()
    for rank in sorted({int(share * m * n / (m + n)) for share in LOW_RANK_SHARES} - {0}):
        factors = Factors((m, 1), (1, n), rank)
        harm = 0.5 * float(tail[rank:].sum())
        found.append(Candidate((factors,), factors.parameters, factors.multiply_adds, harm))
    side = small_side(target.shape)
    if objective == "size" and side is not None:
        for factors in kronecker_factors(target.shape, side):
            harm = fit.groups(weight, metric, (factors,), steps=PRICING_STEPS)[1][-1]
            found.append(Candidate((factors,), factors.parameters, factors.multiply_adds, harm))
    return [c for c in found if c.cost(objective) <= found[0].cost(objective)]


def small_side(shape: Shape) -> int | None:
    """The side of a square small factor for balanced sums, or None if no listed one divides."""
    return next((s for s in SIDES if shape[0] % s == 0 and shape[1] % s == 0), None)


def kronecker_factors(shape: Shape, side: int) -> list[Factors]:
    """Balanced sums at the listed shares of the matrix's parameters."""
    large, small = (shape[0] // side, shape[1] // side), (side, side)
    one = Factors(large, small).parameters
    limit = min(side * side, large[0] * large[1])
    counts = sorted({int(share * shape[0] * shape[1] / one) for share in KRONECKER_SHARES} - {0})
    return [Factors(large, small, terms) for terms in counts if terms <= limit]


def choose(candidates: list[list[Candidate]], budget: int, objective: str) -> list[Candidate]:
    """One candidate of each list, their costs within the budget and their harm the least.

    Exact (HiGHS branch and bound, through scipy).

    Raises:
        KronyError: even the cheapest choice is over the budget.
    """
    least = sum(min(c.cost(objective) for c in row) for row in candidates)
    if least > budget:
        raise KronyError(
            f"a budget of {budget:,} can't be met: the smallest factors take {least:,}; give more"
        )
    flat = [candidate for row in candidates for candidate in row]
    costs = np.array([[c.cost(objective) for c in flat]], dtype=float)
    rows = np.zeros((len(candidates), len(flat)))
    start = 0
    for i, row in enumerate(candidates):
        rows[i, start : start + len(row)] = 1
        start += len(row)
    # Scaled: HiGHS works with absolute tolerances of about 1e-6.
    harm = np.array([c.harm for c in flat])
    solution = milp(
        harm / max(float(harm.max()), 1e-30) * 1e3,
        constraints=[
            LinearConstraint(costs / budget, ub=1.0 - 1e-12),
            LinearConstraint(rows, lb=1, ub=1),
        ],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    if solution.x is None:
        raise KronyError(f"no choice of factors was found for a budget of {budget:,}; give more")
    return [c for c, taken in zip(flat, solution.x, strict=True) if taken > 0.5]


@dataclass(frozen=True)
class BudgetPlan:
    """A plan, and what it is predicted to cost: nats a token above the dense model."""

    plan: Plan
    harm: float
    moments: dict[str, Moments]


def make_budget_plan(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    share: float | None = None,
    parameters: int | None = None,
    target: str = "mlp",
    objective: str = "size",
    moments: dict[str, Moments] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> BudgetPlan:
    """The plan of least predicted harm within a budget.

    Args:
        windows: token ids (windows, window) to calibrate on.
        share: of the targets' own parameters (or multiply-adds, by objective), between 0 and 1.
        parameters: of the whole model, instead of a share.
        objective: "size" counts parameters, and may take sums that need more arithmetic;
            "throughput" counts multiply-adds.
        moments: of every matrix that `target` selects, if `calibrate.calibrate` was called already.
        seed: of the labels that calibration samples.
        progress: called with (what, number, how many).
    Returns:
        The plan, its predicted harm, and the moments, which `compress` takes.
    Raises:
        KronyError: not exactly one budget, or one that can't be met.
    """
    if objective not in OBJECTIVES:
        raise KronyError(f"no objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    if (share is None) == (parameters is None):
        raise KronyError("give a budget as a share or as the parameters of the model, not both")
    targets = find_targets(model, target)
    dense = sum(t.shape[0] * t.shape[1] for t in targets)
    if share is not None:
        if not 0 < share < 1:
            raise KronyError(f"a budget of {share} is no share; give a number between 0 and 1")
        budget = int(share * dense)
    else:
        assert parameters is not None
        total = info.parameters(model)
        budget = parameters - (total - dense)
        if not 0 < budget < dense or objective != "size":
            raise KronyError(
                f"a model of {parameters:,} parameters can't be: with these targets and the size "
                f"objective it has between {total - dense:,} and {total:,}"
            )
    if moments is None:
        moments = calibrate.calibrate(
            calibrate.full_precision(model),
            windows,
            [t.name for t in targets],
            seed=seed,
            progress=progress and partial(progress, "Calibrating"),
        )
    rows = []
    for number, found in enumerate(targets, 1):
        weight = dense_weight(model.get_submodule(found.name)).detach().double().cpu()
        rows.append(make_candidates(found, weight, moments[found.name], objective))
        if progress is not None:
            progress("Pricing", number, len(targets))
    chosen = choose(rows, budget, objective)
    matrices = [
        MatrixPlan(t.name, t.shape, c.groups, False, t.bias, t.conv1d)
        for t, c in zip(targets, chosen, strict=True)
        if c.groups
    ]
    return BudgetPlan(Plan(tuple(matrices)), sum(c.harm for c in chosen), moments)


def parse_count(text: str | None, option: str = "--params") -> int | None:
    """81,972,576 from "81972576" or 81 million from "81M". Raises `KronyError`."""
    if text is None:
        return None
    units = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
    number, unit = text[:-1], units.get(text[-1:].lower())
    try:
        return int(float(number) * unit) if unit else int(text)
    except ValueError:
        raise KronyError(f"{option} {text!r} is no count; write for example 81M") from None
