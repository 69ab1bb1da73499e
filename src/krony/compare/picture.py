"""All cells of a comparison in one picture: a row a method, a column a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from krony.compare.cells import DENSE, Row, latest
from krony.hf import checkpoints

COLORS = ("#1f5fa8", "#d1662a", "#2d8a57", "#8a3f8a")
LIMIT = 1e4  # times dense; worse ones stand at the edge, as arrows


def draw(rows: list[Row], path: Path) -> bool:
    """Perplexity against dense by method, a color a budget; hollow before healing. As a PNG.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dense = next((row for row in rows if row["method"] == DENSE), None)
    shown = [row for row in rows if row is not dense and "before" in row]
    if dense is None or not shown:
        return False
    texts, budgets = list(dense["before"]), sorted({row["budget"] for row in shown}, reverse=True)
    titles = ranked(shown, texts[0])
    size = (3.2 + 3.6 * len(texts), 1.4 + 0.32 * len(titles))
    figure = Figure(figsize=size, layout="constrained")
    all_axes: Any = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(all_axes, texts, strict=True):
        base = dense["before"][text]["perplexity"]
        for number, budget in enumerate(budgets):
            color, shift = COLORS[number % len(COLORS)], 0.14 * (number - (len(budgets) - 1) / 2)
            for row in (row for row in shown if row["budget"] == budget):
                height = titles.index(row["title"]) + shift
                last = latest(row)[text]["perplexity"] / base
                first = row["before"][text]["perplexity"] / base
                if "after" in row:
                    ends = [min(first, LIMIT), min(last, LIMIT)]
                    axes.plot(ends, [height] * 2, "-", color=color, alpha=0.4, linewidth=1)
                    axes.plot(ends[:1], [height], "o", color=color, markerfacecolor="none")
                mark = ">" if last >= LIMIT else "o"
                axes.plot([min(last, LIMIT)], [height], mark, color=color)
            axes.plot([], [], "o", color=color, label=f"{budget:.0%} of the blocks")
        axes.axvline(1.0, color="grey", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(text, fontsize=10)
        axes.set_xlabel("perplexity against dense")
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_yticks(range(len(titles)), titles)
    all_axes[0].invert_yaxis()
    all_axes[-1].legend(frameon=False, fontsize=8, loc="lower right")
    checkpoints.write_file(path, FigureCanvasAgg(figure).print_png)
    return True


def ranked(rows: list[Row], text: str) -> list[str]:
    """Titles of methods, the best first: by perplexity at the size where most of them stand."""

    def key(title: str) -> float:
        found = [float(latest(row)[text]["nats"]) for row in rows if row["title"] == title]
        return sum(found) / len(found)

    return sorted(dict.fromkeys(row["title"] for row in rows), key=key)
