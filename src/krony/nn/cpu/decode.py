"""A few tokens through factored layers and MLPs on a CPU, in one call of decode.c each.

Reading the factors is what takes the time then, so each is read once, and Python does as little as
it can: what the C code must know is put together once, and kept as long as it holds.
"""

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.cpu.kernels import FLAG, POINTER, SIZE
from krony.nn.lower import Lowered, LoweredGroup, LoweredMLP, stray

# Beyond so many rows that meet the large factor (tokens times slices), products of BLAS are faster,
# those of bfloat16 sooner: they have instructions of their own.
MOST_ROWS = {torch.float32: 16, torch.bfloat16: 8}
# Of small factors, which are applied in plain loops.
MOST_ENTRIES = 2**16


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


def can_take(lowered: Lowered | LoweredMLP, request: Any) -> str | None:
    """Why decode.c does not take it, or None: plain numbers of one dtype that is compiled, outside
    of autograd, as long as reading the large factors is what takes the time."""
    if request.device.type != "cpu":
        return "only on a CPU"
    if request.special is not None:
        return str(request.special)
    if (most := MOST_ROWS.get(request.dtype)) is None:
        return "only float32 and bfloat16"
    if request.learns:
        return "gradients are wanted"
    groups = [group for matrix in lowered.matrices for group in matrix.groups]
    slices = max(group.slices for group in groups)
    if request.tokens * slices > most:
        return f"more than {most} rows meet the large factor ({slices} for a token)"
    if (strays := stray(lowered, request.dtype, request.device)) is not None:
        return strays
    if not all(tensor.is_contiguous() for tensor in lowered.tensors):
        return "its numbers do not lie in one piece"
    if any(_entries(group) > MOST_ENTRIES and not group.is_low_rank for group in groups):
        return f"small factors of more than {MOST_ENTRIES:,} numbers"
    by_columns = any(group.by_columns for group in groups)
    if by_columns and request.tokens == 1 and request.dtype == torch.float32:
        return "BLAS is as good for one token and weights by columns"
    return None if cpu_kernels.library() is not None else "no C compiler"


def _entries(group: LoweredGroup) -> int:
    return group.terms * group.small_shape[0] * group.small_shape[1]


class Prepared:
    """A layer or an MLP as decode.c wants it: where its numbers are."""

    def __init__(self, lowered: Lowered | LoweredMLP) -> None:
        self._kept: list[Any] = []
        matrices = [self._matrix(matrix) for matrix in lowered.matrices]
        self.m: int = matrices[-1].m
        self.down: Any = None
        self.activation = cpu_kernels.NONE
        if isinstance(lowered, LoweredMLP):
            self.down, self.activation = ctypes.byref(matrices.pop()), lowered.kind
        self.count = len(matrices)
        self.ups = ctypes.byref((_Matrix * self.count)(*matrices))
        functions = cpu_kernels.library()
        assert functions is not None
        self.function = functions["decode", lowered.matrices[0].groups[0].weight.dtype]

    def _matrix(self, matrix: Lowered) -> _Matrix:
        made = (_Group * len(matrix.groups))(*map(_group, matrix.groups))
        self._kept.append(made)
        return _Matrix(made, len(made), _address(matrix.bias), *matrix.shape)


def _group(group: LoweredGroup) -> _Group:
    held = (group.small, group.scalars, group.weight, group.order)
    sizes = (group.terms, *group.large_shape, *group.small_shape)
    flags = (group.layout == "small-outer", group.mix_first, group.by_columns)
    return _Group(*map(_address, held), *sizes, *flags)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def run(prepared: Prepared, x: Tensor) -> Tensor:
    """The product of a layer, or an MLP, with a few tokens (..., n): (..., m)."""
    *lead, n = x.shape
    x, y = x.contiguous(), x.new_empty((*lead, prepared.m))
    tokens, threads = x.numel() // n, torch.get_num_threads()
    sizes = x.data_ptr(), y.data_ptr(), tokens, threads
    if prepared.function(prepared.ups, prepared.count, prepared.activation, prepared.down, *sizes):
        raise MemoryError(f"no memory for the intermediate results of {tokens} tokens")
    return y
