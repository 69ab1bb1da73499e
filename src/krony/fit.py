"""Data-aware factorisation: pure functions that fit factors to what a matrix does to its data.

The harm that an error Δ = W - Ŵ in one matrix does to the loss is, to second order and with the
usual independence of inputs and gradients (K-FAC: Martens and Grosse 2015),

    harm(Δ) = ½ E[(gᵀ Δ x)²] ≈ ½ tr(G Δ C Δᵀ)      nats a token

with C (n, n) the second moment of the inputs x and G (m, m) that of the gradient g of the loss at
the outputs. Weighing inputs alone (G = I) is the data-aware SVD of the literature; weighing both
sides measures every matrix, every rank and every term in one currency, the loss.

The harm is a quadratic form in Ŵ. Low rank has a closed form: whiten both sides, truncate the SVD.
Kronecker sums, and groups of different shapes, are refined together by L-BFGS from Van Loan: each
step costs two products with G and C, and no normal matrix (of side R·m1·n1) is formed. Alternating
least squares gets to the same place more slowly (docs/log.md).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from krony import kron
from krony.schemes import Factors

Pair = tuple[Tensor, Tensor]  # (outer, inner), (R, ·, ·) each

INPUT_RIDGE = 1e-6  # of the mean of the diagonal: only to make a singular covariance invertible
STEPS = 20  # of ten L-BFGS iterations each; fewer where they gain little
GRADIENT_RIDGE = 1e-2  # sampled gradients are noisier; measured to be flat from 1e-3 to 1e-1


@dataclass(frozen=True)
class Metric:
    """The quadratic form of one matrix: G (m, m) and C (n, n), float64, positive definite."""

    outputs: Tensor
    inputs: Tensor

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor | None, rows: int) -> "Metric":
        """Ridged; without gradients G is the identity."""
        if outputs is None:
            outputs = torch.eye(rows, dtype=inputs.dtype, device=inputs.device)
        else:
            outputs = ridged(outputs, GRADIENT_RIDGE)
        return cls(outputs, ridged(inputs, INPUT_RIDGE))

    @cached_property
    def roots(self) -> Pair:
        """Square roots of G and C, which whiten the two sides."""
        return root(self.outputs), root(self.inputs)

    def apply(self, delta: Tensor) -> Tensor:
        """G Δ C, half the gradient of tr(G Δ C Δᵀ)."""
        return self.outputs @ delta @ self.inputs

    def harm(self, delta: Tensor) -> float:
        """½ tr(G Δ C Δᵀ), in nats a token if G is the second moment of the loss gradients."""
        return 0.5 * float((self.apply(delta) * delta).sum())


def ridged(matrix: Tensor, ridge: float) -> Tensor:
    """The symmetric part plus ridge times the mean of the diagonal (or 1, if that is zero)."""
    mean = float(matrix.diagonal().mean())
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return (matrix + matrix.T) / 2 + ridge * (mean if mean > 0 else 1.0) * identity


def root(matrix: Tensor) -> Tensor:
    """L with L Lᵀ = matrix: Cholesky, or eigenvectors where rounding made it indefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) == 0:
        return factor
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.max().clamp(min=1e-300) * 1e-12
    return vectors * values.clamp(min=floor).sqrt()


def spectrum(weight: Tensor, metric: Metric) -> Tensor:
    """Singular values of the whitened weight: rank R costs ½ Σ_{k>R} σ_k² nats a token."""
    left, right = metric.roots
    return torch.linalg.svdvals(left.T @ weight @ right)


def low_rank(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-R matrix of least harm: (m, R) and (R, n), the singular values split evenly."""
    left, right = metric.roots
    u, s, vh = torch.linalg.svd(left.T @ weight @ right, full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank].sqrt(), vh[:rank]
    pivot = vh.gather(1, vh.abs().argmax(1, keepdim=True))
    sign = torch.where(pivot < 0, -1.0, 1.0)  # equal input, equal signs
    columns = torch.linalg.solve(left.T, u * sign.T * s)
    rows = torch.linalg.solve(right.T, (vh * sign * s[:, None]).T).T
    return columns, rows


def balanced(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """The same terms with ‖outer_r‖ = ‖inner_r‖; a term with a zero factor stays as it is."""
    a, b = outer.flatten(1).norm(dim=1), inner.flatten(1).norm(dim=1)
    ratio = torch.where((a > 0) & (b > 0), (b / a.clamp(min=1e-300)).sqrt(), torch.ones_like(a))
    return outer * ratio[:, None, None], inner / ratio[:, None, None]


def refine(
    weight: Tensor,
    metric: Metric,
    pairs: list[Pair],
    steps: int = STEPS,
    tolerance: float = 2e-3,
) -> tuple[list[Pair], list[float]]:
    """Lower the harm of all groups together by L-BFGS from where they are.

    Args:
        pairs: (outer, inner) for each group, float64.
        steps: of ten iterations each; fewer if one gains less than `tolerance` of the harm.
    Returns:
        The refined pairs, and the harm before the first and after each step, which never rises.
    """
    factors = [p.contiguous().clone().requires_grad_() for pair in pairs for p in pair]
    history = [metric.harm(weight - kron.sum_to_dense(pairs))]
    scale = history[0] or 1.0
    optimiser = torch.optim.LBFGS(
        factors,
        max_iter=10,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        error = weight - kron.sum_to_dense(_paired(factors))
        with torch.no_grad():
            image = metric.apply(error) / scale
        error.backward(image)
        return 0.5 * (image * error.detach()).sum()

    best = [f.detach().clone() for f in factors]
    for _ in range(steps if history[0] > 0 else 0):
        with torch.enable_grad():
            optimiser.step(closure)
        harm = metric.harm(weight - kron.sum_to_dense(_paired([f.detach() for f in factors])))
        if not harm < history[-1]:  # converged to rounding: keep the best
            break
        best = [f.detach().clone() for f in factors]
        history.append(harm)
        if history[-2] - harm <= tolerance * history[-2]:
            break
    return [balanced(*pair) for pair in _paired(best)], history


def _paired(flat: list[Tensor]) -> list[Pair]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def is_low_rank(factors: Factors) -> bool:
    """Whether the group is the low-rank corner, A (m, 1) and B (1, n), with its closed form."""
    return factors.large == (factors.shape[0], 1) and factors.small == (1, factors.shape[1])


def groups(
    weight: Tensor,
    metric: Metric,
    shapes: tuple[Factors, ...],
    cycles: int = 3,
    steps: int | None = None,
) -> tuple[list[Pair], list[float]]:
    """Factors of least harm for every group of a matrix.

    A low-rank group has its closed form given the others; the others start from Van Loan and are
    refined together. Where there are both, the two are fitted in turn.

    Returns:
        (outer, inner) for each group, and the harm along the way, which never rises.
    """
    closed = [i for i, factors in enumerate(shapes) if is_low_rank(factors)]
    open_ = [i for i in range(len(shapes)) if i not in closed]
    found: dict[int, Pair] = {}
    history: list[float] = []
    for _ in range(cycles if closed and open_ else 1):
        if open_:
            rest = _less(weight, found, closed)
            start = [found.get(i) or _van_loan(rest, shapes[i]) for i in open_]
            pairs, harms = refine(rest, metric, start, steps or STEPS)
            found.update(zip(open_, pairs, strict=True))
            history += harms
        for i in closed:
            rest = _less(weight, found, [j for j in found if j != i])
            found[i] = _low_rank_pair(rest, metric, shapes[i])
            history.append(metric.harm(_less(rest, found, [i])))
    return [found[i] for i in range(len(shapes))], history


def _less(weight: Tensor, found: dict[int, Pair], which: list[int]) -> Tensor:
    for i in which:
        if i in found:
            weight = weight - kron.to_dense(*found[i])
    return weight


def _van_loan(weight: Tensor, factors: Factors) -> Pair:
    return kron.van_loan(weight, *factors.sides, factors.terms)


def _low_rank_pair(weight: Tensor, metric: Metric, factors: Factors) -> Pair:
    columns, rows = low_rank(weight, metric, factors.terms)
    large, small = columns.T[:, :, None], rows[:, None, :]
    return kron.in_order(large, small, factors.layout)
