"""Products of many tokens with W = Σ_r B_r ⊗ A_r (or Σ_r A_r ⊗ B_r), W not formed.

Pure functions of tensors, with the letters and layouts of kron.py; what is element by element goes
through hidden.c where that helps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from krony.maths.shapes import Layout, Shape
from krony.nn.cpu import kernels as cpu_kernels
from krony.runtime import products as plain
from krony.runtime.layers import is_exporting
from krony.runtime.products import add as add
from krony.runtime.products import from_slices as from_slices
from krony.runtime.products import mixing as mixing
from krony.runtime.products import to_slices as to_slices

# Up to so many rows, a matrix product of a CPU gains from the weight as its left operand.
FEW_ROWS = 32
# Up to so many entries of a small factor, a GPU takes products with it by element.
FEW_ENTRIES = 16


def apply(
    x: Tensor,
    small: Tensor,
    large: Tensor | Callable[[Tensor], Tensor],
    large_shape: Shape,
    layout: Layout = "small-outer",
    mix_first: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """`runtime.products.apply` by the cheapest calls, and with less to keep for the backward pass.

    Args:
        large: the linear map of A, or its weight.
    """
    shapes = large_shape, layout, mix_first
    if not isinstance(large, Tensor):
        return plain.apply(x, small, large, *shapes, bias, mix)
    weight = large
    if not mix_first:
        return plain.apply(x, small, lambda rows: project(rows, weight), *shapes, bias, mix)
    (m1, n1), (_, m2, n2) = large_shape, small.shape
    inside, offset = None, None if bias is None else to_slices(bias, (m2, m1), layout)
    if bias is not None and m2 == 1:  # BLAS adds it as it goes
        inside, offset = bias.to(x.dtype), None
    slices = to_slices(x, (-1, n2, n1), layout)
    y = _mixed(slices, mixing(small, mix_first), weight, inside).reshape(-1, m2, m1)
    if offset is not None:
        y = add(y, offset)
    return from_slices(y, x.shape[:-1], layout)


def mix(mixing: Tensor, x: Tensor, bias: Tensor | None = None, apart: bool = False) -> Tensor:
    """mixing (p, q) times x (T, q, k), plus a bias (p, k), by the cheapest call for that.

    Args:
        apart: each of the p slices is wanted in one piece of memory; a wish.
    Returns:
        (T, p, k).
    """
    if (found := cpu_kernels.mix(mixing, x, bias, apart)) is not None:
        return found
    _, q, k = x.shape
    if q > 1 and k > 1 and by_all_tokens(x):
        y = mix_all(mixing.to(x.dtype), x)
        return y if bias is None else add(y, bias)
    return plain.mix(mixing, x, bias)


def by_all_tokens(x: Tensor) -> bool:
    """Whether x (T, q, k) is mixed by `mix_all`: many tokens on a GPU.

    A tiny product for every token keeps a GPU waiting: 1,024 of them took an H200 30 µs, several
    times as long as the dense matrix. A CPU works through them one after the other anyway.
    """
    return x.is_cuda and len(x) > FEW_ROWS


def mix_all(mixing: Tensor, x: Tensor) -> Tensor:
    """`mix` with work that all tokens share: sums of whole slices where there are few, else one
    product. In the dtype of x, which `mixing` must have too."""
    y: Tensor = cast(Any, _MixAll).apply(mixing, x)
    return y


def mixing_gradient(of_mixed: Tensor, x: Tensor) -> Tensor:
    """Of mixing (p, q), from the gradient of `mix`'s results (T, p, k) and its x (T, q, k)."""
    if not by_all_tokens(x):
        return torch.bmm(of_mixed, x.mT).sum(0)
    return _of_mixing(of_mixed, x)


def _of_mixing(of_mixed: Tensor, x: Tensor) -> Tensor:
    if of_mixed.shape[1] * x.shape[1] <= FEW_ENTRIES:
        return (of_mixed[:, :, None] * x[:, None]).sum((0, 3))
    return torch.einsum("tpk,tqk->pq", of_mixed, x)


class _MixAll(torch.autograd.Function):
    """`mix_all`; autograd's own way back would write a tensor of x's size for every slice."""

    @staticmethod
    def forward(ctx: Any, mixing: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(mixing, x)
        p, q = mixing.shape
        if p * q > FEW_ENTRIES:
            return torch.einsum("pq,tqk->tpk", mixing, x)
        y = mixing[:, :1] * x[:, :1]
        for j in range(1, q):
            y.addcmul_(mixing[:, j : j + 1], x[:, j : j + 1])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mixing, x = ctx.saved_tensors
        for_mixing, for_x = ctx.needs_input_grad
        of_mixing = _of_mixing(gradients[0], x) if for_mixing else None
        of_x = mix_all(mixing.T, gradients[0]) if for_x else None
        return of_mixing, of_x


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, (T, n) by (m, n) and (m,), the operands in the order that a CPU reads fastest.

    BLAS shares a product among threads by rows of its left operand, and with a few tokens these are
    too few: the weight goes to the left then, for up to 2.5 times the speed (docs/log.md). Three
    rows take longer than four.
    """
    tokens = len(x)
    few = x.device.type == "cpu" and x.dtype == torch.float32 and 2 <= tokens <= FEW_ROWS
    if not few or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if tokens == 3:
        x = F.pad(x, (0, 0, 0, 1))
    tall = len(weight) >= weight.shape[1]
    if len(x) == 4 or (len(x) == 2 and tall) or torch.get_num_threads() > 1:
        y = torch.mm(weight, x.T).T[:tokens]
        return y if bias is None else add(y, bias)
    return F.linear(x, weight, bias)


def _mixed(x: Tensor, mixing: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The slices x (T, q, k), mixed by (p, q), through the weight (m1, R·k): (T·p / R, m1), plus a
    bias (m1,).

    In training, the mixed slices, as many as the inputs or more, are made again in the backward
    pass instead of being kept: a factored layer then keeps no more than a dense one does.
    """
    kept = not torch.is_grad_enabled() or is_exporting()
    if kept or x.shape[-1] == 1:
        return project(mix(mixing, x).reshape(-1, weight.shape[1]), weight, bias)
    if torch.is_autocast_enabled(x.device.type):  # the backward pass runs without it
        dtype = torch.get_autocast_dtype(x.device.type)
        x, mixing, weight = x.to(dtype), mixing.to(dtype), weight.to(dtype)
    y: Tensor = cast(Any, _Mixed).apply(x, mixing, weight)
    return y if bias is None else add(y, bias)


class _Mixed(torch.autograd.Function):
    """`_mixed` with a backward pass that mixes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mixing: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, mixing, weight)
        return project(mix(mixing, x).reshape(-1, weight.shape[1]), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mixing, weight = ctx.saved_tensors
        (gradient,) = gradients
        for_x, for_mixing, for_weight = ctx.needs_input_grad
        tokens, _, k = x.shape
        of_weight = of_mixing = of_x = None
        if for_weight:
            of_weight = gradient.T @ mix(mixing, x).reshape(-1, weight.shape[1])
        if for_x or for_mixing:
            of_rows = (gradient @ weight).reshape(tokens, -1, k)
            if for_mixing:
                of_mixing = mixing_gradient(of_rows, x)
            if for_x:
                of_x = mix(mixing.T, of_rows)
        return of_x, of_mixing, of_weight


@dataclass(frozen=True)
class Route:
    """How a matrix is applied to many tokens: its inputs' slices mixed, or not; products with the
    large factor; the results' slices mixed, or not.

    Attributes:
        shape: (m2, m1, n2, n1), of the slices of outputs and inputs.
        weight: (m1, terms·n1) or (terms·m1, n1) as a layer has it; with `apart` (K, n1, m1), each
            for a slice of its own.
        inner: (p, n2), outer: (m2, q), or None.
    """

    shape: tuple[int, int, int, int]
    layout: Layout
    weight: Tensor
    inner: Tensor | None = None
    outer: Tensor | None = None
    apart: bool = False

    def enter(self, x: Tensor) -> Tensor:
        """(T, n) to the slices (T, p, n1) that meet the large factor."""
        _, _, n2, n1 = self.shape
        x = to_slices(x, (-1, n2, n1), self.layout)
        return x if self.inner is None else mix(self.inner, x, apart=self.apart)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Slices (T, p, n1) to (T, q, m1); a bias (m1,) is that of each of them."""
        if self.apart:
            return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)
        rows = project(x.reshape(-1, self.weight.shape[1]), self.weight, bias)
        return rows.reshape(len(x), -1, self.shape[1])

    def leave(self, x: Tensor, bias: Tensor | None, lead: torch.Size) -> Tensor:
        """Slices (T, p, n1) to the outputs (*lead, m)."""
        slices = self.slices_of(bias)
        if self.outer is not None:
            y = mix(self.outer, self.product(x), slices)
        elif self.shape[0] == 1:  # BLAS adds it as it goes
            y = self.product(x, bias)
        else:
            y = self.product(x) if slices is None else add(self.product(x), slices)
        return from_slices(y, lead, self.layout)

    def slices_of(self, bias: Tensor | None) -> Tensor | None:
        """A bias (m,) by slices of the outputs: (m2, m1)."""
        m2, m1, _, _ = self.shape
        return None if bias is None else to_slices(bias, (m2, m1), self.layout)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., n) through all of it: (..., m)."""
        return self.leave(self.enter(x.reshape(-1, x.shape[-1])), bias, x.shape[:-1])
