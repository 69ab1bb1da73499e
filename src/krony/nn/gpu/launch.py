"""Launches of the Triton kernels: their blocks, by shapes, and the way to a compiled one.

Imported only where Triton is.
"""

import math
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from krony.nn.gpu import triton_kernels
from krony.nn.gpu.step import Step

# The smallest side of a tile that the matrix units take.
SMALLEST_DOT = 16
# Up to so many rows (tokens times slices), products and sums by element keep fewer lanes idle than
# a tile of the matrix units, most of whose rows would be padding.
BY_ELEMENT = 4
# Rows that one program of `triton_kernels.few` holds in registers.
MOST_ROWS = 64
# Bytes of shared memory that a program can have where torch does not say.
LEAST_SHARED = 99 * 1024
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_KNOWN = 4096  # compiled kernels with their grids


def _dot_dtype(x: Tensor) -> Any:
    # The interpreter computes with numpy, which has no bfloat16.
    if INTERPRETED and x.dtype == torch.bfloat16:
        return tl.float32
    return getattr(tl, str(x.dtype).removeprefix("torch."))


# Compiled kernels with their grids, and the numbers that follow the tensors. Triton's own way to
# one, through all of the arguments, takes several times as long as the kernel.
_KNOWN: dict[Any, tuple[Callable[..., None], tuple[Any, ...]]] = {}


def launch(x: Tensor, step: Step, y: Tensor, many: bool = False, **sizes: int) -> None:
    """Fill y (T, q·m1) with what a step makes of x (T, n), in one launch.

    Args:
        x, y, and the step's tensors: contiguous, of one dtype, on the current device.
        many: by the kernel for many tokens, which `takes_many` says it knows.
        sizes: of blocks, `num_warps` and `num_stages`, instead of those chosen here.
    """
    known = None if sizes or x.data_ptr() % 16 else (many, x.shape[0], step.key)
    if known in _KNOWN:
        run, numbers = _KNOWN[known]
        run(x, *step.held, y, *numbers)
        return
    kernel, grid, numbers, options = (_of_many if many else _of_few)(x, step, sizes)
    compiled: Any = kernel[grid](x, *step.held, y, *numbers, **options)
    if known is not None and step.key is not None and not INTERPRETED:
        if len(_KNOWN) >= MOST_KNOWN:  # one for every number of tokens
            _KNOWN.clear()
        _KNOWN[known] = compiled[grid], numbers


_Launch = tuple[Any, tuple[int, int, int], tuple[Any, ...], dict[str, int]]


def _of_few(x: Tensor, step: Step, given: dict[str, int]) -> _Launch:
    tokens, (m1, n1, m2, n2), q = len(x), step.sides, step.slices
    block_t = max(1, min(tokens, MOST_ROWS // max(m2, n2, q)))
    rows = [triton.next_power_of_2(block_t * side) for side in (n2, m2, q)]
    # The choices are those that were fastest on an H200 (docs/gpu.md). Few rows of A for a program,
    # so that a few hundred fill the GPU, and much of each, so that all is asked for at once.
    wide = max(triton.next_power_of_2(n1), SMALLEST_DOT)
    tall = tokens > 1 and m1 >= 1024  # enough tiles of rows
    dot = given.get("DOT", rows[0] > (BY_ELEMENT // 2 if tall else BY_ELEMENT))
    if dot:
        rows = [max(side, SMALLEST_DOT) for side in rows]
        block_a, block_b = SMALLEST_DOT, min(wide, 512 if n1 > 1024 else 256)
        if x.dtype == torch.float32:
            block_b = min(wide, 64)
        warps = 2 if max(rows) == SMALLEST_DOT and n1 <= 1024 else 4
    else:
        block_a, block_b = 2, min(wide, 2048 if rows[0] <= 2 else 1024)
        if m1 * n1 >= 2**22:
            block_a, block_b = 4, min(wide, 1024)
        if x.dtype == torch.float32:
            block_b = min(wide, 1024)
        warps = 1 if block_a * block_b * rows[0] <= 2048 else 4
    block_a, block_b = given.get("BLOCK_A", block_a), given.get("BLOCK_B", block_b)
    strides = (1, n1, 1, m1, 1, m1) if step.small_outer else (n2, 1, m2, 1, q, 1)
    numbers = (
        *(tokens, m1, n1, m2, n2, q, *strides, *_strides_of_weight(step)),
        *(step.terms, block_t, *rows, block_a, block_b, dot, _dot_dtype(x), bool(step.smalls)),
        *(bool(step.biases), len(step.weights) > 1, step.kind, step.inner is not None),
    )
    grid = triton.cdiv(m1, block_a), triton.cdiv(tokens, block_t), 1
    return triton_kernels.few, grid, numbers, {"num_warps": given.get("num_warps", warps)}


def _of_many(x: Tensor, step: Step, given: dict[str, int]) -> _Launch:
    tokens, (m1, n1, m2, n2), q = len(x), step.sides, step.slices
    # As fast as any on an H200: larger tiles where they still fill it, or where rows are long; not
    # where the sums of terms take registers too.
    large = triton.cdiv(tokens, 64) * triton.cdiv(m1, 64) > 264 or n1 >= 2048
    large = large and step.terms == 1
    sizes = {"BLOCK_T": 64, "BLOCK_A": 64 if large else 32, "BLOCK_B": 64}
    sizes |= {"num_warps": 4, "num_stages": 3 if large else 4} | given
    block_t, block_a, block_b = (sizes.pop(name) for name in ("BLOCK_T", "BLOCK_A", "BLOCK_B"))
    stage = (n2 * block_t + block_a) * block_b * x.element_size()
    while "num_stages" not in given and sizes["num_stages"] * stage > _shared_memory(x.device):
        sizes["num_stages"] -= 1
    numbers = (
        *(tokens, m1, n1, *_strides_of_weight(step), step.terms, n2, m2, q),
        *(block_t, block_a, block_b, _dot_dtype(x), bool(step.smalls), bool(step.biases)),
        *(len(step.weights) > 1, step.kind, step.inner is not None),
    )
    grid = triton.cdiv(m1, block_a) * triton.cdiv(tokens, block_t), 1, 1
    return triton_kernels.many, grid, numbers, sizes


@lru_cache
def _shared_memory(device: torch.device) -> float:
    """Bytes that a program can have; few GPUs have as much as an H200."""
    if INTERPRETED:
        return math.inf
    properties = torch.cuda.get_device_properties(device)
    return float(getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED))


def _strides_of_weight(step: Step) -> tuple[int, int]:
    """From row to row of A, and from term to term."""
    m1, n1, _, _ = step.sides
    return (step.terms * n1, n1) if step.mix_first else (n1, m1 * n1)
