"""Products with sums of Kronecker products, in plain torch: pure functions of tensors.

A part of krony (Apache-2.0) that needs torch alone. Directories that load without krony hold a copy
of it.

W (m, n) maps n inputs to m outputs, y = x Wᵀ. Its large factors are A_r (m1, n1), the small ones
B_r (m2, n2), with m = m1·m2 and n = n1·n2; there are R terms, and T tokens. The layouts are
"small-outer", W = Σ_r B_r ⊗ A_r, and "large-outer", W = Σ_r A_r ⊗ B_r.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Layout = Literal["small-outer", "large-outer"]
Shape = tuple[int, int]
Side = TypeVar("Side")  # a factor, or its shape
Mix = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Multiply-adds that a CPU could do in the time in which one entry of W is written, put in its place
# and read again: some 40 to 85 in float32, and more in bfloat16, by the CPU.
FORMING = 80


def in_order(first: Side, second: Side, layout: Layout) -> tuple[Side, Side]:
    """(large, small) as (outer, inner) in that layout, and (outer, inner) as (large, small)."""
    return (second, first) if layout == "small-outer" else (first, second)


def to_dense(outer: Tensor, inner: Tensor) -> Tensor:
    """Σ_r outer_r ⊗ inner_r, from (R, m1, n1) and (R, m2, n2) to (m1·m2, n1·n2)."""
    rows, columns = outer.shape[1] * inner.shape[1], outer.shape[2] * inner.shape[2]
    # One matrix product of the rearranged factors, (m1·n1, R) by (R, m2·n2), then the way back.
    product = outer.flatten(1).T @ inner.flatten(1)
    blocks = product.reshape(*outer.shape[1:], *inner.shape[1:])
    return blocks.permute(0, 2, 1, 3).reshape(rows, columns)


def fill(free: Tensor, order: Tensor) -> Tensor:
    """Small factors (R, q) of the interpolative form: the columns of [I, free] in their order.

    Args:
        free: (R, q - R). order: (q,), entry j is column order[j].
    """
    unit = torch.eye(len(free), dtype=free.dtype, device=free.device)
    return torch.cat([unit, free], 1).index_select(1, order)


def multiply_adds(large: Shape, small: Shape, terms: int, mix_first: bool) -> int:
    """Multiply-adds per token of the factored product in one of its two orders."""
    (m1, n1), (m2, n2) = large, small
    if mix_first:
        return terms * m2 * n1 * (n2 + m1)
    return terms * n2 * m1 * (n1 + m2)


def mixes_first(large: Shape, small: Shape) -> bool:
    """Whether mixing with the small factor before the large product takes fewer operations."""
    return multiply_adds(large, small, 1, True) <= multiply_adds(large, small, 1, False)


def dense_from(large: Shape, small: Shape, terms: int, mix_first: bool) -> float:
    """The number of tokens from which forming W, once, costs less than the factors; perhaps ∞.

    W costs R·m·n multiply-adds, the time of `FORMING`·m·n more for its bytes, then m·n a token; the
    factors cost `multiply_adds` a token.
    """
    entries = large[0] * large[1] * small[0] * small[1]
    saved = multiply_adds(large, small, terms, mix_first) - entries
    return (terms + FORMING) * entries / saved if saved > 0 else math.inf


def linear_to_large(weight: Tensor, terms: int, mix_first: bool) -> Tensor:
    """The weight of one linear map, (m1, R·n1), or (R·m1, n1) if mixed last, as A (R, m1, n1)."""
    split: Tensor = weight.unflatten(1 if mix_first else 0, (terms, -1))
    return split.transpose(0, 1) if mix_first else split


def to_slices(x: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """An axis of q·k numbers as q slices, a side of the small factor, of k, one of the large.

    Args:
        x: (..., q·k). shape: (..., q, k), of the result.
    """
    *lead, q, k = shape
    if layout == "small-outer":
        return x.reshape(shape)
    return x.reshape(*lead, k, q).transpose(-1, -2)


def from_slices(y: Tensor, lead: tuple[int, ...], layout: Layout) -> Tensor:
    """The inverse of `to_slices` for y (T, q, k): (*lead, q·k)."""
    _, q, k = y.shape
    if layout == "large-outer":
        y = y.transpose(-1, -2)
    return y.reshape(*lead, q * k)


def mixing(small: Tensor, mix_first: bool) -> Tensor:
    """B (R, m2, n2) as one matrix, for `mix`: (m2·R, n2) before the large product, else (m2, n2·R)
    after it."""
    if len(small) == 1:
        return small[0]
    return (small.transpose(0, 1).flatten(0, 1)) if mix_first else small.permute(1, 2, 0).flatten(1)


def add(y: Tensor, bias: Tensor) -> Tensor:
    """y + bias, in y's own memory where no gradient is wanted: fresh pages cost more than sums.

    In y's dtype: autocast leaves sums alone, and float32 would spread from here.
    """
    bias = bias.to(y.dtype)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return y + bias
    return y.add_(bias)


def mix(mixing: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """mixing (p, q) times x (T, q, k), plus a bias (p, k): (T, p, k)."""
    tokens, q, k = x.shape
    if k == 1:  # the low-rank corner: an ordinary linear map
        offset = None if bias is None else bias.squeeze(-1)
        return F.linear(x.squeeze(-1), mixing, offset).unsqueeze(-1)
    if q == 1:  # in the dtype of x, see `add`
        mixing = mixing.to(x.dtype)
        return mixing * x if bias is None else torch.addcmul(bias.to(x.dtype), mixing, x)
    # torch.matmul, which would do for all, spends several times as long on finding the call.
    many = mixing.expand(tokens, -1, -1)
    return torch.bmm(many, x) if bias is None else torch.baddbmm(bias, many, x)


def apply(
    x: Tensor,
    small: Tensor,
    large: Callable[[Tensor], Tensor],
    large_shape: Shape,
    layout: Layout = "small-outer",
    mix_first: bool = True,
    bias: Tensor | None = None,
    mix: Mix = mix,
) -> Tensor:
    """y = x Wᵀ + bias for W = Σ_r B_r ⊗ A_r (or Σ_r A_r ⊗ B_r), without forming W.

    Two matrix products: a large one, and a small one that mixes n2 (or m2·R) slices of the
    activations, before it or after it.

    Args:
        x: (..., n). small: B, (R, m2, n2). bias: (m,).
        large: the linear map of A, as `linear_to_large` reads it: (T, R·n1) to (T, m1) when mixed
            first, else (T, n1) to (T, R·m1).
        mix: what is to be used in the place of `mix`.
    Returns:
        (..., m).
    """
    (m1, n1), (terms, m2, n2) = large_shape, small.shape
    lead, matrix = x.shape[:-1], mixing(small, mix_first)
    x = to_slices(x, (-1, n2, n1), layout)
    offset = None if bias is None else to_slices(bias, (m2, m1), layout)
    if mix_first:
        y = large(mix(matrix, x, None).reshape(-1, terms * n1)).reshape(-1, m2, m1)
        y = y if offset is None else add(y, offset)
    else:
        rows = large(x.reshape(-1, n1))
        y = mix(matrix, rows.reshape(-1, n2 * terms, m1), offset)
    return from_slices(y, lead, layout)


def rows(ids: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Rows of W = Σ_r outer_r ⊗ inner_r: an embedding's lookup.

    Row c·m_inner + a of a Kronecker product is outer's row c ⊗ inner's row a.

    Args:
        ids: (...), row numbers from 0 to m - 1. outer, inner: (R, ·, ·) each.
    Returns:
        (..., n).
    """
    left = _pick(outer, ids // inner.shape[1])
    right = _pick(inner, ids % inner.shape[1])
    return torch.einsum("...rd,...rb->...db", left, right).flatten(-2).reshape(*ids.shape, -1)


def _pick(factors: Tensor, ids: Tensor) -> Tensor:
    """Row `ids` of every term: (..., R, n); a single row is not repeated: (R, n)."""
    if factors.shape[1] == 1:
        return factors[:, 0]
    table = factors.transpose(0, 1).flatten(1)
    picked: Tensor = F.embedding(ids, table).unflatten(-1, (len(factors), -1))
    return picked
