"""Triton kernels of the factored product for a few tokens. Imported only where Triton is.

Letters as in kron.py; t counts tokens, a rows and b columns of A, c rows and d columns of B. One
program takes BLOCK_A rows of m1 and a block of tokens: each entry of A is read once for all c and
d of those tokens, and nothing but y is written. Sums are in float32.

    mix first    y[t,c,a] = Σ_r Σ_b A[r,a,b] z[t,c,r,b],  z = Σ_d B[r,c,d] x[t,d,b]
    mix last     y[t,c,a] = Σ_r Σ_d B[r,c,d] p[t,d,r,a],  p = Σ_b A[r,a,b] x[t,d,b]
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The smallest side of a tile that the matrix units take.
SMALLEST_DOT = 16
# Up to so many rows of z or p, products and sums by element keep fewer lanes idle than a tile of
# the matrix units, most of whose rows would be padding.
BY_ELEMENT = 4
# Rows of z and p that one program holds in registers.
MOST_ROWS = 64
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _mix_first(  # type: ignore[no-untyped-def]
    x, small, weight, bias, y, tokens, m1, n1, m2, n2, x_b, x_d, y_a, y_c,
    TERMS: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, DOT: tl.constexpr,
    DOT_IN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Weight (m1, R·n1). A row of z is a pair (t, c). DOT_IN: what a tile product multiplies."""
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    row = tl.arange(0, ROWS)
    c = row % m2
    t = tl.program_id(1) * BLOCK_T + row // m2
    there = (row < BLOCK_T * m2) & (t < tokens)
    t = t.to(tl.int64)
    if DOT:
        total = tl.zeros([ROWS, BLOCK_A], dtype=tl.float32)
    else:
        total = tl.zeros([ROWS, BLOCK_A, BLOCK_B], dtype=tl.float32)
    for r in range(TERMS):
        for start in range(0, n1, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            within = (a < m1)[:, None] & (b < n1)[None, :]
            place = a[:, None].to(tl.int64) * (TERMS * n1) + (r * n1 + b)[None, :]
            tile = tl.load(weight + place, within, other=0.0)
            z = tl.zeros([ROWS, BLOCK_B], dtype=tl.float32)
            for d in range(n2):
                factor = tl.load(small + (r * m2 + c) * n2 + d, there, other=0.0)
                place = (t * (n1 * n2))[:, None] + (b * x_b + d * x_d)[None, :]
                part = tl.load(x + place, there[:, None] & (b < n1)[None, :], other=0.0)
                z += factor.to(tl.float32)[:, None] * part.to(tl.float32)
            if DOT:
                tile = tl.trans(tile.to(DOT_IN))
                total = tl.dot(z.to(DOT_IN), tile, total, input_precision="ieee")
            else:
                total += z[:, None, :] * tile.to(tl.float32)[None, :, :]
    if not DOT:
        total = tl.sum(total, 2)
    if BIAS:
        place = (a * y_a)[None, :] + (c * y_c)[:, None]
        total += tl.load(bias + place, (a < m1)[None, :], other=0.0).to(tl.float32)
    place = (t * (m1 * m2))[:, None] + (a * y_a)[None, :] + (c * y_c)[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), there[:, None] & (a < m1)[None, :])


@triton.jit
def _mix_last(  # type: ignore[no-untyped-def]
    x, small, weight, bias, y, tokens, m1, n1, m2, n2, x_b, x_d, y_a, y_c,
    TERMS: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, ROWS_IN: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, DOT: tl.constexpr,
    DOT_IN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Weight (R·m1, n1). A row of p is a pair (t, d), a row of y a pair (t, c)."""
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    first = tl.program_id(1) * BLOCK_T
    source = tl.arange(0, ROWS_IN)
    d, from_t = source % n2, source // n2
    given = (source < BLOCK_T * n2) & (first + from_t < tokens)
    x_row = (first + from_t).to(tl.int64) * (n1 * n2) + d * x_d
    row = tl.arange(0, ROWS)
    c, to_t = row % m2, row // m2
    there = (row < BLOCK_T * m2) & (first + to_t < tokens)
    same = (to_t[:, None] == from_t[None, :]) & there[:, None] & given[None, :]
    y_here = tl.zeros([ROWS, BLOCK_A], dtype=tl.float32)
    for r in range(TERMS):
        if DOT:
            p = tl.zeros([ROWS_IN, BLOCK_A], dtype=tl.float32)
        else:
            p = tl.zeros([ROWS_IN, BLOCK_A, BLOCK_B], dtype=tl.float32)
        for start in range(0, n1, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            within = (a < m1)[:, None] & (b < n1)[None, :]
            place = (r * m1 + a)[:, None].to(tl.int64) * n1 + b[None, :]
            tile = tl.load(weight + place, within, other=0.0)
            part = tl.load(
                x + x_row[:, None] + (b * x_b)[None, :],
                given[:, None] & (b < n1)[None, :],
                other=0.0,
            )
            if DOT:
                tile = tl.trans(tile.to(DOT_IN))
                p = tl.dot(part.to(DOT_IN), tile, p, input_precision="ieee")
            else:
                p += part.to(tl.float32)[:, None, :] * tile.to(tl.float32)[None, :, :]
        if not DOT:
            p = tl.sum(p, 2)
        place = (r * m2 + c)[:, None] * n2 + d[None, :]
        mixing = tl.load(small + place, same, other=0.0).to(tl.float32)
        if DOT:
            y_here = tl.dot(mixing, p, y_here, input_precision="ieee")
        else:
            y_here += tl.sum(mixing[:, :, None] * p[None, :, :], 1)
    if BIAS:
        place = (a * y_a)[None, :] + (c * y_c)[:, None]
        y_here += tl.load(bias + place, (a < m1)[None, :], other=0.0).to(tl.float32)
    t = (first + to_t).to(tl.int64)
    place = (t * (m1 * m2))[:, None] + (a * y_a)[None, :] + (c * y_c)[:, None]
    tl.store(y + place, y_here.to(y.dtype.element_ty), there[:, None] & (a < m1)[None, :])


def _dot_dtype(x: Tensor) -> Any:
    # The interpreter computes with numpy, which has no bfloat16.
    if INTERPRETED and x.dtype == torch.bfloat16:
        return tl.float32
    return getattr(tl, str(x.dtype).removeprefix("torch."))


def launch(
    x: Tensor, small: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, m1: int, n1: int,
    small_outer: bool, mix_first: bool,
) -> None:  # fmt: skip
    """Fill y (T, m) with x Wᵀ + bias, in one launch.

    Args:
        x: (T, n). small: (R, m2, n2). weight: as `kron.large_to_linear` lays it out. bias: (m,).
            All contiguous, of one dtype.
    """
    tokens, (terms, m2, n2) = len(x), small.shape
    block_t = max(1, min(tokens, MOST_ROWS // max(m2, n2)))
    rows, rows_in = (triton.next_power_of_2(block_t * side) for side in (m2, n2))
    dot = max(rows, 0 if mix_first else rows_in) > BY_ELEMENT
    sizes: dict[str, Any] = {"TERMS": terms, "BLOCK_T": block_t, "DOT": dot}
    if dot:
        rows, rows_in = max(rows, SMALLEST_DOT), max(rows_in, SMALLEST_DOT)
        sizes |= {"BLOCK_A": SMALLEST_DOT, "BLOCK_B": 64 if x.dtype == torch.float32 else 128}
    else:
        # Few rows a program: a matrix of a few hundred rows still fills a GPU with programs.
        wide = triton.next_power_of_2(n1)
        sizes |= {"BLOCK_A": 4, "BLOCK_B": min(max(wide, SMALLEST_DOT), 256)}
    if not mix_first:
        sizes["ROWS_IN"] = rows_in
    strides = (1, n1, 1, m1) if small_outer else (n2, 1, m2, 1)
    grid = (triton.cdiv(m1, sizes["BLOCK_A"]), triton.cdiv(tokens, block_t))
    kernel = _mix_first if mix_first else _mix_last
    kernel[grid](
        x, small, weight, x if bias is None else bias, y, tokens, m1, n1, m2, n2, *strides,
        ROWS=rows, DOT_IN=_dot_dtype(x), BIAS=bias is not None, **sizes,
    )  # fmt: skip
