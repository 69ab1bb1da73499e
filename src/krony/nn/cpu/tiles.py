"""A whole MLP for many tokens in bfloat16, on a CPU with a tile unit: the calls of tiles.c.

The two large products, with what lies between them while the tile unit works, for a block of tokens
at a time that stays in the second cache. Of what does not fit (`Tiles.fits`) oneDNN makes the
products.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.cpu.kernels import MOST_MIXED, POINTER, SIZE

LEAST = 2  # tokens
SIDE = 32  # of a sum, in outputs and in tokens: SIDE of tiles.c
# Bytes of a block of tokens, before and on the hidden axis, for which the second cache has room
# beside the weights that pass through it; and panels of SIDE tokens that are worth reading those.
ROOM, LEAST_PANELS = 1_200_000, 3


def _fields(*names: str) -> list[tuple[str, Any]]:
    """Of a structure of tiles.c: addresses in capitals, and counts."""
    return [(name.lower(), POINTER if name.isupper() else SIZE) for name in names]


class _Product(ctypes.Structure):
    _fields_: ClassVar = _fields("W", "weights", "m", "k", "weight", "row", "slices")


class _Matrix(ctypes.Structure):
    _fields_: ClassVar = [("product", _Product), *_fields("MIXING", "BIAS", "outs")]


class _Input(ctypes.Structure):
    _fields_: ClassVar = _fields("X", "MIXING", "given", "taken", "side")


@dataclass(frozen=True)
class Product:
    """Slices of k features through each of some weights, to m outputs each.

    Attributes:
        weight: (weights, m, k), the last stride 1.
        features: before it, of all slices together.
    """

    weight: Tensor
    features: int

    @property
    def m(self) -> int:
        """Outputs of a slice."""
        return self.weight.shape[1]

    @property
    def slices(self) -> int:
        """Of the outputs: through every weight the first slice of the inputs, the second, …"""
        return self.features // self.weight.shape[2] * len(self.weight)

    @property
    def fits(self) -> bool:
        """Whether the kernel takes it: features in pairs, slices in whole tiles."""
        _, m, k = self.weight.shape
        whole = self.features % k == 0 and k % (2 if self.features == k else SIDE) == 0
        return whole and m % 2 == 0 and self.weight.stride(2) == 1

    def structure(self) -> _Product:
        """For tiles.c."""
        w = self.weight
        return _Product(w.data_ptr(), *w.shape, *w.stride()[:2], self.slices)


@dataclass(frozen=True)
class Matrix:
    """A product, and what becomes of its slices.

    Attributes:
        mixing: (outs, slices), or None.
        bias: (outs, m), or None.
    """

    product: Product
    mixing: Tensor | None = None
    bias: Tensor | None = None

    @property
    def outs(self) -> int:
        """Slices of the outputs."""
        return self.product.slices if self.mixing is None else len(self.mixing)


@dataclass(frozen=True)
class Input:
    """What a matrix reads: x (T, slices, k).

    Attributes:
        mixing: (p, slices), or None.
    """

    slices: int
    k: int
    mixing: Tensor | None = None

    @property
    def features(self) -> int:
        """As many as the product takes."""
        return self.k * (self.slices if self.mixing is None else len(self.mixing))

    @property
    def fits(self) -> bool:
        """Whether the kernel takes it: slices that are mixed in whole tiles."""
        return self.mixing is None or self.k % SIDE == 0


def can_take(x: Tensor) -> bool:
    """Whether tokens x (..., n) may be for the tile unit."""
    enough = x.numel() >= LEAST * x.shape[-1]
    return x.dtype == torch.bfloat16 and enough and cpu_kernels.has_tiles()


class Tiles:
    """An MLP as tiles.c wants it, if it `fits`. All tensors are in bfloat16 on the CPU, and what is
    mixed and added is copied.

    Args:
        inputs: one for all matrices that write the hidden axis, or one for each.
        ups: one of these or two, the second a factor of the activation of the first.
        activation: as cpu_kernels.py numbers them.
        mixing: (p, outs), of the hidden slices, or None.
        down: the matrix that reads them.
        enters: of low rank, what each of `ups` comes after; or none.
        between: of low rank, what `down` comes after; or None.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        ups: Sequence[Matrix],
        activation: int,
        mixing: Tensor | None,
        down: Matrix,
        enters: Sequence[Matrix] = (),
        between: Matrix | None = None,
    ) -> None:
        hidden = ups[0].outs
        read = hidden if mixing is None else len(mixing)
        halves = [*enters, *([] if between is None else [between])]
        matrices = [*ups, down, *halves]
        features = sum(i.features for i in inputs) + sum(h.outs * h.product.m for h in halves)
        token = 2 * (features + read * ups[0].product.m)  # bytes
        self._panels = ROOM // (token * SIDE)
        tables = [mixing, *(i.mixing for i in inputs), *(of.mixing for of in matrices)]
        small = all(table is None or table.numel() <= MOST_MIXED for table in tables)
        whole = all(of.product.fits for of in matrices) and all(i.fits for i in inputs)
        few = hidden <= MOST_MIXED
        self.fits = self._panels >= LEAST_PANELS and small and few and whole
        self._kept: list[Any] = [inputs, matrices]
        self._inputs = [(i.slices, i.k, i.mixing, self._floats(i.mixing)) for i in inputs]
        writes = (self._matrices(enters), self._matrices(ups), len(ups), activation)
        reads = (self._matrices([] if between is None else [between]), self._matrices([down]))
        self._middle = (*writes, self._floats(mixing), read, *reads)
        self._outs = down.outs, down.product.m

    def _floats(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        self._kept.append(x.float().contiguous())
        address: int = self._kept[-1].data_ptr()
        return address

    def _matrices(self, of: Sequence[Matrix]) -> Any:
        structures = [
            _Matrix(m.product.structure(), self._floats(m.mixing), self._floats(m.bias), m.outs)
            for m in of
        ]
        return (_Matrix * len(structures))(*structures) if structures else None

    def run(self, xs: Sequence[Tensor]) -> Tensor | None:
        """The results' slices (T, outs of `down`, m) for contiguous inputs (T, slices, k); None if
        there is no memory. Outside of autograd, only where `can_take`."""
        entered = (_Input * len(xs))()
        for at, (x, (slices, k, mixing, address)) in enumerate(zip(xs, self._inputs, strict=True)):
            if mixing is None:  # all of a token in one piece
                entered[at] = _Input(x.data_ptr(), None, 1, 1, slices * k)
            else:
                entered[at] = _Input(x.data_ptr(), address, slices, len(mixing), k)
        tokens = len(xs[0])
        y = xs[0].new_empty(tokens, *self._outs)
        sizes = (tokens, self._panels, torch.get_num_threads())
        failed = cpu_kernels.tiles(entered, len(xs), *self._middle, y.data_ptr(), *sizes)
        return None if failed else y
