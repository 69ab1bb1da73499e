"""A whole MLP for many tokens in bfloat16, on a CPU with a tile unit: the calls of tiles.c.

The two large products, with what lies between them while the tile unit works, for a block of tokens
at a time that stays in the second cache. For what it does not take, `run` is None, and oneDNN makes
the products.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from krony import cpu_kernels
from krony.cpu_kernels import MOST_MIXED, POINTER, SIZE, pointer

LEAST = 9  # tokens; decode.c takes fewer
SIDE = 32  # of a sum, in outputs and in tokens: SIDE of tiles.c
# Bytes of a block of tokens, before and on the hidden axis, for which the second cache has room
# beside the weights that pass through it; and panels of SIDE tokens that are worth reading those.
ROOM, LEAST_PANELS = 1_200_000, 3


class _Product(ctypes.Structure):
    """Of tiles.c."""

    _fields_: ClassVar = [
        ("w", POINTER),
        *((name, SIZE) for name in ("weights", "m", "k", "weight", "row", "slices")),
    ]


class _Up(ctypes.Structure):
    """Of tiles.c."""

    _fields_: ClassVar = [
        ("product", _Product),
        ("x", POINTER),
        ("features", SIZE),
        ("mixing", POINTER),
        ("bias", POINTER),
    ]


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
class Up:
    """A matrix that writes the hidden axis.

    Attributes:
        x: (T, features), contiguous.
        mixing: (m2, slices), or None.
        bias: (m2, m), or None.
    """

    product: Product
    x: Tensor
    mixing: Tensor | None
    bias: Tensor | None


def can_take(x: Tensor) -> bool:
    """Whether tokens x (..., n) may be for the tile unit."""
    enough = x.numel() >= LEAST * x.shape[-1]
    return x.dtype == torch.bfloat16 and enough and cpu_kernels.has_tiles()


def run(
    ups: Sequence[Up],
    activation: int,
    mixing: Tensor | None,
    down: Product,
    bias: Tensor | None,
) -> Tensor | None:
    """The results' slices (T, slices, m) of an MLP, or None where this is no help.

    Outside of autograd, and only where `can_take`; all tensors in bfloat16 on the CPU.

    Args:
        ups: of one matrix or of two, the second a factor of the activation of the first.
        activation: as cpu_kernels.py numbers them.
        mixing: (p, m2), of the hidden slices, or None.
        bias: (slices, m) of the results, or None.
    """
    first = ups[0]
    hidden = first.product.slices if first.mixing is None else len(first.mixing)
    read = hidden if mixing is None else len(mixing)
    tables = [hidden * up.product.slices if up.mixing is not None else hidden for up in ups]
    tables.append(read * hidden if mixing is not None else hidden)
    if max(tables) > MOST_MIXED or not all(p.fits for p in (down, *(up.product for up in ups))):
        return None
    numbers = {up.x.data_ptr(): up.x.shape[1] for up in ups}
    token = 2 * (sum(numbers.values()) + read * first.product.m)  # bytes
    panels = ROOM // (token * SIDE)
    if panels < LEAST_PANELS:
        return None
    kept: list[Tensor] = []

    def floats(x: Tensor | None) -> int | None:
        if x is None:
            return None
        kept.append(x.float().contiguous())
        return pointer(kept[-1])

    parts = [
        _Up(
            up.product.structure(), pointer(up.x), up.x.shape[1], floats(up.mixing), floats(up.bias)
        )
        for up in ups
    ]
    y = first.x.new_empty(len(first.x), down.slices, down.m)
    failed = cpu_kernels.tiles(
        ctypes.byref(parts[0]),
        ctypes.byref(parts[1]) if len(parts) > 1 else None,
        activation,
        floats(mixing),
        *(hidden, read),
        ctypes.byref(down.structure()),
        floats(bias),
        pointer(y),
        *(len(y), panels, torch.get_num_threads()),
    )
    return None if failed else y
