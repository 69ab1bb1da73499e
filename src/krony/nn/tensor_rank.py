"""Fewer large products for sums of terms with a tiny small factor, for many tokens on a CPU.

R small factors B_r (m2, n2) are a tensor of three axes. Written as K products of vectors,

    B_r = Σ_k c_rk u_k v_kᵀ     gives     Σ_r B_r ⊗ A_r = Σ_k u_k v_kᵀ ⊗ (Σ_r c_rk A_r),

so that K products with matrices of A's size do, where the sum takes R·n2 or R·m2 of them and the
dense matrix m2·n2: as in fast matrix multiplication (Strassen 1969). Four terms with 3 x 3 small
factors take five instead of twelve, and nine when dense.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krony.maths.shapes import Layout, Shape
from krony.nn.products import Route, mix

SEEDS, ITERATIONS, PATIENCE = 8, 100, 20
EXACT = 1e-9  # relative error, float64
# Norm of the terms over that of their sum: what rounding is magnified by.
MOST_CANCELLATION = 3.0


@dataclass(frozen=True)
class Decomposition:
    """B_r = Σ_k c_rk u_k v_kᵀ, with ‖u_k‖ = ‖v_k‖ = 1: c (R, K), u (m2, K), v (n2, K)."""

    c: Tensor
    u: Tensor
    v: Tensor

    @property
    def products(self) -> int:
        """K."""
        return self.c.shape[1]

    def to(self, dtype: torch.dtype) -> "Decomposition":
        """The same in another precision."""
        return Decomposition(self.c.to(dtype), self.u.to(dtype), self.v.to(dtype))


def decompose(small: Tensor) -> Decomposition | None:
    """The fewest products of vectors found for B (R, m2, n2), float64, or None if none save work.

    None as well where B is zero or not finite, and where the terms would cancel each other: more
    than rounding would be left of them.
    """
    small = small.detach().double()
    size = float(small.norm())
    if not 0 < size < float("inf"):
        return None
    terms, m2, n2 = small.shape
    # At least as many as any flattening has rank, and as numbers to choose as numbers to meet.
    numbers = -(-terms * m2 * n2 // (terms + m2 + n2 - 2))
    least = max(m2, n2, min(terms, m2 * n2), numbers)
    for products in range(least, m2 * n2):
        found = _fit(small / size, products)
        if found is not None:
            return Decomposition(found.c * size, found.u, found.v)
    return None


def _fit(small: Tensor, products: int) -> Decomposition | None:
    """Levenberg-Marquardt from several starts at once, all factors together."""
    terms, m2, n2 = small.shape
    sides, wanted = (terms, m2, n2), small.flatten()
    generator = torch.Generator().manual_seed(0)
    where: dict[str, Any] = {"dtype": torch.float64, "generator": generator}
    point = torch.randn(SEEDS, sum(sides) * products, **where) * products ** (-1 / 6)
    damping = torch.full((SEEDS,), 0.1, dtype=torch.float64)
    units = [torch.eye(side, dtype=torch.float64) for side in sides]

    def split(x: Tensor) -> list[Tensor]:
        parts = x.split([side * products for side in sides], 1)
        return [p.unflatten(1, (side, products)) for p, side in zip(parts, sides, strict=True)]

    def miss(x: Tensor) -> Tensor:
        made = torch.einsum("srk,smk,snk->srmn", *split(x))
        return made.flatten(1) - wanted

    def slope(x: Tensor) -> Tensor:
        c, u, v = split(x)
        parts = (
            torch.einsum("ra,smk,snk->srmnak", units[0], u, v),
            torch.einsum("ma,srk,snk->srmnak", units[1], c, v),
            torch.einsum("na,srk,smk->srmnak", units[2], c, u),
        )
        return torch.cat([p.flatten(4).flatten(1, 3) for p in parts], -1)

    error, history = miss(point), []
    for _ in range(ITERATIONS):
        best = error.norm(dim=1)
        history.append(float(best.min()))
        stuck = len(history) > PATIENCE and history[-1] > 0.7 * history[-1 - PATIENCE]
        if history[-1] < EXACT / 10 or stuck:
            break
        jacobian = slope(point)
        # A little decay, less the closer, keeps terms from growing against each other.
        decay = 1e-2 * best.square()[:, None]
        downhill = (jacobian.mT @ error[..., None]).squeeze(-1) + decay * point
        normal = jacobian.mT @ jacobian
        normal.diagonal(dim1=1, dim2=2).add_(damping[:, None] + decay)
        moved = point - torch.linalg.solve(normal, downhill[..., None]).squeeze(-1)
        there = miss(moved)
        # Decay alone may raise the error a little.
        better = there.norm(dim=1) < best * (1 + 1e-3)
        point = torch.where(better[:, None], moved, point)
        error = torch.where(better[:, None], there, error)
        damping = torch.where(better, damping / 4, damping * 6).clamp(1e-15, 1e6)
    c, u, v = split(point)
    lengths = [part.norm(dim=1, keepdim=True) for part in (u, v)]
    c = c * lengths[0] * lengths[1]
    cancelled = c.flatten(1).norm(dim=1)  # over the norm of the sum, which is 1
    good = (error.norm(dim=1) < EXACT) & (cancelled < MOST_CANCELLATION)
    if not bool(good.any()):
        return None
    best_start = int(torch.where(good, cancelled, torch.inf).argmin())
    return Decomposition(c[best_start], (u / lengths[0])[best_start], (v / lengths[1])[best_start])


def summed(found: Decomposition, weight: Tensor, large_shape: Shape, mix_first: bool) -> Tensor:
    """Σ_r c_rk A_r, transposed: (K, n1, m1), of A as `kron.large_to_linear` lays it out."""
    (m1, n1), (terms, products) = large_shape, found.c.shape
    if mix_first:  # (m1, R·n1)
        return mix(found.c.T, weight.unflatten(1, (terms, n1)), apart=True).permute(1, 2, 0)
    if weight.element_size() == 2:  # (R·m1, n1)
        apart = weight.view(terms, m1, n1).transpose(0, 1)
        return mix(found.c.T, apart, apart=True).permute(1, 2, 0)
    return (found.c.T @ weight.view(terms, -1)).view(products, m1, n1).mT


def route(
    found: Decomposition,
    weight: Tensor,
    large_shape: Shape,
    layout: Layout = "small-outer",
    mix_first: bool = True,
) -> Route:
    """The way through K large products, for a weight as `kron.large_to_linear` lays it out."""
    (m1, n1), shape = large_shape, (len(found.u), len(found.v))
    summed_up = summed(found, weight, large_shape, mix_first)
    return Route((shape[0], m1, shape[1], n1), layout, summed_up, found.v.T, found.u, apart=True)
