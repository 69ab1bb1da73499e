"""Shapes of Kronecker factors: what may be multiplied, and what it costs. Integers, no tensors.

The letters are those of kron.py.
"""

import math
from typing import Literal, TypeVar

from krony.errors import KronyError

Layout = Literal["small-outer", "large-outer"]
LAYOUTS: tuple[Layout, ...] = ("small-outer", "large-outer")
Shape = tuple[int, int]
Side = TypeVar("Side")  # a factor, or its shape

# Multiply-adds that a CPU could do in the time in which one entry of W is written, put in its place
# and read again: some 40 to 85 in float32, and more in bfloat16, by the CPU (docs/log.md).
FORMING = 80


def in_order(first: Side, second: Side, layout: Layout) -> tuple[Side, Side]:
    """(large, small) as (outer, inner) in that layout, and (outer, inner) as (large, small)."""
    return (second, first) if layout == "small-outer" else (first, second)


def check_factors(large: Shape, small: Shape, terms: int, layout: str) -> None:
    """Raise `KronyError` for a side below 1, an unknown layout, or too many terms."""
    if min(*large, *small) < 1:
        raise KronyError(f"factor sides must be at least 1, not {large} and {small}")
    if layout not in LAYOUTS:
        raise KronyError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    check_terms(terms, large, small)


def check_terms(terms: int, outer: Shape, inner: Shape) -> None:
    """Raise `KronyError` unless 1 ≤ terms ≤ the rank of the rearranged matrix."""
    limit = min(outer[0] * outer[1], inner[0] * inner[1])
    if not 1 <= terms <= limit:
        raise KronyError(
            f"{terms} terms of {outer[0]}x{outer[1]} by {inner[0]}x{inner[1]} can't be: between 1 "
            f"and {limit} terms of these shapes are independent; choose a number in that range"
        )


def check_scalars(scalars: bool, interpolative: bool) -> None:
    """Raise `KronyError` for both: the interpolative form has no scale of a term left to learn."""
    if scalars and interpolative:
        raise KronyError("interpolative factors have no scalars; leave one of the two out")


def multiply_adds(large: Shape, small: Shape, terms: int, mix_first: bool) -> int:
    """Multiply-adds per token of the factored product in one of its two orders."""
    (m1, n1), (m2, n2) = large, small
    if mix_first:
        return terms * m2 * n1 * (n2 + m1)
    return terms * n2 * m1 * (n1 + m2)


def dense_from(large: Shape, small: Shape, terms: int, mix_first: bool) -> float:
    """The number of tokens from which forming W, once, costs less than the factors; perhaps ∞.

    W costs R·m·n multiply-adds, the time of `FORMING`·m·n more for its bytes, then m·n a token; the
    factors cost `multiply_adds` a token.
    """
    entries = large[0] * large[1] * small[0] * small[1]
    saved = multiply_adds(large, small, terms, mix_first) - entries
    return (terms + FORMING) * entries / saved if saved > 0 else math.inf


def mixes_first(large: Shape, small: Shape) -> bool:
    """Whether mixing with the small factor before the large product takes fewer operations."""
    return multiply_adds(large, small, 1, True) <= multiply_adds(large, small, 1, False)
