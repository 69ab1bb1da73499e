"""A budget finds its own shapes: which matrix gets which factors, for the least harm to the loss.

For every matrix a list of candidates is priced: low rank at many ranks (exact, from one spectrum),
low rank beside a balanced Kronecker sum (fitted at a few sizes, interpolated between), and the
dense matrix. Harm is in nats a token for all of them (fit.py), so that layers and structures can be
weighed against each other; one of each list is chosen by an exact multiple-choice knapsack.
"""

import math
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
from krony.schemes import Factors, divisors

Objective = Literal["size", "throughput"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

# Shares of a matrix's parameters at which there are candidates, and those at which Kronecker sums
# are fitted; between these the logarithm of the harm is close to linear in the terms.
SHARES = np.geomspace(0.03, 0.97, 60)
FITTED_SHARES = (0.12, 0.3, 0.65)
LOW_RANK_PARTS = (0.1, 0.45)  # of the parameters of a mixed candidate, the rest is a balanced sum
PRICING_STEPS = 3  # of L-BFGS: enough to compare, the final fit takes more


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
    for factors in dict.fromkeys(sized((m, 1), (1, n), share) for share in SHARES):
        harm = 0.5 * float(tail[factors.terms :].sum())
        found.append(Candidate((factors,), factors.parameters, factors.multiply_adds, harm))
    if objective == "size" and balanced_shapes(target.shape)[1] != (1, 1):
        for part in LOW_RANK_PARTS:
            fitted = [mixed(target.shape, share, part) for share in FITTED_SHARES]
            costs = [sum(g.parameters for g in groups) for groups in fitted]
            harms = [fit.groups(weight, metric, g, steps=PRICING_STEPS)[1][-1] for g in fitted]
            logs = [math.log(max(harm, 1e-300)) for harm in harms]
            for groups in dict.fromkeys(mixed(target.shape, share, part) for share in SHARES):
                cost = sum(g.parameters for g in groups)
                if costs[0] <= cost <= costs[-1]:
                    harm = math.exp(np.interp(cost, costs, logs))
                    arithmetic = sum(g.multiply_adds for g in groups)
                    found.append(Candidate(groups, cost, arithmetic, harm))
    return [c for c in found if c.cost(objective) <= found[0].cost(objective)]


def balanced_shapes(shape: Shape) -> tuple[Shape, Shape]:
    """(large, small) as near to each other as the divisors of (m, n) allow.

    The sum is a matrix of rank R after rearrangement to (m1·n1, m2·n2), and R terms cost the least
    when both sides of that are equal.
    """
    m2, n2 = (max(d for d in divisors(side) if d * d <= side) for side in shape)
    return (shape[0] // m2, shape[1] // n2), (m2, n2)


def sized(large: Shape, small: Shape, share: float) -> Factors:
    """As many terms, at least one, in interpolative form, as a share of the matrix pays for."""
    p, q = large[0] * large[1], small[0] * small[1]
    # R (p + q - R) = share · p · q
    terms = int((p + q - math.sqrt((p + q) ** 2 - 4 * share * p * q)) / 2)
    return Factors(large, small, max(terms, 1), interpolative=True)


def mixed(shape: Shape, share: float, part: float) -> tuple[Factors, Factors]:
    """A low-rank group with that part of the share, and a balanced sum with the rest of it."""
    m, n = shape
    low_rank = sized((m, 1), (1, n), part * share)
    return low_rank, sized(*balanced_shapes(shape), share - low_rank.parameters / (m * n))


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
    return BudgetPlan(make_plan_of(targets, chosen), sum(c.harm for c in chosen), moments)


def make_plan_of(targets: list[Target], chosen: list[Candidate]) -> Plan:
    """The plan of one candidate for each target; those that stay dense are not in it."""
    matrices = [
        MatrixPlan(t.name, t.shape, c.groups, False, t.bias, t.conv1d)
        for t, c in zip(targets, chosen, strict=True)
        if c.groups
    ]
    return Plan(tuple(matrices))


def parse_count(text: str | None) -> int | None:
    """81,972,576 from "81972576" or 81 million from "81M". Raises `KronyError`."""
    if text is None:
        return None
    units = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
    number, unit = text[:-1], units.get(text[-1:].lower())
    try:
        return int(float(number) * unit) if unit else int(text)
    except ValueError:
        raise KronyError(f"--params {text!r} is no count; write for example 81M") from None
