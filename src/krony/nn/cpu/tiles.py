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

from krony.nn.cpu import fewer
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.cpu.kernels import MOST_MIXED, POINTER, SIZE
from krony.nn.lower import LoweredGroup, LoweredMLP, once, stray
from krony.nn.products import Route, from_slices, to_slices
from krony.runtime.products import Layout

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


@dataclass(frozen=True)
class Plan:
    """An MLP on the tile unit, and how its tokens are cut into slices.

    Attributes:
        layouts: of the inputs. layout: of the outputs.
    """

    tiles: Tiles
    inputs: list[Input]
    layouts: list[Layout]
    layout: Layout


def can_take(mlp: LoweredMLP, request: Any) -> str | None:
    """Why it does not take an MLP, or None: bfloat16, in shapes that fill its tiles."""
    if request.device.type != "cpu":
        return "only on a CPU"
    if request.special is not None:
        return str(request.special)
    if request.dtype != torch.bfloat16:
        return "only bfloat16"
    if request.tokens < LEAST:
        return f"fewer than {LEAST} tokens"
    if not cpu_kernels.has_tiles():
        return "no tile unit (AMX), or no C compiler"
    if not mlp.counted:
        return "its numbers, made in inference mode, do not count their changes"
    groups = [group for matrix in mlp.matrices for group in matrix.groups]
    if len(groups) > len(mlp.matrices):
        return "a matrix is a sum of several groups"
    if (strays := stray(mlp, request.dtype, request.device)) is not None:
        return strays
    if any(group.by_columns for group in groups):
        return "a weight by columns: inputs do not lie side by side"
    if any(fewer.way(group, request.tokens, request.dtype) == "fewer" for group in groups):
        return "for so many tokens a matrix is fewer products, by oneDNN"
    if once(mlp, "tiles", plan) is None:
        return "shapes that do not fill its tiles, or do not fit into the second cache"
    return None


def plan(mlp: LoweredMLP) -> Plan | None:
    """An MLP as the tile unit's kernel wants it, or None where that does not take it."""
    groups = [matrix.groups[0] for matrix in mlp.matrices]
    if any(_too_wide(group) for group in groups):
        return None
    routes = [fewer.route_of(group) for group in groups]
    (*written, read), (*ups, down) = routes, mlp.matrices
    first = written[0]
    if any(route.shape[:2] != first.shape[:2] or route.layout != first.layout for route in written):
        return None
    if ups[0].shape[0] != down.shape[1] or first.shape[0] > MOST_MIXED or not _follows(read, first):
        return None
    return _planned(written, read, [up.bias for up in ups], down.bias, mlp.kind)


def _too_wide(group: LoweredGroup) -> bool:
    """Whether a small factor is more than what is mixed, and no matrix of its own (low rank)."""
    return group.small is not None and group.small.numel() > MOST_MIXED and group.large_shape[1] > 1


def _planned(
    written: list[Route], read: Route, offsets: list[Tensor | None], bias: Tensor | None, kind: int
) -> Plan | None:
    halves = [_half(route) for route in written]
    enters = [half for half in halves if half is not None]
    if enters and len(enters) < len(written):
        return None
    inputs = [_input(route) for route in written]
    ups = []
    for route, of, half, offset in zip(written, inputs, halves, offsets, strict=True):
        features = of.features if half is None else half.product.m
        product = Product(_weights(route), features)
        ups.append(Matrix(product, route.outer, route.slices_of(offset)))
    if all(of.mixing is None for of in inputs):
        del inputs[1:]  # all read the same
    (*_, n2, n1) = read.shape
    inner, outer, weight, features = read.inner, read.outer, _weights(read), n2 * n1
    between = _half(read)
    if between is not None:
        inner, features = None, between.product.m
    elif inner is not None and len(inner) > n2:  # the results are mixed, which are fewer
        terms = weight.shape[2] // n1
        outer = inner.unflatten(0, (-1, terms)).mT.flatten(1)
        inner, weight = None, weight[0].unflatten(1, (terms, n1)).transpose(0, 1)
    elif inner is not None:
        features = len(inner) * n1
    down = Matrix(Product(weight, features), outer, read.slices_of(bias))
    tiles = Tiles(inputs, ups, kind, inner, down, enters, between)
    return Plan(tiles, inputs, [r.layout for r in written], read.layout) if tiles.fits else None


def run(plan: Plan, x: Tensor) -> Tensor | None:
    """Tokens x (..., n) through an MLP: (..., m); None if there is no memory."""
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    xs = [
        to_slices(x, (-1, of.slices, of.k), layout).contiguous()
        for layout, of in zip(plan.layouts, plan.inputs, strict=False)
    ]
    y = plan.tiles.run(xs)
    return None if y is None else from_slices(y, lead, plan.layout)


def _follows(read: Route, written: Route) -> bool:
    """Whether one matrix reads the hidden features in the order in which another writes them."""
    (m2, m1, *_), (*_, n2, n1) = written.shape, read.shape
    alike = (n2, n1, read.layout) == (m2, m1, written.layout)
    if read.inner is not None and n1 > 1:
        return alike
    # Slices that are features one after the other are as good as one.
    return alike or all(
        layout == "small-outer" or 1 in sides
        for layout, sides in ((written.layout, (m2, m1)), (read.layout, (n2, n1)))
    )


def _input(route: Route) -> Input:
    """What the tile unit's product reads."""
    _, _, n2, n1 = route.shape
    return Input(n2, n1, None if n1 == 1 else route.inner)


def _half(route: Route) -> Matrix | None:
    """Of low rank the half that reads, which is a product of its own; else None."""
    (*_, n2, n1), inner = route.shape, route.inner
    if inner is None or n1 > 1:
        return None
    return Matrix(Product(inner[None], n2))


def _weights(route: Route) -> Tensor:
    """Of its products, each for all slices: (·, m1, ·)."""
    weights: Tensor = route.weight.unflatten(0, (-1, route.shape[1]))
    return weights
