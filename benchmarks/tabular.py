"""What the tables of docs/results.md are made with: files of results, numbers, Markdown."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
Table = Callable[..., str]
TABLES: dict[str, Table] = {}


def table(function: Table) -> Table:
    """Register what a template may name."""
    TABLES[function.__name__.replace("_", "-")] = function
    return function


def read(name: str) -> Any:
    """One file of results, by its name without the ending."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """A perplexity: 29.68, 4,117 or 1.64e+07."""
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def times(value: float, digits: int = 3) -> str:
    """A ratio: 1.285x, 440x."""
    return f"{value:,.{digits}f}x" if value < 100 else f"{value:,.0f}x"


def percent(share: float, digits: int = 1) -> str:
    """A share: 24.9 %."""
    return f"{100 * share:.{digits}f} %"


def million(parameters: int) -> str:
    """112.4M."""
    return f"{parameters / 1e6:.1f}M"
