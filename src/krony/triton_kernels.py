"""Triton kernels of factored matrices and MLPs on a GPU. Imported only where Triton is.

One launch takes tokens through one matrix, or through the two that write a gated hidden axis, and
all that is element by element around it:

    p[t,d,a] = Σ_b A[r,a,b] x[t,d,b]               the large product, for each slice d of the inputs
    h[t,c,a] = Σ_r Σ_d B[r,c,d] p[t,d,r,a] + bias  the small one, of its results
    h        = activation(h), times another h where there is a gate
    y[t,e,a] = Σ_c C[e,c] h[t,c,a]                 what the next matrix mixes before its own product

Each entry of A is read once for all tokens of a program, and nothing but y is written: an MLP is
two launches, and its hidden axis never reaches memory. Letters as in kron.py; t counts tokens, a
rows and b columns of A, c rows and d columns of B. Sums are in float32.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The smallest side of a tile that the matrix units take.
SMALLEST_DOT = 16
# Up to so many rows (tokens times slices), products and sums by element keep fewer lanes idle than
# a tile of the matrix units, most of whose rows would be padding.
BY_ELEMENT = 4
# Rows that one program of `_few` holds in registers.
MOST_ROWS = 64
# Slices that `_many` holds, each in a tile of its own.
MOST_SLICES = 4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _activation(h, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """As cpu_kernels numbers them. The GELU's (1 + tanh u) / 2 is the sigmoid of 2u."""
    if KIND == 1:
        h = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif KIND == 2:
        h = h * tl.sigmoid(h)
    return h


@triton.jit
def _mixed(  # type: ignore[no-untyped-def]
    mixing, p, out_t, out_slice, in_t, in_slice, slices_out, slices_in, DOT: tl.constexpr
):
    """Rows (t, d) of p [IN, BLOCK_A] to rows (t, c) by mixing (c, d): [OUT, BLOCK_A]."""
    same = (out_t[:, None] == in_t[None, :]) & (in_slice[None, :] < slices_in)
    place = out_slice[:, None] * slices_in + in_slice[None, :]
    matrix = tl.load(mixing + place, same, other=0.0).to(tl.float32)
    if DOT:
        return tl.dot(matrix, p, input_precision="ieee")
    return tl.sum(matrix[:, :, None] * p[None, :, :], 1)


@triton.jit
def _few_products(  # type: ignore[no-untyped-def]
    x, weight, small, bias, a, in_t, in_d, out_t, out_c, tokens, m1, n1, m2, n2, x_b, x_d, y_a, y_c,
    w_a, w_r, TERMS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, DOT: tl.constexpr, DOT_IN: tl.constexpr, MIXED: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """h of one matrix before the activation: rows (t, c), [OUT, BLOCK_A]."""
    given = in_t < tokens
    x_row = in_t.to(tl.int64) * (n1 * n2) + in_d * x_d
    h = tl.zeros([OUT, BLOCK_A], dtype=tl.float32)
    for r in range(TERMS):
        w_row = a.to(tl.int64) * w_a + r * w_r
        if DOT:
            p = tl.zeros([IN, BLOCK_A], dtype=tl.float32)
        else:
            p = tl.zeros([IN, BLOCK_A, BLOCK_B], dtype=tl.float32)
        for start in range(0, n1, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            within = (a < m1)[:, None] & (b < n1)[None, :]
            tile = tl.load(weight + w_row[:, None] + b[None, :], within, other=0.0)
            part = tl.load(
                x + x_row[:, None] + (b * x_b)[None, :],
                given[:, None] & (b < n1)[None, :],
                other=0.0,
            )
            if DOT:
                p = tl.dot(part.to(DOT_IN), tl.trans(tile.to(DOT_IN)), p, input_precision="ieee")
            else:
                p += part.to(tl.float32)[:, None, :] * tile.to(tl.float32)[None, :, :]
        if not DOT:
            p = tl.sum(p, 2)
        if MIXED:
            h += _mixed(small + r * m2 * n2, p, out_t, out_c, in_t, in_d, m2, n2, DOT)
        else:
            h += p
    if BIAS:
        offset = bias + (a * y_a)[None, :] + (out_c * y_c)[:, None]
        h += tl.load(offset, (a < m1)[None, :], other=0.0).to(tl.float32)
    return h


@triton.jit
def _few(  # type: ignore[no-untyped-def]
    x, weight, small, bias, weight_2, small_2, bias_2, inner, y,
    tokens, m1, n1, m2, n2, q, x_b, x_d, h_a, h_c, y_a, y_e, w_a, w_r,
    TERMS: tl.constexpr, BLOCK_T: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    LAST: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, DOT: tl.constexpr,
    DOT_IN: tl.constexpr, MIXED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    KIND: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Few tokens: all slices of a block of them are rows of one tile, and small factors are
    matrices with a block for each token."""
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    first = tl.program_id(1) * BLOCK_T
    source, row = tl.arange(0, IN), tl.arange(0, OUT)
    # Rows beyond the block's tokens belong to no token at all.
    in_d, in_t = source % n2, source // n2
    in_t = tl.where(in_t < BLOCK_T, first + in_t, tokens)
    out_c, out_t = row % m2, row // m2
    out_t = tl.where(out_t < BLOCK_T, first + out_t, tokens)
    h = _few_products(
        x, weight, small, bias, a, in_t, in_d, out_t, out_c, tokens, m1, n1, m2, n2, x_b, x_d, h_a,
        h_c, w_a, w_r, TERMS, IN, OUT, BLOCK_A, BLOCK_B, DOT, DOT_IN, MIXED, BIAS,
    )  # fmt: skip
    h = _activation(h, KIND)
    if GATED:
        h *= _few_products(
            x, weight_2, small_2, bias_2, a, in_t, in_d, out_t, out_c, tokens, m1, n1, m2, n2, x_b,
            x_d, h_a, h_c, w_a, w_r, TERMS, IN, OUT, BLOCK_A, BLOCK_B, DOT, DOT_IN, MIXED, BIAS,
        )  # fmt: skip
    if INNER:
        last = tl.arange(0, LAST)
        last_e, last_t = last % q, last // q
        last_t = tl.where(last_t < BLOCK_T, first + last_t, tokens)
        z = _mixed(inner, h, last_t, last_e, out_t, out_c, q, m2, DOT)
    else:
        last_e, last_t = out_c, out_t
        z = h
    place = (last_t.to(tl.int64) * (m1 * q))[:, None] + (a * y_a)[None, :] + (last_e * y_e)[:, None]
    tl.store(y + place, z.to(y.dtype.element_ty), (last_t < tokens)[:, None] & (a < m1)[None, :])


@triton.jit
def _many_products(  # type: ignore[no-untyped-def]
    x, weight, t, a, tokens, m1, n1, N2: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, DOT_IN: tl.constexpr,
):  # fmt: skip
    """p of each slice, [BLOCK_T, BLOCK_A]; those beyond N2 are zero."""
    p0 = tl.zeros([BLOCK_T, BLOCK_A], dtype=tl.float32)
    p1, p2, p3 = p0, p0, p0
    rows = x + (t.to(tl.int64) * (n1 * N2))[:, None]
    for start in range(0, n1, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        within = (a < m1)[None, :] & (b < n1)[:, None]
        given = (t < tokens)[:, None] & (b < n1)[None, :]
        place = weight + (a.to(tl.int64) * n1)[None, :] + b[:, None]
        tile = tl.load(place, within, other=0.0).to(DOT_IN)
        part = rows + b[None, :]
        p0 = tl.dot(tl.load(part, given, other=0.0).to(DOT_IN), tile, p0, input_precision="ieee")
        if N2 > 1:
            x1 = tl.load(part + n1, given, other=0.0).to(DOT_IN)
            p1 = tl.dot(x1, tile, p1, input_precision="ieee")
        if N2 > 2:
            x2 = tl.load(part + 2 * n1, given, other=0.0).to(DOT_IN)
            p2 = tl.dot(x2, tile, p2, input_precision="ieee")
        if N2 > 3:
            x3 = tl.load(part + 3 * n1, given, other=0.0).to(DOT_IN)
            p3 = tl.dot(x3, tile, p3, input_precision="ieee")
    return p0, p1, p2, p3


@triton.jit
def _combined(mixing, p0, p1, p2, p3, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ_d mixing[d] p_d."""
    h = tl.load(mixing).to(tl.float32) * p0
    if N > 1:
        h += tl.load(mixing + 1).to(tl.float32) * p1
    if N > 2:
        h += tl.load(mixing + 2).to(tl.float32) * p2
    if N > 3:
        h += tl.load(mixing + 3).to(tl.float32) * p3
    return h


@triton.jit
def _many(  # type: ignore[no-untyped-def]
    x, weight, small, bias, weight_2, small_2, bias_2, inner, y, tokens, m1, n1,
    N2: tl.constexpr, M2: tl.constexpr, Q: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, DOT_IN: tl.constexpr, MIXED: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Many tokens, one term, slices that lie apart: each slice is a tile of its own."""
    # Programs that share inputs or weights run side by side, and find them in the cache.
    across, down = tl.cdiv(m1, BLOCK_A), tl.cdiv(tokens, BLOCK_T)
    number = tl.program_id(0)
    group = number // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    t = (group * 8 + number % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    a = (number % (8 * across)) // height * BLOCK_A + tl.arange(0, BLOCK_A)
    p0, p1, p2, p3 = _many_products(
        x, weight, t, a, tokens, m1, n1, N2, BLOCK_T, BLOCK_A, BLOCK_B, DOT_IN
    )
    g0, g1, g2, g3 = p0, p1, p2, p3
    if GATED:
        g0, g1, g2, g3 = _many_products(
            x, weight_2, t, a, tokens, m1, n1, N2, BLOCK_T, BLOCK_A, BLOCK_B, DOT_IN
        )
    here = (t < tokens)[:, None] & (a < m1)[None, :]
    places = y + (t.to(tl.int64) * (m1 * Q))[:, None] + a[None, :]
    z0 = tl.zeros([BLOCK_T, BLOCK_A], dtype=tl.float32)
    z1, z2, z3 = z0, z0, z0
    for c in tl.static_range(M2):
        if MIXED:
            h = _combined(small + c * N2, p0, p1, p2, p3, N2)
        elif c == 0:
            h = p0
        elif c == 1:
            h = p1
        elif c == 2:
            h = p2
        else:
            h = p3
        if BIAS:
            h += tl.load(bias + c * m1 + a, a < m1, other=0.0).to(tl.float32)[None, :]
        h = _activation(h, KIND)
        if GATED:
            if MIXED:
                g = _combined(small_2 + c * N2, g0, g1, g2, g3, N2)
            elif c == 0:
                g = g0
            elif c == 1:
                g = g1
            elif c == 2:
                g = g2
            else:
                g = g3
            if BIAS:
                g += tl.load(bias_2 + c * m1 + a, a < m1, other=0.0).to(tl.float32)[None, :]
            h *= g
        if INNER:
            z0 += tl.load(inner + c).to(tl.float32) * h
            if Q > 1:
                z1 += tl.load(inner + M2 + c).to(tl.float32) * h
            if Q > 2:
                z2 += tl.load(inner + 2 * M2 + c).to(tl.float32) * h
            if Q > 3:
                z3 += tl.load(inner + 3 * M2 + c).to(tl.float32) * h
        else:
            tl.store(places + c * m1, h.to(y.dtype.element_ty), here)
    if INNER:
        tl.store(places, z0.to(y.dtype.element_ty), here)
        if Q > 1:
            tl.store(places + m1, z1.to(y.dtype.element_ty), here)
        if Q > 2:
            tl.store(places + 2 * m1, z2.to(y.dtype.element_ty), here)
        if Q > 3:
            tl.store(places + 3 * m1, z3.to(y.dtype.element_ty), here)


@dataclass(frozen=True)
class Step:
    """What one launch does: the formulas above.

    Attributes:
        weights: A, as `kron.large_to_linear` lays it out, of one matrix, or of the gate and the
            other. smalls: B (R, m2, n2) of each, or none: its one term's slices are not mixed.
            biases: (m,) of each, or none.
        sides: (m1, n1, m2, n2) of the matrices. Unmixed, m2 = n2.
        small_outer, mix_first: `KroneckerGroup`'s.
        kind: of the activation, as cpu_kernels numbers them.
        inner: C (q, m2), or None.
    """

    weights: tuple[Tensor, ...]
    smalls: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    sides: tuple[int, int, int, int]
    small_outer: bool = True
    mix_first: bool = True
    kind: int = 0
    inner: Tensor | None = None

    @property
    def terms(self) -> int:
        """R."""
        return len(self.smalls[0]) if self.smalls else 1

    @property
    def slices(self) -> int:
        """q, of the outputs."""
        return self.sides[2] if self.inner is None else len(self.inner)

    @property
    def outputs(self) -> int:
        """q·m1, of a token."""
        return self.slices * self.sides[0]


def takes_many(step: Step) -> bool:
    """Whether `_many` knows a step: one term, few slices, which lie apart."""
    _, _, m2, n2 = step.sides
    most = max(m2, n2 * len(step.weights), step.slices)
    return most <= MOST_SLICES and step.terms == 1 and (step.small_outer or m2 == n2 == 1)


def _dot_dtype(x: Tensor) -> Any:
    # The interpreter computes with numpy, which has no bfloat16.
    if INTERPRETED and x.dtype == torch.bfloat16:
        return tl.float32
    return getattr(tl, str(x.dtype).removeprefix("torch."))


def launch(x: Tensor, step: Step, y: Tensor, many: bool = False, **sizes: int) -> None:
    """Fill y (T, q·m1) with what a step makes of x (T, n), in one launch.

    Args:
        x, y, and the step's tensors: contiguous, of one dtype.
        many: by `_many`, which `takes_many` says it knows.
        sizes: of blocks, `num_warps` and `num_stages`, instead of those chosen here.
    """
    weight, *second = step.weights
    smalls, biases = step.smalls or (x,) * 2, step.biases or (x,) * 2
    inner = x if step.inner is None else step.inner
    tensors = (
        x, weight, smalls[0], biases[0], second[0] if second else x, smalls[-1], biases[-1], inner,
        y,
    )  # fmt: skip
    flags = {
        "DOT_IN": _dot_dtype(x),
        "MIXED": bool(step.smalls),
        "BIAS": bool(step.biases),
        "GATED": bool(second),
        "KIND": step.kind,
        "INNER": step.inner is not None,
    }
    tokens, (m1, n1, m2, n2), q = len(x), step.sides, step.slices
    if many:
        sizes = _sizes_of_many(tokens, step, x) | sizes
        programs = triton.cdiv(m1, sizes["BLOCK_A"]) * triton.cdiv(tokens, sizes["BLOCK_T"])
        _many[programs,](*tensors, tokens, m1, n1, N2=n2, M2=m2, Q=q, **flags, **sizes)
        return
    sizes = _sizes_of_few(tokens, step, x) | sizes
    grid = (triton.cdiv(m1, sizes["BLOCK_A"]), triton.cdiv(tokens, sizes["BLOCK_T"]))
    strides = (1, n1, 1, m1, 1, m1) if step.small_outer else (n2, 1, m2, 1, q, 1)
    terms = step.terms
    of_weight = (terms * n1, n1) if step.mix_first else (n1, m1 * n1)
    _few[grid](
        *tensors, tokens, m1, n1, m2, n2, q, *strides, *of_weight, TERMS=terms, **flags, **sizes
    )


def _sizes_of_few(tokens: int, step: Step, x: Tensor) -> dict[str, Any]:
    _, n1, m2, n2 = step.sides
    block_t = max(1, min(tokens, MOST_ROWS // max(m2, n2, step.slices)))
    rows = [triton.next_power_of_2(block_t * side) for side in (n2, m2, step.slices)]
    dot = max(rows) > BY_ELEMENT
    sizes: dict[str, Any] = {"BLOCK_T": block_t, "DOT": dot}
    if dot:
        rows = [max(r, SMALLEST_DOT) for r in rows]
        sizes |= {"BLOCK_A": SMALLEST_DOT, "BLOCK_B": 64 if x.dtype == torch.float32 else 128}
    else:
        # Few rows a program: a matrix of a few hundred rows still fills a GPU with programs.
        wide = triton.next_power_of_2(n1)
        sizes |= {"BLOCK_A": 2, "BLOCK_B": min(max(wide, SMALLEST_DOT), 512), "num_warps": 1}
    return sizes | dict(zip(("IN", "OUT", "LAST"), rows, strict=True))


def _sizes_of_many(tokens: int, step: Step, x: Tensor) -> dict[str, Any]:
    return {"BLOCK_T": 64, "BLOCK_A": 64, "BLOCK_B": 64, "num_warps": 4, "num_stages": 4}
