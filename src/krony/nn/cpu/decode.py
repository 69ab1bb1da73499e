"""A few tokens through factored layers and MLPs on a CPU, in one call of decode.c each.

Reading the factors is what takes the time then, so each is read once, and Python does as little as
it can: what the C code must know is put together once, and kept as long as it holds.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.cpu.kernels import FLAG, POINTER, SIZE
from krony.nn.watched import Watched
from krony.runtime.layers import KroneckerGroup, KroneckerLinear, is_hooked, is_plain_linear

# Beyond so many rows that meet the large factor (tokens times slices), products of BLAS are faster,
# those of bfloat16 sooner: they have instructions of their own.
MOST_ROWS = {torch.float32: 16, torch.bfloat16: 8}
# Of small factors, which are applied in plain loops.
MOST_ENTRIES = 2**16


@dataclass(frozen=True)
class Parts:
    """The names of an MLP's children.

    Attributes:
        ups: the matrix that writes the hidden axis, or gate and up. One that writes twice the axis
            that `down` reads is both, the gate first.
        activation: the module. kind: which of `cpu_kernels`.
    """

    ups: tuple[str, ...]
    activation: str
    down: str
    kind: int


class _Group(ctypes.Structure):
    """Of decode.c."""

    _fields_: ClassVar = [
        *((name, POINTER) for name in ("small", "scalars", "weight", "order")),
        *((name, SIZE) for name in ("terms", "m1", "n1", "m2", "n2")),
        *((name, FLAG) for name in ("small_outer", "mix_first", "by_columns")),
    ]


class _Matrix(ctypes.Structure):
    """Of decode.c."""

    _fields_: ClassVar = [
        ("groups", ctypes.POINTER(_Group)),
        ("count", SIZE),
        ("bias", POINTER),
        *((name, SIZE) for name in ("m", "n")),
    ]


class Prepared(Watched):
    """A layer or an MLP as decode.c wants it, for as long as `fits`.

    Args:
        owner: the layer, or with `parts` the MLP.
    """

    def __init__(self, owner: nn.Module, parts: Parts | None) -> None:
        super().__init__()
        self._kept: list[Any] = []
        self._formed: list[tuple[Any, int]] = []  # and where their W is
        self._dtypes: set[torch.dtype] = set()
        self._usable, self.by_columns = True, False
        self.slices = 1  # rows a token that meet a large factor, at most
        matrices = [self._matrix(layer) for layer in _layers(owner, parts)]
        self.m: int = matrices[-1].m
        self.down: Any = None
        self.activation = cpu_kernels.NONE
        if parts is not None:
            self.down, self.activation = ctypes.byref(matrices.pop()), parts.kind
            for name in owner._modules:
                self.child(owner, name)
        self.count = len(matrices)
        self.ups = ctypes.byref((_Matrix * self.count)(*matrices))
        self._usable &= all(tensor.is_contiguous() for tensor in self.tensors)
        self._dtypes |= {tensor.dtype for tensor in self.tensors if tensor.is_floating_point()}

    def _matrix(self, layer: Any) -> _Matrix:
        groups: list[Any] = [layer]
        bias = None if isinstance(layer, KroneckerGroup) else self._address(layer, "bias")
        if _is_factored(layer) and (weight := layer.formed()) is not None:
            self._formed.append((layer, weight.data_ptr()))
            self._dtypes.add(weight.dtype)
            made = (_Group * 1)(_whole(weight.data_ptr(), *weight.shape))
        else:
            if _is_factored(layer):
                held = self.child(layer, "groups")
                groups = [self.child(held, name) for name in held._modules]
            made = (_Group * len(groups))(*map(self._group, groups))
        self._kept.append(made)
        return _Matrix(made, len(made), bias, made[0].m1 * made[0].m2, made[0].n1 * made[0].n2)

    def _group(self, group: Any) -> _Group:
        if isinstance(group, nn.Linear | Conv1D):
            by_columns = isinstance(group, Conv1D)
            self.by_columns |= by_columns
            m, n = group.weight.shape[::-1] if by_columns else group.weight.shape
            return _whole(self._address(group, "weight"), m, n, by_columns)
        into = _Group()
        into.terms, (into.m1, into.n1) = group.terms, group.large_shape
        into.m2, into.n2 = group.small_shape
        into.small_outer, into.mix_first = group.layout == "small-outer", group.mix_first
        into.weight = self._address(self.child(group, "large"), "weight")
        into.small, into.scalars, into.order = (
            self._address(group, name) for name in ("small", "scalars", "order")
        )
        self.slices = max(self.slices, into.m2 if group.mix_first else into.n2)
        low_rank = group.mix_first and into.n1 == into.m2 == 1
        self._usable &= low_rank or into.terms * into.m2 * into.n2 <= MOST_ENTRIES
        return into

    def _address(self, module: nn.Module, name: str) -> int | None:
        tensor = self.tensor(module, name)
        return None if tensor is None else tensor.data_ptr()

    def fits(self, dtype: torch.dtype, learns: bool) -> bool:
        """Whether decode.c can take it, all is where it was, in `dtype` and watched by nobody, and
        with `learns` nothing of it is to have gradients."""
        return (
            self._usable
            and self._dtypes == {dtype}
            and self.unchanged()
            and all(_is_at(layer.formed(), address) for layer, address in self._formed)
            and not (learns and any(tensor.requires_grad for tensor in self.tensors))
        )


def _is_factored(layer: nn.Module) -> bool:
    return isinstance(layer, KroneckerLinear)


def _whole(address: int | None, m: int, n: int, by_columns: bool = False) -> _Group:
    """A weight that is not factored, (m, n) or by columns (n, m)."""
    into = _Group()
    into.weight, into.m1, into.n1, into.by_columns = address, m, n, by_columns
    into.m2 = into.n2 = into.terms = into.small_outer = into.mix_first = 1
    return into


def _is_at(weight: Tensor | None, address: int) -> bool:
    return weight is not None and weight.data_ptr() == address


def _is_plain(layer: Any) -> bool:
    """Whether decode.c could take the layer: not quantised, adapted, sharded or offloaded; or with
    its W."""
    if _is_factored(layer) and (weight := layer.formed()) is not None:
        return weight.is_cpu
    groups: Any = layer.groups if _is_factored(layer) else [layer]
    return all(
        (
            group.is_plain
            if isinstance(group, KroneckerGroup)
            else is_plain_linear(group, (nn.Linear, Conv1D))
        )
        and all(p.is_cpu for p in group.parameters())
        for group in groups
    )


def _layers(owner: nn.Module, parts: Parts | None) -> list[Any]:
    names = () if parts is None else (*parts.ups, parts.down)
    return [owner._modules[name] for name in names] or [owner]


def _prepare(
    owner: nn.Module, parts: Parts | None, dtype: torch.dtype, learns: bool
) -> Prepared | None:
    """`Prepared`, kept with its owner, or None where it can't be; `learns`: gradients are on."""
    kept: Prepared | None = owner.__dict__.get("_prepared")
    if kept is not None and kept.fits(dtype, learns):
        return kept
    watched = () if parts is None else owner.children()
    if any(map(is_hooked, watched)) or not all(map(_is_plain, _layers(owner, parts))):
        return None
    kept = owner.__dict__["_prepared"] = Prepared(owner, parts)
    return kept if kept.fits(dtype, learns) else None


def run(owner: nn.Module, x: Tensor, parts: Parts | None = None) -> Tensor | None:
    """The product of a layer, or an MLP, with a few tokens (..., n), or None where this is no help.

    It helps on a CPU, for plain factors of one dtype that is compiled, outside of autograd,
    autocast and tracing, and as long as reading the large factors is what takes the time.

    Args:
        owner: a `KroneckerGroup`, `KroneckerLinear` or `nn.Linear`, or with `parts` an MLP.
    """
    if not cpu_kernels.can_take(x) or not cpu_kernels.unwatched(x):
        return None
    dtype, shape = x.dtype, x.shape
    tokens, most = x.numel() // shape[-1], MOST_ROWS[dtype]
    if not 0 < tokens <= most:
        return None
    known: Prepared | None = owner.__dict__.get("_prepared")
    if known is not None and tokens * known.slices > most:
        return None
    learns = torch.is_grad_enabled()
    found = _prepare(owner, parts, dtype, learns)
    if found is None or tokens * found.slices > most or (learns and x.requires_grad):
        return None
    if found.by_columns and tokens == 1 and dtype == torch.float32:
        return None  # what BLAS is as good at
    functions = cpu_kernels.library()
    if functions is None:
        return None
    x, y = x.contiguous(), x.new_empty((*shape[:-1], found.m))
    addresses = x.data_ptr(), y.data_ptr()
    threads, decode = torch.get_num_threads(), functions["decode", dtype]
    if decode(found.ups, found.count, found.activation, found.down, *addresses, tokens, threads):
        raise MemoryError(f"no memory for the intermediate results of {tokens} tokens")
    return y
