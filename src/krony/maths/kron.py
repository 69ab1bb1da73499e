"""Kronecker mathematics: pure functions of tensors, no modules and no files.

Letters used throughout the package:
    W (m, n)        a weight that maps n inputs to m outputs: y = x Wᵀ
    A_r (m1, n1)    the large factor of term r
    B_r (m2, n2)    the small factor of term r; m = m1·m2, n = n1·n2
    R               the number of terms
    T               the number of tokens (any leading dimensions of x)

A Kronecker product has an outer and an inner factor: (outer ⊗ inner)[(a, c), (b, d)] =
outer[a, b]·inner[c, d]. Two layouts are in use:
    "small-outer"   W = Σ_r B_r ⊗ A_r    no transposition anywhere in the forward
    "large-outer"   W = Σ_r A_r ⊗ B_r    the order of the Krony-PT paper
They differ by a fixed reordering of rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from krony.errors import KronyError
from krony.maths.shapes import LAYOUTS as LAYOUTS
from krony.maths.shapes import Layout as Layout
from krony.maths.shapes import Shape as Shape
from krony.maths.shapes import check_terms
from krony.runtime.products import in_order as in_order
from krony.runtime.products import to_dense as to_dense

# Up to this side the eigenvectors of the small Gram matrix are exact and take seconds; beyond it
# (both factors large, in matrices far larger than GPT-2's) a seeded randomised SVD is used.
EXACT_GRAM_SIDE = 2048


def rearrange(weight: Tensor, outer: Shape, inner: Shape) -> Tensor:
    """Van Loan and Pitsianis' rearrangement: a Kronecker product becomes an outer product.

    Args:
        weight: (m, n) with m = outer[0]·inner[0] and n = outer[1]·inner[1].
    Returns:
        (outer[0]·outer[1], inner[0]·inner[1]): `rearrange(A ⊗ B) == vec(A) vec(B)ᵀ`.
    Raises:
        KronyError: the shapes do not multiply to the shape of `weight`.
    Source: Van Loan and Pitsianis 1993; Krony-PT (arXiv 2412.12351), section III-D.
    """
    if tuple(weight.shape) != (outer[0] * inner[0], outer[1] * inner[1]):
        raise KronyError(
            f"a {outer[0]}x{outer[1]} factor and a {inner[0]}x{inner[1]} factor make a "
            f"{outer[0] * inner[0]}x{outer[1] * inner[1]} matrix, not {weight.shape[0]}x"
            f"{weight.shape[1]}; choose factors that divide both sides"
        )
    blocks = weight.reshape(outer[0], inner[0], outer[1], inner[1]).permute(0, 2, 1, 3)
    return blocks.reshape(outer[0] * outer[1], inner[0] * inner[1])


def sum_to_dense(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of several groups, (outer, inner) each, as one matrix."""
    total = to_dense(*pairs[0])
    for pair in pairs[1:]:
        total = total + to_dense(*pair)
    return total


def van_loan(
    weight: Tensor, outer: Shape, inner: Shape, terms: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The sum of `terms` Kronecker products nearest to `weight` in the Frobenius norm.

    Exact, from the eigenvectors of the smaller Gram matrix of the rearranged weight, in float64.
    Each singular value is split evenly between its two factors, and the sign is fixed (the entry
    of largest modulus of the smaller factor is positive), so equal input gives equal output.

    Args:
        weight: (m, n), converted to float64.
        seed: used only when both factors have more than `EXACT_GRAM_SIDE` entries.
    Returns:
        outer (R, *outer) and inner (R, *inner), float64, the largest term first.
    Raises:
        KronyError: shapes that do not divide `weight`, or more terms than the rank allows.
    Source: Krony-PT, section III-D and III-E.
    """
    matrix = rearrange(weight.double(), outer, inner)
    limit = min(matrix.shape)
    check_terms(terms, outer, inner)
    inner_is_smaller = matrix.shape[1] <= matrix.shape[0]
    tall = matrix if inner_is_smaller else matrix.T
    if limit <= EXACT_GRAM_SIDE:
        vectors = torch.linalg.eigh(tall.T @ tall).eigenvectors.flip(1)[:, :terms]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            q = min(limit, terms + 16)
            vectors = torch.svd_lowrank(tall, q=q, niter=10)[2][:, :terms]
    pivot = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(pivot < 0, -1.0, 1.0)
    # Projection instead of the Gram matrix's eigenvalues: those lose half of the digits.
    projected = tall @ vectors
    sigma = projected.norm(dim=0)
    root = sigma.sqrt()
    # A term without weight keeps a unit small factor and a zero large one: were both zero, no
    # gradient would ever reach either.
    empty = sigma <= sigma.max() * 1e-14
    large = torch.where(empty, 0.0, projected / root.where(~empty, torch.ones_like(root)))
    small = vectors * root.where(~empty, torch.ones_like(root))
    left, right = (large, small) if inner_is_smaller else (small, large)
    return left.T.reshape(terms, *outer), right.T.reshape(terms, *inner)


def norm(outer: Tensor, inner: Tensor) -> float:
    """‖Σ_r outer_r ⊗ inner_r‖_F without forming the sum: ⟨A⊗B, C⊗D⟩ = ⟨A, C⟩⟨B, D⟩."""
    left, right = outer.flatten(1).double(), inner.flatten(1).double()
    return float(((left @ left.T) * (right @ right.T)).sum().clamp(min=0).sqrt())


def norm_scale(weight: Tensor, outer: Tensor, inner: Tensor) -> float:
    """α = ‖W‖_F / ‖Ŵ‖_F, the adaptive normalization of Krony-PT, section III-F (1 if Ŵ is 0)."""
    kept = norm(outer, inner)
    return float(weight.double().norm()) / kept if kept > 0 else 1.0


def prune(
    weight: Tensor, outer: Shape, inner: Shape, small_is_outer: bool
) -> tuple[Tensor, Tensor]:
    """The pruning initialization: keep one entry of every block, 0.1 of it at the others.

    For the paper's shapes, B = [1, 0.1]ᵀ or [1, 0.1], A is every second row or column of W (in the
    "large-outer" layout; in "small-outer" the kept rows are those of the first block). For larger
    small factors, where the paper defines nothing, one entry of B is 1 and the others are 0.1.

    Returns:
        outer (1, *outer) and inner (1, *inner), float64.
    Source: Krony-PT, section III-G.
    """
    blocks = rearrange(weight.double(), outer, inner)
    kept_shape, spread_shape = (inner, outer) if small_is_outer else (outer, inner)
    kept = blocks[0] if small_is_outer else blocks[:, 0]
    # Not zero: an exact zero would leave that entry of B outside the first gradients.
    spread = torch.full((spread_shape[0] * spread_shape[1],), 0.1, dtype=torch.float64)
    spread[0] = 1.0
    kept, spread = kept.reshape(1, *kept_shape), spread.reshape(1, *spread_shape)
    return (spread, kept) if small_is_outer else (kept, spread)


def interpolate(large: Tensor, small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same sum of terms in interpolative form, which needs R² fewer numbers.

    An invertible mix of the terms that is undone between the factors changes nothing, so R² of
    their numbers say nothing. Here the mix makes R of the entries of the small factors a unit
    matrix: those blocks of W are stored as they are, in `large`, and the others as combinations of
    them. Which R is the choice of a QR decomposition with column pivoting, on an orthonormal basis
    of the small factors, so that the combinations stay small whatever the scales of the terms.

    Args:
        large, small: (R, ...) each.
    Returns:
        large (R, ...) and free (R, q - R), float64, and order (q,), int32: entry j of the small
        factors is column order[j] of [I, free], as `runtime.products.fill` puts it together.
    Source: interpolative decompositions, Cheng, Gimbutas, Martinsson and Rokhlin 2005.
    """
    import scipy.linalg  # not with the file: it takes longer than all of the package

    terms, shape = large.shape[0], large.shape
    basis, mix = torch.linalg.qr(small.double().flatten(1).T)  # small = mixᵀ basisᵀ
    _, pivots = scipy.linalg.qr(basis.T.cpu().numpy(), mode="r", pivoting=True)
    kept = torch.from_numpy(pivots[:terms].astype("int64")).to(basis.device).sort().values
    is_kept = torch.zeros(len(basis), dtype=torch.bool, device=basis.device)
    is_kept[kept] = True
    corner = basis[kept]
    free = torch.linalg.solve(corner.T, basis[~is_kept].T)
    mixed = (corner @ mix @ large.double().flatten(1)).reshape(shape)
    order = torch.cat([kept, (~is_kept).nonzero().squeeze(1)]).argsort()
    return mixed, free, order.int()


def large_to_linear(large: Tensor, mix_first: bool) -> Tensor:
    """A (R, m1, n1) as the weight of one linear map: (m1, R·n1), or (R·m1, n1) if mixed last.

    The inverse is `runtime.products.linear_to_large`.
    """
    if mix_first:
        return large.transpose(0, 1).flatten(1)
    return large.flatten(0, 1)
