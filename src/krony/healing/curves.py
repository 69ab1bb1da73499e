"""The curve of a healing run, and the picture of one or of several side by side."""

from pathlib import Path
from typing import Any


def points(log: list[dict[str, Any]], done: int, batch_tokens: int) -> list[dict[str, float]]:
    """Held-out losses of one stage, each with the mean training loss since the one before.

    Args:
        log: transformers' log history.
        done: tokens before the stage.
        batch_tokens: tokens in a step of it.
    """
    found: list[dict[str, float]] = []
    between: list[float] = []
    for entry in log:
        if "loss" in entry:
            between.append(entry["loss"])
        if "eval_loss" in entry:
            point = {"tokens": done + entry["step"] * batch_tokens, "held_out": entry["eval_loss"]}
            if between:
                point["training"] = sum(between) / len(between)
            found.append(point)
            between = []
    return found


def draw(runs: dict[str, list[dict[str, float]]], path: Path, title: str) -> None:
    """Held-out loss (and the training loss of a single run) over tokens, as a PNG.

    Args:
        runs: the curve of `HealRecord` by label.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    crowded = len(runs) > 4
    figure = Figure(figsize=(11 if crowded else 8, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for number, (label, curve) in enumerate(runs.items()):
        style = "-" if number < 10 else "--"  # there are ten colors
        tokens = [point["tokens"] / 1e6 for point in curve]
        held_out = [point["held_out"] for point in curve]
        (line,) = axes.plot(tokens, held_out, style, marker=".", label=label or "held-out")
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
    axes.set_ylabel("nats a token" if len(runs) == 1 else "held-out loss, nats a token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    # Beside the curves where there is no room between them.
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if crowded else {}
    axes.legend(frameon=False, fontsize=8, **place)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)
