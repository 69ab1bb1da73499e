"""What shapes of factors can be: checked without torch, so that arithmetic starts at once."""

from typing import Literal

from krony.errors import KronyError

Layout = Literal["small-outer", "large-outer"]
LAYOUTS: tuple[Layout, ...] = ("small-outer", "large-outer")
Shape = tuple[int, int]


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
