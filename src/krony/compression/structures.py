"""What a budget can choose between for one matrix: shapes of factors at many sizes."""

import math
from dataclasses import replace

import numpy as np

from krony.maths.kron import Shape
from krony.maths.schemes import Factors, divisors

# Shares of a matrix's parameters at which there are candidates.
SHARES = np.geomspace(0.03, 0.97, 60)
LOW_RANK_PARTS = (0.1, 0.45)  # of the parameters of a mixed candidate, the rest is a balanced sum
# Of sixteen parts of a hidden axis, how many may stay.
WIDTHS = (14, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1)
# Processors multiply in blocks: bfloat16 with a rank of 224 takes 0.7 of the time that it takes
# with 214 (docs/log.md). A rank is a multiple of the largest of these that costs it no more than a
# sixth.
ALIGNED, LOST = (1, 2, 4, 8, 16, 32), 6


def balanced_shapes(shape: Shape) -> tuple[Shape, Shape]:
    """(large, small) as near to each other as the divisors of (m, n) allow.

    The sum is a matrix of rank R after rearrangement to (m1·n1, m2·n2), and R terms cost the least
    when both sides of that are equal.
    """
    m2, n2 = (max(d for d in divisors(side) if d * d <= side) for side in shape)
    return (shape[0] // m2, shape[1] // n2), (m2, n2)


def sized(large: Shape, small: Shape, share: float) -> Factors:
    """As many terms, at least one, in interpolative form, as a share of the matrix pays for."""
    p, q = large[0] * large[1], small[0] * small[1]
    # R (p + q - R) = share · p · q
    terms = int((p + q - math.sqrt((p + q) ** 2 - 4 * share * p * q)) / 2)
    return Factors(large, small, max(terms, 1), interpolative=True)


def low_rank(shape: Shape, share: float) -> Factors:
    """The same for low rank, with a rank that processors multiply fast."""
    factors = sized((shape[0], 1), (1, shape[1]), share)
    unit = max(u for u in ALIGNED if u * LOST <= factors.terms or u == 1)
    return replace(factors, terms=factors.terms - factors.terms % unit)


def mixed(shape: Shape, share: float, part: float) -> tuple[Factors, Factors]:
    """A low-rank group with that part of the share, and a balanced sum with the rest of it."""
    m, n = shape
    first = low_rank(shape, part * share)
    return first, sized(*balanced_shapes(shape), share - first.parameters / (m * n))


def widths(hidden: int) -> list[int]:
    """The numbers of hidden units that are tried: sixteenths, or the nearest multiple of 8."""
    unit = 1 if hidden % 16 == 0 else 8
    tried = {max(unit, round(hidden * part / 16 / unit) * unit) for part in WIDTHS}
    return [hidden, *sorted((w for w in tried if w < hidden), reverse=True)]
