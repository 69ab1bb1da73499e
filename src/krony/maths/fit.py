"""Data-aware factorization: pure functions that fit factors to what a matrix does to its data.

The harm that an error Δ = W - Ŵ in one matrix does to the loss is, to second order and with the
usual independence of inputs and gradients (K-FAC: Martens and Grosse 2015),

    harm(Δ) = ½ E[(gᵀ Δ x)²] ≈ ½ tr(G Δ C Δᵀ)      nats a token

with C (n, n) the second moment of the inputs x and G (m, m) that of the gradient g of the loss at
the outputs. Weighing inputs alone (G = I) is the data-aware SVD of the literature; weighing both
sides measures every matrix, every rank and every term in one currency, the loss.

The harm is a quadratic form in Ŵ. Low rank has a closed form: whiten both sides, truncate the SVD.
Kronecker sums, and groups of different shapes, are refined together by L-BFGS from Van Loan: each
step costs a few products with G and C, and no normal matrix (of side R·m1·n1) is formed. A low-rank
group beside them is not iterated: it always takes the best part of what the others leave, and the
others are fitted to the rest (variable projection: Golub and Pereyra 1973). That also removes the
few stiff directions that L-BFGS would spend its iterations on.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from krony.maths import kron
from krony.maths.schemes import Factors

Pair = tuple[Tensor, Tensor]  # (outer, inner), (R, ·, ·) each

INPUT_RIDGE = 1e-6  # of the mean of the diagonal: only to make a singular covariance invertible
STEPS = 12  # of ten L-BFGS iterations each; fewer where they gain little
ENOUGH = 8  # tokens an input, to say that in some direction there is nothing
EMPTY = 1e-2  # of a correlation matrix's mean eigenvalue: next to nothing
ROUNDING = 1e-5  # of E[x²]: what products of a few thousand tokens in float32 leave open
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

    def rest(self, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The harm of Δ less the best matrix of that rank, and the gradient with respect to Δ."""
        if rank == 0:
            image = self.apply(delta)
            return 0.5 * (image * delta).sum(), image
        left, right = self.roots
        whitened = left.T @ delta @ right
        tall = whitened.shape[0] >= whitened.shape[1]
        gram = whitened.T @ whitened if tall else whitened @ whitened.T
        top = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
        taken = (whitened @ top) @ top.T if tall else top @ (top.T @ whitened)
        rest = whitened - taken
        return 0.5 * rest.square().sum(), left @ rest @ right.T

    @property
    def powers(self) -> tuple[float, float]:
        """The powers of four that G and C are about as large as."""
        return power(self.outputs), power(self.inputs)

    def to(self, dtype: torch.dtype, outputs: float = 1.0, inputs: float = 1.0) -> "Metric":
        """The metric of G and C times these, in another precision; the square roots are rounded,
        not taken anew."""
        made = Metric((self.outputs * outputs).to(dtype), (self.inputs * inputs).to(dtype))
        left, right = self.roots
        made.__dict__["roots"] = (
            (left * outputs**0.5).to(dtype), (right * inputs**0.5).to(dtype),
        )  # fmt: skip
        return made


def determined(moments: Tensor, square: Tensor, tokens: int) -> Tensor:
    """Moments of inputs from a sample, made such that fits to them are determined.

    A sample says less of how inputs move together than of each by itself, nothing at all in some
    directions if there are fewer tokens than inputs, and there a fit would follow rounding. So the
    correlations are shrunk by what a sample of that size leaves open, which on a real model, with
    11 to 28 tokens an input, is worth some hundredths of the perplexity on other text. An input
    that never moves weighs what rounding hides.

    Where there are tokens enough, directions in which there is next to nothing keep that: what is
    there twice is lost without loss.

    Args:
        moments: E[x xᵀ] or Cov(x), (n, n), float64.
        square: E[x²], (n,).
        tokens: in the sample.
    Source: Chen, Wiesel, Eldar and Hero 2010, "Shrinkage algorithms for MMSE covariance
        estimation", equation 23, on the correlations, so that no input's scale matters.
    """
    n, own = len(moments), moments.diagonal().clamp(min=0)
    scale = own.rsqrt().where(own > 0, 0.0)
    correlations = scale[:, None] * moments * scale
    size = float(correlations.square().sum())
    spread = size - n  # of the correlations: zero where no two inputs move together
    share = 1.0
    if spread > 1e-9 * n:
        share = min(1.0, ((1 - 2 / n) * size + n * n) / ((tokens + 1 - 2 / n) * spread))
    few = min(1.0, max(0.0, (ENOUGH - tokens / n) / (ENOUGH - 1)))
    target = torch.eye(n, dtype=moments.dtype, device=moments.device)
    correlations.diagonal().fill_(1.0)
    if few < 1:  # in a direction of variance λ it is λ / (λ + EMPTY) instead of 1
        root, failed = torch.linalg.cholesky_ex(correlations + (EMPTY + INPUT_RIDGE) * target)
        if int(failed) == 0:  # else all that moves is rounding
            target -= (1 - few) * EMPTY * torch.cholesky_inverse(root)
    shrunk = (1 - share) * correlations + share * target
    back = own.sqrt() * shrunk.diagonal().rsqrt()
    made = back[:, None] * shrunk * back
    made.diagonal().copy_(own + square * ROUNDING)
    return made


def ridged(matrix: Tensor, ridge: float) -> Tensor:
    """The symmetric part plus ridge times the mean of the diagonal (or 1, if that is zero)."""
    mean = float(matrix.diagonal().mean())
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return (matrix + matrix.T) / 2 + ridge * (mean if mean > 0 else 1.0) * identity


def root(matrix: Tensor) -> Tensor:
    """L with L Lᵀ = matrix: Cholesky, or eigenvectors where rounding made it indefinite."""
    found: Tensor
    found, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) != 0:
        values, vectors = torch.linalg.eigh(matrix)
        floor = values.max().clamp(min=1e-300) * 1e-12
        found = vectors * values.clamp(min=floor).sqrt()
    return found


def low_rank_harm(weight: Tensor, metric: Metric) -> Tensor:
    """The harm in nats a token of the best matrix of every rank, from 0 to min(m, n).

    Half the sum of the squared singular values that are left of the whitened weight, from the
    smaller of its two Gram matrices.
    """
    m, n = weight.shape
    left, right = metric.outputs, metric.inputs
    if m < n:
        weight, left, right = weight.T, right, left
    factor = root(right)
    return rank_harm(factor.T @ (weight.T @ left @ weight) @ factor)


def rank_harm(gram: Tensor) -> Tensor:
    """The harm of the best matrix of every rank, from the smaller Gram matrix of the whitened one,
    (k, k): (k + 1,)."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    return 0.5 * torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)


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
    rank: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Pair], list[float]]:
    """Lower the harm of all groups together by L-BFGS from where they are.

    Args:
        pairs: (outer, inner) for each group, float64.
        steps: of ten iterations each; fewer if one gains less than `tolerance` of the harm.
        rank: of the low-rank group that takes the best part of what these leave.
        dtype: of the iterations; whether a step was one forward is judged in float64.
    Returns:
        The refined pairs, and the harm before the first and after each step, which never rises.
    """
    # Powers of two, which round nothing: what float64 holds may be nothing or infinite in float32.
    size, (outputs, inputs) = power(weight), metric.powers
    history = [float(metric.rest(weight - kron.sum_to_dense(pairs), rank)[0])]
    scale = history[0] / size / size / outputs / inputs or 1.0
    rough, target = metric.to(dtype, 1 / outputs, 1 / inputs), (weight / size).to(dtype)
    shared = size**0.5
    start = [(p / shared).to(dtype).contiguous() for pair in pairs for p in pair]
    factors = [p.requires_grad_() for p in start]
    optimizer = torch.optim.LBFGS(
        factors,
        max_iter=10,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = target - kron.sum_to_dense(_paired(factors))
        with torch.no_grad():
            harm, image = rough.rest(error, rank)
        error.backward(image / scale)
        return harm / scale

    best = [p.clone() for pair in pairs for p in pair]
    for _ in range(steps if history[0] > 0 else 0):
        with torch.enable_grad():
            optimizer.step(closure)
        now = [f.detach().double() * shared for f in factors]
        harm = float(metric.rest(weight - kron.sum_to_dense(_paired(now)), rank)[0])
        if not harm < history[-1]:  # converged to rounding: keep the best
            break
        best = [f.clone() for f in now]
        history.append(harm)
        if history[-2] - harm <= tolerance * history[-2]:
            break
    return [balanced(*pair) for pair in _paired(best)], history


def power(matrix: Tensor) -> float:
    """A power of four near the largest entry, whose square root rounds nothing either."""
    largest = float(matrix.abs().max())
    if not 0 < largest < math.inf:
        return 1.0
    return 4.0 ** max(-250, min(250, round(math.log(largest, 4))))


def _paired(flat: list[Tensor]) -> list[Pair]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def is_low_rank(factors: Factors) -> bool:
    """Whether the group is the low-rank corner, A (m, 1) and B (1, n), with its closed form."""
    return factors.large == (factors.shape[0], 1) and factors.small == (1, factors.shape[1])


def groups(
    weight: Tensor, metric: Metric, shapes: tuple[Factors, ...], steps: int | None = None
) -> tuple[list[Pair], list[float]]:
    """Factors of least harm for every group of a matrix.

    Low-rank groups have their closed form given the others; the others start from Van Loan of what
    is left and are refined together. The iterations run in float32, which is faster and what
    factors are stored in.

    Returns:
        (outer, inner) for each group, and the harm along the way, which never rises.
    """
    closed = [i for i, factors in enumerate(shapes) if is_low_rank(factors)]
    open_ = [i for i in range(len(shapes)) if i not in closed]
    rank = min(sum(shapes[i].terms for i in closed), *weight.shape)
    found: dict[int, Pair] = {}
    history: list[float] = []
    if open_:
        rest = weight
        if closed:
            columns, rows = low_rank(weight, metric, rank)
            rest = rest - columns @ rows
        for i in open_:
            found[i] = kron.van_loan(rest, *shapes[i].sides, shapes[i].terms)
            rest = rest - kron.to_dense(*found[i])
        start = [found[i] for i in open_]
        pairs, history = refine(
            weight, metric, start, steps or STEPS, rank=rank, dtype=torch.float32
        )
        found.update(zip(open_, pairs, strict=True))
        weight = weight - kron.sum_to_dense(pairs)
    if closed:
        found.update(_low_rank_pairs(weight, metric, {i: shapes[i] for i in closed}))
        rest = weight - kron.sum_to_dense([found[i] for i in closed])
        history.append(metric.harm(rest))
    return [found[i] for i in range(len(shapes))], history


def _low_rank_pairs(weight: Tensor, metric: Metric, shapes: dict[int, Factors]) -> dict[int, Pair]:
    """The best matrix of their common rank, dealt out to the groups from the largest value on."""
    total = sum(factors.terms for factors in shapes.values())
    columns, rows = low_rank(weight, metric, total)
    found, start = {}, 0
    for i, factors in shapes.items():
        part = slice(start, start + factors.terms)
        large, small = columns.T[part, :, None], rows[part, None, :]
        found[i] = kron.in_order(large, small, factors.layout)
        start += factors.terms
    return found
