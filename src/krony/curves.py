"""The picture of a healing run, or of several side by side."""

from pathlib import Path
from typing import Any


def draw(runs: dict[str, list[dict[str, float]]], path: Path, title: str) -> None:
    """Held-out loss (and the training loss of a single run) over tokens, as a PNG.

    Args:
        runs: the curve of `HealRecord` by label.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for label, curve in runs.items():
        tokens = [point["tokens"] / 1e6 for point in curve]
        held_out = [point["held_out"] for point in curve]
        (line,) = axes.plot(tokens, held_out, marker=".", label=f"{label} held-out".strip())
        if len(runs) == 1:
            later = [
                (t, p["training"]) for t, p in zip(tokens, curve, strict=True) if "training" in p
            ]
            axes.plot(
                *zip(*later, strict=True), color=line.get_color(), alpha=0.4, label="training"
            )
    # A first point far above the rest would flatten the part that matters.
    ends = [curve[-1]["held_out"] for curve in runs.values()]
    tops = sorted(point["held_out"] for curve in runs.values() for point in curve)
    axes.set_ylim(top=min(tops[-1], max(ends) + 1.5) + 0.05)
    axes.set_xlabel("million tokens of training")
    axes.set_ylabel("nats a token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)
