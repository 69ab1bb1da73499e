"""What can be taken out of one block, ranked: the hidden units of its MLP, its heads in groups.

Each ranking knows its harm in nats a token, and asks for the moments again when matrices are made:
no more than one block's are held.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krony.compression import width
from krony.compression.calibrate import Moments
from krony.compression.work import Work
from krony.hf.families import dense_weight
from krony.hf.smaller import Sizes, columns_of
from krony.maths.fit import Metric

PRICED = 6  # widths whose harm is computed, between them its logarithm is interpolated


@dataclass(frozen=True)
class Reader:
    """A matrix that reads what can be taken out, hidden units or heads, as columns of its own."""

    weight: Tensor
    metric: Metric
    mean: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: Any, moments: Moments) -> "Reader":
        """In float64, where its moments are."""
        inputs = moments.inputs
        weight = dense_weight(module).detach().double().to(inputs.device)
        bias = None if module.bias is None else module.bias.detach().double().to(weight.device)
        second = inputs.weighing(centered=bias is not None)
        return cls(weight, Metric.of(second, moments.gradient, len(weight)), inputs.mean, bias)

    def solved(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """The matrix (m, kept) and the bias that do the most with these columns."""
        made = width.compensated(self.weight, self.metric.inputs, kept)
        bias = self.bias
        if bias is not None:
            bias = bias + self.weight @ self.mean - made @ self.mean[kept]
        return made, bias

    def harm(self, kept: Tensor) -> float:
        """Nats a token of the columns that are gone, as well as these can make up for them."""
        lost = self.weight.clone()
        lost[:, kept] -= width.compensated(self.weight, self.metric.inputs, kept)
        return self.metric.harm(lost)


class Units:
    """The hidden units of one block's MLP, ranked.

    Args:
        read: makes the matrix that reads them, with its moments.
        widths: those that will be asked for, of which some are priced.
        name, work: where the ranking is kept.
    """

    def __init__(
        self,
        read: Callable[[], Reader],
        widths: list[int],
        name: str = "",
        work: Work | None = None,
    ) -> None:
        self._read = read
        reader = read()
        self.order = width.order(name, reader.weight, reader.metric, work)
        picked = sorted({widths[round(i)] for i in _spaced(len(widths), PRICED)})
        harms = [reader.harm(self._last(w)) for w in picked]
        self._harms = dict(zip(picked, harms, strict=True))

    def _last(self, hidden: int) -> Tensor:
        return self.order[-hidden:].sort().values

    def kept(self, hidden: int) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        """The units of a width, and the matrix and bias that read them."""
        units = self._last(hidden)
        return units, self._read().solved(units)

    def harm(self, hidden: int) -> float:
        """Of a width, in nats a token."""
        if hidden >= len(self.order):
            return 0.0
        known = sorted(self._harms)
        low = max((w for w in known if w <= hidden), default=known[0])
        high = min((w for w in known if w >= hidden), default=known[-1])
        if low == high:
            return self._harms[low]
        part = (hidden - low) / (high - low)
        logs = [math.log(max(self._harms[w], 1e-300)) for w in (low, high)]
        return math.exp(logs[0] + part * (logs[1] - logs[0]))


class Heads:
    """The heads of one block's attention: for each (groups, heads of a group) those that stay.

    Args:
        read: makes the matrix that reads them, with its moments.
        size: numbers of a head.
    """

    def __init__(self, read: Callable[[], Reader], sizes: Sizes, size: int) -> None:
        self._read, self._size = read, size
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor, float]] = {}
        reader = read()

        def stay(members: dict[int, list[int]]) -> Tensor:
            return torch.tensor([h for g in sorted(members) for h in members[g]])

        def harm(members: dict[int, list[int]]) -> float:
            return reader.harm(columns_of(stay(members), size))

        def note(members: dict[int, list[int]], groups: int, heads: int) -> None:
            self.kept[groups, heads] = stay(members), torch.tensor(sorted(members)), harm(members)

        members = {
            g: list(range(g * sizes.heads, (g + 1) * sizes.heads)) for g in range(sizes.groups)
        }
        for groups in range(sizes.groups, 0, -1):
            if groups < sizes.groups:  # the group that costs the least
                ways = [{k: own for k, own in members.items() if k != g} for g in members]
                members = min(ways, key=harm)
            fewer = {g: list(own) for g, own in members.items()}
            note(fewer, groups, sizes.heads)
            for heads in range(sizes.heads - 1, 0, -1):
                for g in fewer:  # each group loses the head that costs the least
                    without = [{**fewer, g: [h for h in fewer[g] if h != out]} for out in fewer[g]]
                    fewer = min(without, key=harm)
                note(fewer, groups, heads)

    def output(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The matrix and the bias that read the heads of this shape."""
        return self._read().solved(columns_of(self.kept[shape][0], self._size))


def _spaced(length: int, count: int) -> list[float]:
    """`count` places from the first of a list to its last."""
    return [i * (length - 1) / max(count - 1, 1) for i in range(min(count, length))]
