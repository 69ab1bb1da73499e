"""A budget finds its own shapes: which matrix gets which factors, for the least harm to the loss.

For every matrix a list of candidates is priced: low rank at many ranks (exact, from one spectrum),
low rank beside a balanced Kronecker sum (fitted at a few sizes, interpolated between), and the
matrix as it is. Before that MLPs lose the hidden units that are not worth their place (width.py):
fewer units leave each of them more rank. Harm is in nats a token for all of them (fit.py), so that
layers and structures can be weighed against each other; one of each list is chosen by an exact
multiple-choice knapsack.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from krony.compression import calibrate, embedding, width
from krony.compression.calibrate import Moments
from krony.compression.embedding import RowMetric
from krony.compression.factorise import Known, collect
from krony.compression.limits import Candidate, Currency, candidate, choose, limits
from krony.hf import families
from krony.hf.families import MLP, Target, dense_weight, find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.maths import fit
from krony.maths.kron import Shape
from krony.maths.schemes import Factors, divisors
from krony.measure import info

# Shares of a matrix's parameters at which there are candidates, and those at which Kronecker sums
# are fitted; between these the logarithm of the harm is close to linear in the terms.
SHARES = np.geomspace(0.03, 0.97, 60)
FITTED_SHARES = (0.12, 0.3, 0.65)
LOW_RANK_PARTS = (0.1, 0.45)  # of the parameters of a mixed candidate, the rest is a balanced sum
# Of sixteen parts of a hidden axis, how many may stay.
WIDTHS = (14, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1)
PRICES = np.r_[0, np.geomspace(1e-8, 1e2, 101)]  # of a parameter, relative to the most it can save
SUMS = 0.75  # harm of low rank beside a sum against low rank alone, about, at the same size
# Processors multiply in blocks: bfloat16 with a rank of 224 takes 0.7 of the time that it takes
# with 214 (docs/log.md). A rank is a multiple of the largest of these that costs it no more than a
# sixth.
ALIGNED, LOST = (1, 2, 4, 8, 16, 32), 6
PRICING_STEPS = 3  # of L-BFGS: enough to compare, the final fit takes more


@dataclass(frozen=True)
class Matrix:
    """One matrix as far as pricing goes: what it is, its weight as stored, and its moments."""

    target: Target
    stored: torch.Tensor
    moments: Moments

    @property
    def weight(self) -> torch.Tensor:
        """(m, n), float64, where the moments are; made anew, so that only one takes memory."""
        return self.stored.detach().double().to(self.moments.inputs.device)

    @property
    def metric(self) -> fit.Metric:
        """Inputs are weighed by their covariance where a bias can absorb the mean."""
        inputs = self.moments.inputs.weighing(self.target.bias)
        return fit.Metric.of(inputs, self.moments.gradient, self.target.shape[0])


def low_rank_candidates(matrix: Matrix) -> list[Candidate]:
    """The matrix itself, and low rank at many ranks: the exact harm of each."""
    target = matrix.target
    harm = fit.low_rank_harm(matrix.weight, matrix.metric)
    found = [candidate(target, (), 0.0)]
    for factors in dict.fromkeys(low_rank(target.shape, share) for share in SHARES):
        found.append(candidate(target, (factors,), float(harm[factors.terms])))
    return [c for c in found if c.parameters <= found[0].parameters]


def make_candidates(matrix: Matrix, objective: str) -> list[Candidate]:
    """Candidates for one matrix (m, n), none of them larger than the matrix itself.

    Under "throughput" only low rank is priced beside it: a balanced sum takes several times the
    multiply-adds of the matrix.
    """
    target, found = matrix.target, low_rank_candidates(matrix)
    if objective != "throughput" and balanced_shapes(target.shape)[1] != (1, 1):
        weight, metric = matrix.weight, matrix.metric
        for part in LOW_RANK_PARTS:
            fitted = [mixed(target.shape, share, part) for share in FITTED_SHARES]
            costs = [sum(g.parameters for g in groups) for groups in fitted]
            harms = [fit.groups(weight, metric, g, steps=PRICING_STEPS)[1][-1] for g in fitted]
            logs = [math.log(max(harm, 1e-300)) for harm in harms]
            for groups in dict.fromkeys(mixed(target.shape, share, part) for share in SHARES):
                cost = sum(g.parameters for g in groups)
                if costs[0] <= cost <= costs[-1]:
                    harm = math.exp(np.interp(cost, costs, logs))
                    found.append(candidate(target, groups, harm))
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


def low_rank(shape: Shape, share: float) -> Factors:
    """The same for low rank, with a rank that processors multiply fast."""
    factors = sized((shape[0], 1), (1, shape[1]), share)
    unit = max(u for u in ALIGNED if u * LOST <= factors.terms or u == 1)
    return replace(factors, terms=factors.terms - factors.terms % unit)


def mixed(shape: Shape, share: float, part: float) -> tuple[Factors, Factors]:
    """A low-rank group with that part of the share, and a balanced sum with the rest of it."""
    m, n = shape
    first = low_rank(shape, part * share)
    return first, sized(*balanced_shapes(shape), share - first.parameters / (m * n))


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
    narrow: bool = True,
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
        narrow: also take hidden units out of MLPs, where all of their matrices are targets.
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
    if rest := families.left_out(model):
        warnings.warn(rest, stacklevel=2)
    prices = price(model, targets, moments, most, objective, narrow, progress)
    chosen = choose(prices.rows, most)
    pairs = zip(prices.targets, chosen, strict=True)
    return BudgetPlan(
        make_plan_of(prices.targets, chosen),
        sum(c.harm for c in chosen) + prices.lost,
        dict(moments),
        tuple(t for t, c in pairs if _stays(t, c)),
    )


@dataclass(frozen=True)
class Prices:
    """What can be chosen from.

    Attributes:
        targets: with the hidden units that the budget leaves them.
        rows: candidates, a list for each target.
        lost: harm of the hidden units that are gone, in nats a token.
    """

    targets: list[Target]
    rows: list[list[Candidate]]
    lost: float


def price(
    model: PreTrainedModel,
    targets: list[Target],
    moments: Mapping[str, Known],
    most: dict[Currency, float],
    objective: str = "size",
    narrow: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Prices:
    """Candidates for every target, after MLPs lost the units that a budget of `most` is better
    spent without; see `make_budget_plan`."""
    rows: dict[str, list[Candidate]] = {}
    inner: dict[str, Matrix] = {}
    for found in targets:
        weight = dense_weight(model.get_submodule(found.name))
        entry = moments[found.name]
        if isinstance(entry, RowMetric):
            priced = embedding.candidates(found, weight.detach().double().cpu(), entry)
            rows[found.name] = [candidate(found, (), 0.0)]
            rows[found.name] += [candidate(found, (f,), harm) for f, harm in priced]
        else:
            inner[found.name] = Matrix(found, weight, entry)
    lost = 0.0
    if narrow:
        mlps = families.mlps(model, targets)
        if mlps:
            exact = calibrate.full_precision(model)  # rounding must not look like a difference
            mlps = [mlp for mlp in mlps if width.can_narrow(exact, mlp)]
            del exact
        if mlps:
            told = progress and partial(progress, "Narrowing")
            fewer, lost = _narrowed(mlps, inner, rows, most, objective, told)
            inner |= fewer
    for number, (name, matrix) in enumerate(inner.items(), 1):
        rows[name] = make_candidates(matrix, objective)
        if progress is not None:
            progress("Pricing", number, len(inner))
    left = [inner[t.name].target if t.name in inner else t for t in targets]
    return Prices(left, [rows[t.name] for t in targets], lost)


def _stays(target: Target, chosen: Candidate) -> bool:
    return not chosen.groups and target.dense_shape is None


def _narrowed(
    mlps: list[MLP],
    matrices: Mapping[str, Matrix],
    rows: Mapping[str, list[Candidate]],
    most: dict[Currency, float],
    objective: str,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Matrix], float]:
    """The matrices of every MLP with the hidden units that the budget leaves it, and the harm of
    those that are gone.

    All matrices of an MLP lose the same units, so that its candidates are its widths, each with the
    best low rank of every matrix at many prices. What these will really get is found afterwards.
    """
    names = {t.name for mlp in mlps for t in mlp.targets}
    lists = [
        *rows.values(),
        *(low_rank_candidates(m) for n, m in matrices.items() if n not in names),
    ]
    orders: list[torch.Tensor] = []
    ways: list[list[tuple[Candidate, int]]] = []
    for number, mlp in enumerate(mlps, 1):
        down = matrices[mlp.down.name]
        weight, metric = down.weight, down.metric
        orders.append(width.elimination(weight, metric))
        ways.append([])
        for hidden in widths(mlp.down.hidden):
            units = width.narrow(weight, metric, orders[-1], hidden)
            mine = (with_units(matrices[t.name], units) for t in mlp.targets)
            priced = _hull([low_rank_candidates(matrix) for matrix in mine])
            ways[-1] += [(_with_harm(c, units.harm, objective), hidden) for c in priced]
        if progress is not None:
            progress(number, len(mlps))
    chosen = choose([*lists, *([c for c, _ in way] for way in ways)], most)[len(lists) :]
    found: dict[str, Matrix] = {}
    harm = 0.0
    for taken, way, mlp, order in zip(chosen, ways, mlps, orders, strict=True):
        hidden = next(hidden for c, hidden in way if c is taken)
        down = matrices[mlp.down.name]
        units = width.narrow(down.weight, down.metric, order, hidden)
        found |= {t.name: with_units(matrices[t.name], units) for t in mlp.targets}
        harm += units.harm
    return found, harm


def widths(hidden: int) -> list[int]:
    """The numbers of hidden units that are tried: sixteenths, or the nearest multiple of 8."""
    unit = 1 if hidden % 16 == 0 else 8
    tried = {max(unit, round(hidden * part / 16 / unit) * unit) for part in WIDTHS}
    return [hidden, *sorted((w for w in tried if w < hidden), reverse=True)]


def with_units(matrix: Matrix, units: width.Narrow) -> Matrix:
    """The matrix of an MLP with these hidden units."""
    target, hidden = matrix.target, len(units.kept)
    if hidden == target.hidden:
        return matrix
    made = target.narrowed(hidden)
    if target.role == "down":
        return Matrix(made, units.down, width.down_moments(matrix.moments, units.kept))
    rows = width.rows_of(units.kept, target.hidden, target.parts)
    return Matrix(made, matrix.stored[rows], width.up_moments(matrix.moments, rows))


def _hull(priced: list[list[Candidate]]) -> list[Candidate]:
    """Candidates for all of these matrices together: for many prices of a parameter, the best of
    each."""
    found: dict[tuple[int, ...], Candidate] = {}
    costs = [np.array([c.parameters for c in row], dtype=float) for row in priced]
    harms = [np.array([c.harm for c in row]) for row in priced]
    highest = max(float(h.max()) for h in harms) / min(float(c.min()) for c in costs)
    for each in highest * PRICES:
        best = tuple(int((h + each * c).argmin()) for h, c in zip(harms, costs, strict=True))
        if best not in found:
            taken = [row[i] for row, i in zip(priced, best, strict=True)]
            found[best] = Candidate(
                (),
                sum(c.parameters for c in taken),
                sum(c.multiply_adds for c in taken),
                sum(c.harm for c in taken),
            )
    return list(found.values())


def _with_harm(taken: Candidate, lost: float, objective: str) -> Candidate:
    """The harm of the units that are gone added; sums do better than low rank, where allowed."""
    gain = 1.0 if objective == "throughput" else SUMS
    return replace(taken, harm=taken.harm * gain + lost)


def make_plan_of(targets: list[Target], chosen: list[Candidate]) -> Plan:
    """The plan of one candidate for each target; those that stay as they are are not in it."""
    pairs = zip(targets, chosen, strict=True)
    return Plan(tuple(matrix_plan(t, c.groups) for t, c in pairs if not _stays(t, c)))
