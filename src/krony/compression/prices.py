"""What every way to store a matrix costs and harms: exact for low rank and for fewer hidden units.

Of one MLP all widths together take one Cholesky decomposition and one product for each matrix: with
the units in the order in which they are needed, those of every width come first. With C = L Lᵀ the
second moment of the units and W the matrix that reads them, what the first k of them can do is made
of the first k rows of Lᵀ Wᵀ, whatever k is; and the Gram matrix of the rows that write them grows
by those of the new units.

Whether sums of Kronecker products do less harm than low rank of the same size can only be found by
fitting them, which takes seconds a matrix. They are fitted where they could be chosen: with a guess
from those of their kind that were fitted already, the cheapest one to begin with, a plan is made;
what it takes of them is fitted; and so on until the plan takes none but fitted ones.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from krony.compression import width
from krony.compression.calibrate import Moments
from krony.compression.limits import Candidate, Currency, candidate, choose
from krony.compression.structures import LOW_RANK_PARTS, SHARES, balanced_shapes, low_rank, mixed
from krony.compression.work import Tensors, Work
from krony.hf.families import MLP, Target
from krony.maths import fit

PRICES = np.r_[0, np.geomspace(1e-8, 1e2, 101)]  # of a parameter, relative to the most it can save
SUMS = 0.75  # harm of low rank beside a sum against low rank alone, about, at the same size
PRICING_STEPS = 3  # of L-BFGS: enough to compare, the final fit takes more
NEAR = 1.35  # a fit says what another size of the same matrix is worth up to this ratio of sizes
PROBES = 2  # of a kind are fitted before all that are chosen


@dataclass(frozen=True)
class Matrix:
    """One matrix as far as pricing goes: what it is, its weight as stored, and its moments."""

    target: Target
    stored: Tensor
    moments: Moments

    @property
    def weight(self) -> Tensor:
        """(m, n), float64, where the moments are; made anew, so that only one takes memory."""
        return self.stored.detach().double().to(self.moments.inputs.device)

    @property
    def metric(self) -> fit.Metric:
        """Inputs are weighed by their covariance where a bias can absorb the mean."""
        inputs = self.moments.inputs.weighing(self.target.bias)
        return fit.Metric.of(inputs, self.moments.gradient, self.target.shape[0])


def low_rank_candidates(target: Target, load: Callable[[], Matrix], work: Work) -> list[Candidate]:
    """The matrix itself, and low rank at many ranks: the exact harm of each."""

    def make() -> Tensors:
        matrix = load()
        return {"harm": fit.low_rank_harm(matrix.weight, matrix.metric)}

    return _of_ranks(target, work.once(make, "prices", target)["harm"])


def _of_ranks(target: Target, harm: Tensor) -> list[Candidate]:
    """Candidates from the harm of every rank; none larger than the matrix itself."""
    harms, found = harm.tolist(), [candidate(target, (), 0.0)]
    for factors in dict.fromkeys(low_rank(target.shape, share) for share in SHARES):
        found.append(candidate(target, (factors,), harms[factors.terms]))
    return [c for c in found if c.parameters <= found[0].parameters]


@dataclass(frozen=True)
class Width:
    """An MLP with so many hidden units.

    Attributes:
        harm: of those that are gone, in nats a token.
        rows: of each matrix, in the order of `MLP.targets`, its low-rank candidates.
    """

    hidden: int
    harm: float
    rows: list[list[Candidate]]


def price_widths(
    mlp: MLP, matrices: Callable[[], Sequence[Matrix]], tried: Sequence[int], work: Work
) -> list[Width]:
    """What is left of an MLP at each width.

    Args:
        matrices: those of `mlp.targets`, with all of their units.
        tried: the widths, descending.
        work: where the prices are kept, for other budgets.
    """
    ascending = sorted(tried)
    kept = work.once(lambda: _widths(mlp, matrices(), ascending, work), "prices", mlp, ascending)
    return [
        Width(
            units,
            float(kept["lost"][ascending.index(units)]),
            [
                _of_ranks(target.narrowed(units), kept[f"{target.name} {units}"])
                for target in mlp.targets
            ],
        )
        for units in tried
    ]


def _widths(mlp: MLP, matrices: Sequence[Matrix], tried: list[int], work: Work) -> Tensors:
    """For each width, in ascending order, the harm of the units that are gone ("lost"), and that of
    every rank of every matrix."""
    down = matrices[-1]
    weight, metric = down.weight, down.metric
    ranked = width.order(mlp.down.name, weight, metric, work).flip(0)
    lost, reading = _reading(weight, metric, ranked, tried)
    del weight, metric
    found = {"lost": torch.tensor(lost, dtype=torch.float64)}
    for matrix in matrices[:-1]:
        rows = width.rows_of(ranked, mlp.down.hidden, matrix.target.parts)
        harms = _writing(matrix.weight, matrix.metric, rows, matrix.target.parts, tried)
        found |= {f"{matrix.target.name} {k}": h for k, h in zip(tried, harms, strict=True)}
    name = mlp.down.name
    return found | {f"{name} {k}": h for k, h in zip(tried, reading, strict=True)}


def _reading(
    weight: Tensor, metric: fit.Metric, ranked: Tensor, tried: list[int]
) -> tuple[list[float], list[Tensor]]:
    """For the matrix (m, n) that reads the hidden axis, at each ascending width: the harm of the
    units that are gone, and that of every rank of what makes up for them."""
    root = torch.linalg.cholesky(metric.inputs[ranked][:, ranked])
    image = root.T @ weight[:, ranked].T @ fit.root(metric.outputs)
    left = image.square().sum(1).flip(0).cumsum(0).flip(0)
    lost = [0.5 * float(left[k]) if k < len(left) else 0.0 for k in tried]
    return lost, [fit.rank_harm(part) for part in _prefixes(image, tried)]


def _prefixes(image: Tensor, tried: list[int]) -> list[Tensor]:
    """The smaller Gram matrix of the first k rows of (n, m), for every ascending k."""
    found, before, m = [], 0, image.shape[1]
    gram = image.new_zeros(m, m)
    for k in tried:
        new = image[before:k]
        gram = gram + new.T @ new
        found.append(gram if k >= m else image[:k] @ image[:k].T)
        before = k
    return found


def _writing(
    weight: Tensor, metric: fit.Metric, ranked: Tensor, parts: int, tried: list[int]
) -> list[Tensor]:
    """For a matrix (m, n) that writes the hidden axis, at each ascending width: the harm of every
    rank of the rows that stay."""
    whitened = weight @ fit.root(metric.inputs)
    rows = ranked.view(parts, -1)
    gram = whitened.new_zeros(weight.shape[1], weight.shape[1])
    found, before = [], 0
    for k in tried:
        new, old = rows[:, before:k].flatten(), rows[:, :before].flatten()
        mine, across = whitened[new], metric.outputs[new]
        mixed_in = mine.T @ (across[:, old] @ whitened[old])
        gram = gram + mine.T @ (across[:, new] @ mine) + mixed_in + mixed_in.T
        found.append(fit.rank_harm(gram))
        before = k
    return found


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


def ways(widths: Sequence[Width], gain: float) -> list[tuple[Candidate, int]]:
    """Ways to store an MLP, and the units of each: at every width the best low rank of all of its
    matrices for many prices of a parameter.

    Args:
        gain: what the structures that a matrix really gets leave of low rank's harm.
    """
    found = []
    for each in widths:
        for taken in _hull(each.rows):
            found.append((replace(taken, harm=taken.harm * gain + each.harm), each.hidden))
    return found


def _hull(priced: list[list[Candidate]]) -> list[Candidate]:
    """Candidates for all of these matrices together: for many prices of a parameter, the best of
    each."""
    found: dict[tuple[int, ...], Candidate] = {}
    costs = [np.array([c.parameters for c in row], dtype=float) for row in priced]
    harms = [np.array([c.harm for c in row]) for row in priced]
    highest = max(float(h.max()) for h in harms) / min(float(c.min()) for c in costs)
    best = np.stack(
        [(h + highest * PRICES[:, None] * c).argmin(1) for h, c in zip(harms, costs, strict=True)],
        axis=1,
    )
    for each in dict.fromkeys(map(tuple, best.tolist())):
        taken = [row[i] for row, i in zip(priced, each, strict=True)]
        found[each] = Candidate(
            (),
            sum(c.parameters for c in taken),
            sum(c.multiply_adds for c in taken),
            sum(c.harm for c in taken),
        )
    return list(found.values())


Kind = tuple[str, tuple[int, int], float]  # role, dense shape, part of low rank


@dataclass
class Sums:
    """Low rank beside a balanced sum, for many matrices: harms guessed, then fitted where it pays.

    Attributes:
        targets: that may get them. rows: their low-rank candidates.
        load: the matrix of that name, as it is to be fitted. work: where fits are kept.
        fitted: by matrix and part, (share, harm over that of low rank at the same size).
    """

    targets: dict[str, Target]
    rows: dict[str, list[Candidate]]
    load: Callable[[str], Matrix]
    work: Work
    fitted: dict[tuple[str, float], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def settle(
        self,
        others: list[list[Candidate]],
        most: dict[Currency, float],
        below: float,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, list[Candidate]]:
        """Candidates of every matrix, those sums among them that were fitted, once a plan within
        `most` takes no others; no sums, once even what is guessed is not below a harm.

        Args:
            others: candidates of matrices that get no sums.
            below: nats a token that a plan with sums must stay below.
        """
        names, done, first = list(self.targets), 0, True
        while True:
            guessed = {name: self._mixed(name) for name in names}
            rows = [[*self.rows[n], *(c for c, *_ in guessed[n])] for n in names]
            chosen = choose([*rows, *others], most)
            if sum(c.harm for c in chosen) >= below:
                return dict(self.rows)
            open_ = [
                (name, part, share)
                for name, taken in zip(names, chosen, strict=False)
                for c, part, share in guessed[name]
                if c is taken and not self._known(name, part, share)
            ]
            if not open_:
                return {
                    name: [
                        *self.rows[name],
                        *(c for c, part, share in guessed[name] if self._known(name, part, share)),
                    ]
                    for name in names
                }
            now = self._probes(open_) if first else open_
            first = False
            for name, part, share in now:
                self._fit(name, part, share)
                done += 1
                if progress is not None:
                    progress(done, done + len(open_) - 1)

    def _kind(self, name: str, part: float) -> Kind:
        target = self.targets[name]
        return target.role, target.dense_shape or target.shape, part

    def _probes(self, wanted: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
        """A few of each kind, spread over the model."""
        kinds = defaultdict(list)
        for each in wanted:
            kinds[self._kind(*each[:2])].append(each)
        return [
            group[i]
            for group in kinds.values()
            for i in sorted({len(group) // 3, 2 * len(group) // 3})[:PROBES]
        ]

    def _mixed(self, name: str) -> list[tuple[Candidate, float, float]]:
        """(candidate, part, share) with harms as far as they are known or guessed."""
        target = self.targets[name]
        costs, logs = self._low_rank(name)
        if balanced_shapes(target.shape)[1] == (1, 1) or not costs:
            return []
        found = []
        for part in LOW_RANK_PARTS:
            points = sorted(self.fitted[name, part]) or [(1.0, self._guess(name, part))]
            shares, ratios = zip(*points, strict=True)
            seen = set()
            for share in SHARES:
                groups = mixed(target.shape, share, part)
                cost = sum(g.parameters for g in groups)
                if groups in seen or cost > target.shape[0] * target.shape[1]:
                    continue
                seen.add(groups)
                ratio = np.interp(math.log(share), np.log(shares), ratios)
                harm = math.exp(np.interp(cost, costs, logs)) * float(ratio)
                found.append((candidate(target, groups, harm), part, float(share)))
        return found

    def _low_rank(self, name: str) -> tuple[list[int], list[float]]:
        """Sizes at which low rank was priced, ascending, and the logarithms of its harm."""
        low = sorted((c for c in self.rows[name] if c.groups), key=lambda c: c.parameters)
        return [c.parameters for c in low], [math.log(max(c.harm, 1e-300)) for c in low]

    def _guess(self, name: str, part: float) -> float:
        """What fitted ones of its kind left on average; `SUMS` before there is one."""
        kind = self._kind(name, part)
        known = [
            ratio
            for (other, its), points in self.fitted.items()
            if points and self._kind(other, its) == kind
            for _, ratio in points
        ]
        return sum(known) / len(known) if known else SUMS

    def _known(self, name: str, part: float, share: float) -> bool:
        return any(1 / NEAR <= share / s <= NEAR for s, _ in self.fitted[name, part])

    def _fit(self, name: str, part: float, share: float) -> None:
        target = self.targets[name]
        groups = mixed(target.shape, share, part)

        def make() -> Tensors:
            matrix = self.load(name)
            _, history = fit.groups(matrix.weight, matrix.metric, groups, steps=PRICING_STEPS)
            return {"harm": torch.tensor(history[-1], dtype=torch.float64)}

        harm = float(self.work.once(make, "sum", target, groups)["harm"])
        same = math.exp(np.interp(sum(g.parameters for g in groups), *self._low_rank(name)))
        self.fitted[name, part].append((share, harm / same))
