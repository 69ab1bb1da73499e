"""What one launch on a GPU does."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

# Slices that the kernel for many tokens holds, each in a tile of its own.
MOST_SLICES = 4
# With more, the sums of terms leave too few registers to the products.
MOST_TERMS = 2


@dataclass(frozen=True)
class Step:
    """What one launch does: the formulas of triton_kernels.py.

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

    @cached_property
    def held(self) -> tuple[Tensor, ...]:
        """A, B, bias, those of the other, C: what is not there, and not read, is A."""
        (a, *a_2), inner = self.weights, self.inner
        b, *b_2 = self.smalls or (a,)
        bias, *bias_2 = self.biases or (a,)
        others = (*a_2, a)[0], (*b_2, a)[0], (*bias_2, a)[0]
        return a, b, bias, *others, a if inner is None else inner

    @cached_property
    def key(self) -> tuple[Any, ...] | None:
        """What a compiled kernel depends on; None where an address is no multiple of 16."""
        if any(tensor.data_ptr() % 16 for tensor in self.held):
            return None
        there = bool(self.smalls), bool(self.biases), len(self.weights), self.inner is not None
        order, weight = (self.small_outer, self.mix_first), self.weights[0]
        where = weight.dtype, weight.device
        return (self.sides, self.terms, self.slices, *order, self.kind, *there, *where)

    @property
    def takes_many(self) -> bool:
        """Whether there is a kernel for many tokens: few terms and slices, which lie apart."""
        _, _, m2, n2 = self.sides
        most = max(m2, n2 * len(self.weights), self.slices)
        apart = self.small_outer or m2 == n2 == 1
        return most <= MOST_SLICES and self.terms <= MOST_TERMS and apart
