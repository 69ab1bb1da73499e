"""What a page consists of."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Figure = tuple[str, str, tuple[tuple[str, str], ...]]  # SVG, caption, key: (hue, word)


@dataclass
class Row:
    """Of a table; kind "ours" or "part", or nothing."""

    cells: list[str]
    kind: str = ""


@dataclass
class Table:
    """Head and rows."""

    head: list[str]
    rows: list[Row]


@dataclass
class Part:
    """A section of the page."""

    title: str
    lines: list[str] = field(default_factory=list)
    numbers: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def number(value: float) -> str:
    """Four digits or so."""
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def times(value: float) -> str:
    """1.58x."""
    return f"{value:,.2f}x" if value < 1e4 else "> 10,000x"


def million(value: float) -> str:
    """134.5M."""
    return f"{value / 1e6:,.1f}M" if value < 1e9 else f"{value / 1e9:,.2f}B"


def megabytes(value: float) -> str:
    """216.4 MB."""
    return f"{value / 1e6:,.1f} MB" if value < 1e9 else f"{value / 1e9:,.2f} GB"


def machine(environments: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Versions and hardware: every value that occurs."""
    found: dict[str, list[str]] = {}
    for environment in environments:
        for key, value in environment.items():
            values = found.setdefault(key, [])
            if str(value) not in values:
                values.append(str(value))
    return [(key, ", ".join(values)) for key, values in found.items()]
