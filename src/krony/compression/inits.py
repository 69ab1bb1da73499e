"""From a dense matrix to factors by its weights alone: Van Loan, the paper's variants, chance."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from krony.errors import KronyError
from krony.hf.plan import MatrixPlan
from krony.maths import kron
from krony.maths.schemes import Factors


@dataclass(frozen=True)
class Terms:
    """The factors of one group, float64: A (R, m1, n1), B (R, m2, n2), and s (R,)."""

    large: Tensor
    small: Tensor
    scalars: Tensor

    @classmethod
    def from_layout(cls, factors: Factors, outer: Tensor, inner: Tensor) -> "Terms":
        """Sort outer and inner factors into large and small."""
        large, small = kron.in_order(outer, inner, factors.layout)
        ones = torch.ones(factors.terms, dtype=torch.float64, device=outer.device)
        return cls(large, small, ones)

    def ordered(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """(outer, inner), the scalars multiplied in."""
        small = self.small * self.scalars[:, None, None]
        return kron.in_order(self.large, small, factors.layout)

    def scaled(self, alpha: float) -> "Terms":
        """Every term times alpha, carried by the scalars."""
        return Terms(self.large, self.small, self.scalars * alpha)


def van_loan(weight: Tensor, matrix: MatrixPlan, seed: int) -> list[Terms]:
    """Nearest in the Frobenius norm; each further group is fitted to what the others leave."""
    found, rest = [], weight
    for factors in matrix.groups:
        outer, inner = kron.van_loan(rest, *factors.sides, factors.terms, seed)
        found.append(Terms.from_layout(factors, outer, inner))
        if len(matrix.groups) > 1:
            rest = rest - kron.to_dense(outer, inner)
    return found


def van_loan_scaled(weight: Tensor, matrix: MatrixPlan, seed: int) -> list[Terms]:
    """Van Loan times α = ‖W‖/‖Ŵ‖ (Krony-PT, section III-F); with scalars, s_r = α."""
    found = van_loan(weight, matrix, seed)
    kept = float(to_dense(found, matrix).norm())
    alpha = float(weight.norm()) / kept if kept > 0 else 1.0
    return [terms.scaled(alpha) for terms in found]


def prune(weight: Tensor, matrix: MatrixPlan, seed: int) -> list[Terms]:
    """Keep one row or column of every block, 0.1 of it elsewhere (Krony-PT, section III-G)."""
    check_prune(matrix)
    (factors,) = matrix.groups
    pair = kron.prune(weight, *factors.sides, factors.layout == "small-outer")
    return [Terms.from_layout(factors, *pair)]


def check_prune(matrix: MatrixPlan) -> None:
    """Raise `KronyError` for a plan of more than one term."""
    if len(matrix.groups) != 1 or matrix.groups[0].terms != 1:
        raise KronyError(
            f"the prune initialization is one term of one shape, and the plan gives {matrix.name} "
            f"{sum(g.terms for g in matrix.groups)}; use one term, or --init van-loan"
        )


def random(weight: Tensor, matrix: MatrixPlan, seed: int) -> list[Terms]:
    """Gaussian factors with the norm of the dense matrix: the floor that others must beat."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for factors in matrix.groups:
        outer, inner = (
            torch.randn(factors.terms, *side, generator=generator, dtype=torch.float64)
            for side in factors.sides
        )
        found.append(Terms.from_layout(factors, outer.to(weight.device), inner.to(weight.device)))
    scale = float(weight.norm() / to_dense(found, matrix).norm()) ** 0.5
    return [Terms(t.large * scale, t.small * scale, t.scalars) for t in found]


Initialization = Callable[[Tensor, MatrixPlan, int], list[Terms]]
INITS: dict[str, Initialization] = {
    "van-loan": van_loan,
    "van-loan-scaled": van_loan_scaled,
    "prune": prune,
    "random": random,
}
"""Initializations by weights: (weight (m, n) in float64, its plan, seed) to the factors a group."""


def to_dense(found: list[Terms], matrix: MatrixPlan) -> Tensor:
    """The matrix (m, n) that the factors of all groups make together."""
    return kron.sum_to_dense([t.ordered(g) for t, g in zip(found, matrix.groups, strict=True)])
