"""A budget finds its own shapes: which matrix gets which factors, for the least harm to the loss.

For every matrix a list of candidates is priced: low rank at many ranks (exact, from one spectrum),
low rank beside a balanced Kronecker sum (fitted at a few sizes, interpolated between), and the
dense matrix. Harm is in nats a token for all of them (fit.py), so that layers and structures can be
weighed against each other; one of each list is chosen by an exact multiple-choice knapsack.
"""

import math
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
from krony.schemes import Factors, divisors

# Shares of a matrix's parameters at which there are candidates, and those at which Kronecker sums
# are fitted; between these the logarithm of the harm is close to linear in the terms.
SHARES = np.geomspace(0.03, 0.97, 60)
FITTED_SHARES = (0.12, 0.3, 0.65)
LOW_RANK_PARTS = (0.1, 0.45)  # of the parameters of a mixed candidate, the rest is a balanced sum
PRICING_STEPS = 3  # of L-BFGS: enough to compare, the final fit takes more


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
    for factors in dict.fromkeys(sized((m, 1), (1, n), share) for share in SHARES):
        harm = 0.5 * float(tail[factors.terms :].sum())
        found.append(Candidate((factors,), factors.parameters, factors.multiply_adds, harm))
    if objective != "throughput" and balanced_shapes(target.shape)[1] != (1, 1):
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
    return [c for c in found if c.parameters <= found[0].parameters]


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
        weight = dense_weight(model.get_submodule(found.name)).detach().double()
        metric = moments[found.name]
        if isinstance(metric, RowMetric):
            priced = embedding.candidates(found, weight.cpu(), metric)
            rows.append([candidate(found, (), 0.0)])
            rows[-1] += [candidate(found, (factors,), harm) for factors, harm in priced]
        else:
            weight = weight.to(metric.inputs.device)
            rows.append(make_candidates(found, weight, metric, objective))
        if progress is not None:
            progress("Pricing", number, len(targets))
    chosen = choose(rows, most)
    return BudgetPlan(
        make_plan_of(targets, chosen),
        sum(c.harm for c in chosen),
        dict(moments),
        tuple(t for t, c in zip(targets, chosen, strict=True) if not c.groups),
    )


def make_plan_of(targets: list[Target], chosen: list[Candidate]) -> Plan:
    """The plan of one candidate for each target; those that stay dense are not in it."""
    pairs = zip(targets, chosen, strict=True)
    return Plan(tuple(matrix_plan(t, c.groups) for t, c in pairs if c.groups))
