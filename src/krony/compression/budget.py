"""A budget finds its own shapes: which matrix gets which factors, for the least harm to the loss.

For every matrix a list of candidates is priced (prices.py): the matrix as it is, low rank at many
ranks, and low rank beside a balanced Kronecker sum where that could win. Before that MLPs lose the
hidden units that are not worth their place (width.py): fewer units leave each of them more rank.
Harm is in nats a token for all of them (fit.py), so that layers and structures can be weighed
against each other; one of each list is chosen by an exact multiple-choice knapsack.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from transformers import PreTrainedModel

from krony.compression import calibrate, embedding, width
from krony.compression.calibrate import Moments
from krony.compression.embedding import RowMetric
from krony.compression.factorise import Known, collect
from krony.compression.limits import READ, Candidate, Currency, candidate, choose, limits
from krony.compression.prices import (
    SUMS,
    Matrix,
    Sums,
    Width,
    low_rank_candidates,
    price_widths,
    ways,
    with_units,
)
from krony.compression.structures import widths
from krony.compression.work import Work
from krony.errors import KronyError
from krony.hf import families
from krony.hf.families import MLP, Target, dense_weight, find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.measure import info

ENDS = ("embedding", "head")  # roles of matrices outside of the blocks
WORTH = 0.05  # of the predicted harm: what sums must save to be worth their arithmetic


@dataclass(frozen=True)
class BudgetPlan:
    """A plan, and what it is predicted to cost: nats a token above the dense model.

    Attributes:
        dense: the targets that stay as they are.
        work: what was found on the way, which `compress` takes too.
    """

    plan: Plan
    harm: float
    moments: Mapping[str, Known]
    dense: tuple[Target, ...]
    work: Work


def make_budget_plan(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    share: float | None = None,
    parameters: int | None = None,
    flops: float | None = None,
    target: str = "mlp",
    objective: str = "size",
    sums: bool = False,
    moments: Mapping[str, Known] | None = None,
    narrow: bool = True,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    work: Work | None = None,
    memory: int | None = None,
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
        sums: also look for sums of Kronecker products beside low rank, which takes several times as
            long and makes models with more arithmetic; see `price`.
        moments: of every matrix that `target` selects, if they were collected already.
        narrow: also take hidden units out of MLPs, where all of their matrices are targets.
        seed: of the labels that calibration samples.
        progress: called with (what, number, how many).
        work: where finished stages are kept and looked for; default: in memory.
        memory: bytes that this may take in all; default: 60 % of what is free.
    Returns:
        The plan, its predicted harm, and the moments, which `compress` takes.
    Raises:
        KronyError: no budget, contradictory ones, or one that can't be met.
    """
    targets = find_targets(model, target)
    asked = {"share": share, "parameters": parameters, "flops": flops}
    most = limits(targets, info.parameters(model), **asked, objective=objective)  # type: ignore[arg-type]
    work = work or Work()
    if moments is None:
        moments = known(model, windows, targets, work, seed, memory, progress)
    if rest := families.left_out(model):
        warnings.warn(rest, stacklevel=2)
    catalogue = Catalogue.of(model, targets, moments, work, narrow, progress)
    return plan_within(catalogue, most, objective, progress, sums)


def make_curve(
    model: PreTrainedModel,
    windows: torch.Tensor,
    shares: Sequence[float],
    *,
    target: str = "mlp",
    objective: str = "size",
    sums: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    work: Work | None = None,
    memory: int | None = None,
) -> list[BudgetPlan]:
    """Plans at several shares of the targets' parameters, from one calibration and one pricing; see
    `make_budget_plan`. A share that no choice of factors meets has no plan in the list.
    """
    targets, total, work = find_targets(model, target), info.parameters(model), work or Work()
    budgets = [limits(targets, total, share=each, objective=objective) for each in shares]
    moments = known(model, windows, targets, work, seed, memory, progress)
    catalogue = Catalogue.of(model, targets, moments, work, True, progress)
    found = []
    for number, most in enumerate(budgets, 1):
        with suppress(KronyError):
            found.append(plan_within(catalogue, most, objective, progress, sums))
        if progress is not None:
            progress("Planning", number, len(budgets))
    return found


def known(
    model: PreTrainedModel,
    windows: torch.Tensor,
    targets: Sequence[Target],
    work: Work,
    seed: int = 0,
    memory: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Mapping[str, Known]:
    """The moments of all targets."""
    ends = [t for t in targets if t.role in ENDS]
    return collect(
        calibrate.full_precision(model),
        windows,
        [t.name for t in targets if t not in ends],
        ends,
        seed=seed,
        progress=progress and partial(progress, "Calibrating"),
        work=work,
        memory=memory,
    )


def plan_within(
    catalogue: "Catalogue",
    most: dict[Currency, float],
    objective: str = "size",
    progress: Callable[[str, int, int], None] | None = None,
    sums: bool = False,
) -> BudgetPlan:
    """The plan of least predicted harm that costs no more than `most`."""
    prices = best(catalogue, most, objective, progress, sums)
    chosen = choose(prices.rows, most)
    pairs = zip(prices.targets, chosen, strict=True)
    return BudgetPlan(
        make_plan_of(prices.targets, chosen),
        sum(c.harm for c in chosen) + prices.lost,
        catalogue.moments,
        tuple(t for t, c in pairs if _stays(t, c)),
        catalogue.work,
    )


def curve_row(model: PreTrainedModel, point: BudgetPlan) -> dict[str, float]:
    """What a size costs, JSON-ready: of the whole model its parameters and bytes, of the targets
    the shares of what decoding reads and of the multiply-adds of a prompt; and the predicted harm,
    nats a token."""
    whole = [*point.plan.matrices, *(matrix_plan(t, ()) for t in point.dense)]
    parameters = info.parameters(model) - sum(m.saved for m in point.plan.matrices)
    reads = sum(m.reads + m.multiply_adds / READ for m in whole)
    dense = sum(m.dense_reads + m.dense_multiply_adds / READ for m in whole)
    adds = sum(m.multiply_adds for m in whole), sum(m.dense_multiply_adds for m in whole)
    return {
        "share": sum(m.parameters for m in whole) / sum(m.dense_parameters for m in whole),
        "parameters": parameters,
        "bytes": parameters * model.dtype.itemsize,
        "decode": reads / dense,
        "prefill": adds[0] / adds[1],
        "harm": point.harm,
    }


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
    work: Work | None = None,
    sums: bool = False,
) -> Prices:
    """Candidates for every target, after MLPs lost the units that a budget of `most` is better
    spent without; see `make_budget_plan`.

    Sums that are asked for are taken where they save a share of `WORTH` of the harm; never under
    "throughput": a balanced one takes several times the multiply-adds of the matrix.
    """
    catalogue = Catalogue.of(model, targets, moments, work or Work(), narrow, progress)
    return best(catalogue, most, objective, progress, sums)


def best(
    catalogue: "Catalogue",
    most: dict[Currency, float],
    objective: str = "size",
    progress: Callable[[str, int, int], None] | None = None,
    sums: bool = False,
) -> Prices:
    """Candidates for every target at one budget, with sums or without; see `price`."""
    plain = catalogue.at(most)
    if not sums or objective == "throughput":
        return plain
    told = progress and partial(progress, "Pricing sums")
    below = (1 - WORTH) * (sum(c.harm for c in choose(plain.rows, most)) + plain.lost)
    summed = catalogue.at(most, sums=True, below=below, progress=told)
    harm = sum(c.harm for c in choose(summed.rows, most)) + summed.lost
    return summed if harm < below else plain


@dataclass(frozen=True)
class Catalogue:
    """All that is known without a budget: prices of whole MLPs at every width, of other matrices.

    Attributes:
        targets: with all of their hidden units.
        matrices: makes those in blocks. rows: candidates of everything outside of narrowed MLPs.
        mlps: that may lose units, each with its widths.
    """

    targets: list[Target]
    matrices: dict[str, Callable[[], Matrix]]
    rows: dict[str, list[Candidate]]
    mlps: list[tuple[MLP, list[Width]]]
    moments: Mapping[str, Known]
    work: Work

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        targets: list[Target],
        moments: Mapping[str, Known],
        work: Work,
        narrow: bool = True,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> "Catalogue":
        """Price everything that needs no fit."""
        rows: dict[str, list[Candidate]] = {}
        inner: dict[str, Target] = {}
        for found in targets:
            if found.role in ENDS and isinstance(entry := moments[found.name], RowMetric):
                weight = dense_weight(model.get_submodule(found.name)).detach().double().cpu()
                rows[found.name] = [candidate(found, (), 0.0)]
                for factors, harm in embedding.candidates(found, weight, entry):
                    rows[found.name].append(candidate(found, (factors,), harm))
            else:
                inner[found.name] = found
        mlps = families.mlps(model, targets) if narrow else []
        mlps = width.that_narrow(model, mlps)
        makers: dict[str, Callable[[], Matrix]] = {
            name: partial(_matrix, model, target, moments) for name, target in inner.items()
        }
        together = {t.name for mlp in mlps for t in mlp.targets}
        alone = [target for name, target in inner.items() if name not in together]
        jobs, priced = len(alone) + len(mlps), []
        for mlp in mlps:
            load = partial(_all, [makers[t.name] for t in mlp.targets])
            priced.append((mlp, price_widths(mlp, load, widths(mlp.down.hidden), work)))
            if progress is not None:
                progress("Pricing", len(priced), jobs)
        for number, target in enumerate(alone, len(priced) + 1):
            rows[target.name] = low_rank_candidates(target, makers[target.name], work)
            if progress is not None:
                progress("Pricing", number, jobs)
        return cls(targets, makers, rows, priced, moments, work)

    def at(
        self,
        most: dict[Currency, float],
        sums: bool = False,
        below: float = math.inf,
        progress: Callable[[int, int], None] | None = None,
    ) -> Prices:
        """What a budget is best spent on: widths are chosen, and candidates are left for the rest.

        All matrices of an MLP lose the same units, so that its candidates are its widths, each with
        the best low rank of every matrix at many prices; sums do better than low rank by about
        `SUMS`. What its matrices really get is chosen afterwards; sums only if that can bring the
        harm below `below`.
        """
        rows, lost = dict(self.rows), 0.0
        targets = {t.name: t for t in self.targets if t.name in self.matrices}
        place: dict[str, int] = {}
        lists = [ways(each, SUMS if sums else 1.0) for _, each in self.mlps]
        alone = list(self.rows.values())
        taken = choose([*alone, *([c for c, _ in way] for way in lists)], most)[len(alone) :]
        for i, (chosen, way) in enumerate(zip(taken, lists, strict=True)):
            mlp, tried = self.mlps[i]
            hidden = next(units for c, units in way if c is chosen)
            at = next(each for each in tried if each.hidden == hidden)
            lost += at.harm
            rows |= {t.name: row for t, row in zip(mlp.targets, at.rows, strict=True)}
            targets |= {t.name: t.narrowed(hidden) for t in mlp.targets}
            place |= {t.name: i for t in mlp.targets}
        if sums:
            load = self._loader(targets, place)
            found = Sums(targets, {name: rows[name] for name in targets}, load, self.work)
            others = [row for name, row in rows.items() if name not in targets]
            rows |= found.settle(others, most, below - lost, progress)
        left = [targets.get(t.name, t) for t in self.targets]
        return Prices(left, [rows[t.name] for t in self.targets], lost)

    def _loader(self, targets: dict[str, Target], place: dict[str, int]) -> Callable[[str], Matrix]:
        """Gives a matrix with the hidden units that its target has left."""

        @lru_cache(maxsize=1)
        def units(i: int, hidden: int) -> width.Narrow:
            down = self.matrices[self.mlps[i][0].down.name]()
            weight, metric = down.weight, down.metric
            order = width.order(down.target.name, weight, metric, self.work)
            return width.narrow(weight, metric, order, hidden)

        def load(name: str) -> Matrix:
            matrix, target = self.matrices[name](), targets[name]
            if target.hidden == matrix.target.hidden:
                return matrix
            return with_units(matrix, units(place[name], target.hidden))

        return load


def _matrix(model: PreTrainedModel, target: Target, moments: Mapping[str, Known]) -> Matrix:
    entry = moments[target.name]
    assert isinstance(entry, Moments)
    return Matrix(target, dense_weight(model.get_submodule(target.name)), entry)


def _all(makers: list[Callable[[], Matrix]]) -> list[Matrix]:
    return [make() for make in makers]


def _stays(target: Target, chosen: Candidate) -> bool:
    return not chosen.groups and target.dense_shape is None


def make_plan_of(targets: list[Target], chosen: list[Candidate]) -> Plan:
    """The plan of one candidate for each target; those that stay as they are are not in it."""
    pairs = zip(targets, chosen, strict=True)
    return Plan(tuple(matrix_plan(t, c.groups) for t, c in pairs if not _stays(t, c)))
