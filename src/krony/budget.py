"""A budget finds its own shapes: which matrix gets which factors, for the least harm to the loss.

For every matrix a list of candidates is priced: low rank at many ranks (exact, from one spectrum),
balanced Kronecker sums at several numbers of terms (fitted), and the dense matrix. Harm is in nats
a token for all of them (fit.py), so that layers and structures can be weighed against each other;
one of each list is chosen by an exact multiple-choice knapsack.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from krony import calibrate, embedding, fit, info
from krony.calibrate import Moments
from krony.embedding import RowMetric
from krony.factorise import Known, collect
from krony.families import Target, dense_weight, find_targets
from krony.kron import Shape
from krony.limits import Candidate, candidate, choose, limits
from krony.plan import Plan, matrix_plan
from krony.schemes import Factors

# Shares of a matrix's parameters at which candidates are priced.
LOW_RANK_SHARES = np.geomspace(0.03, 0.9, 40)
KRONECKER_SHARES = (0.12, 0.2, 0.3, 0.42, 0.6)
PRICING_STEPS = 8  # of L-BFGS: enough to compare, the final fit takes more
SIDES = (16, 8)  # sides of the small factor, the first that divide the matrix


def make_candidates(
    target: Target, weight: torch.Tensor, moments: Moments, objective: str
) -> list[Candidate]:
    """Candidates for one matrix (m, n), none of them larger than the dense one.

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
    if objective != "throughput" and side is not None:
        for factors in kronecker_factors(target.shape, side):
            harm = fit.groups(weight, metric, (factors,), steps=PRICING_STEPS)[1][-1]
            found.append(Candidate((factors,), factors.parameters, factors.multiply_adds, harm))
    return [c for c in found if c.parameters <= found[0].parameters]


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


@dataclass(frozen=True)
class BudgetPlan:
    """A plan, and what it is predicted to cost: nats a token above the dense model.

    Attributes:
        dense: the targets that stay as they are.
    """

    plan: Plan
    harm: float
    moments: dict[str, Known]
    dense: tuple[Target, ...]


def make_budget_plan(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    share: float | None = None,
    parameters: int | None = None,
    flops: float | None = None,
    target: str = "mlp",
    objective: str = "size",
    moments: Mapping[str, Known] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> BudgetPlan:
    """The plan of least predicted harm within a budget.

    Args:
        windows: token ids (windows, window) to calibrate on.
        share: of the targets' own parameters, between 0 and 1.
        parameters: of the whole model, instead of a share.
        flops: share of the targets' multiply-adds; alone, or beside a budget of parameters.
        target: see `families.find_targets`.
        objective: what the same share must hold in besides: "size" nothing else, "decode" the time
            to decode a token, "throughput" the multiply-adds; see `limits.py`.
        moments: of every matrix that `target` selects, if they were collected already.
        seed: of the labels that calibration samples.
        progress: called with (what, number, how many).
    Returns:
        The plan, its predicted harm, and the moments, which `compress` takes.
    Raises:
        KronyError: no budget, contradictory ones, or one that can't be met.
    """
    targets = find_targets(model, target)
    most = limits(
        targets,
        info.parameters(model),
        share=share,
        parameters=parameters,
        flops=flops,
        objective=objective,
    )
    if moments is None:
        ends = [t for t in targets if t.role in ("embedding", "head")]
        moments = collect(
            calibrate.full_precision(model),
            windows,
            [t.name for t in targets if t not in ends],
            ends,
            seed=seed,
            progress=progress and partial(progress, "Calibrating"),
        )
    rows = []
    for number, found in enumerate(targets, 1):
        weight = dense_weight(model.get_submodule(found.name)).detach().double().cpu()
        metric = moments[found.name]
        if isinstance(metric, RowMetric):
            priced = embedding.candidates(found, weight, metric)
            rows.append([candidate(found, (), 0.0)])
            rows[-1] += [candidate(found, (factors,), harm) for factors, harm in priced]
        else:
            rows.append(make_candidates(found, weight, metric, objective))
        if progress is not None:
            progress("Pricing", number, len(targets))
    chosen = list(zip(targets, choose(rows, most), strict=True))
    return BudgetPlan(
        Plan(tuple(matrix_plan(t, c.groups) for t, c in chosen if c.groups)),
        sum(c.harm for _, c in chosen),
        dict(moments),
        tuple(t for t, c in chosen if not c.groups),
    )
