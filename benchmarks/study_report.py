"""The cells of a study as one table, one plot, and the answer in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from krony.hf.checkpoints import write_text

Record = dict[str, Any]


def name_of(record: Record) -> str:
    """Size and method."""
    return f"{record['cell']['size']} {record['cell']['method']}".strip()


def line(record: Record) -> str:
    """One cell in one line, for whoever watches."""
    texts = (
        f"{text} {figure(found['perplexity'])} -> {figure(record['after'][text]['perplexity'])}"
        for text, found in record["before"].items()
    )
    return f"{name_of(record)}: {', '.join(texts)} ({record['seconds']:.0f} s)"


def figure(value: float) -> str:
    """Four digits or so."""
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def header(records: list[Record]) -> str:
    """What holds for all cells: tokens, seeds, hardware, versions; every value that occurs."""

    def values(*path: str) -> str:
        found = []
        for record in records:
            value: Any = record
            for key in path:
                value = value[key]
            found.append(f"{value:,}" if isinstance(value, int) else str(value))
        return ", ".join(dict.fromkeys(found))

    losses = values("settings", "loss")
    return (
        f"Model {values('model')}; healing {values('settings', 'tokens')} tokens "
        f"({losses}; {values('settings', 'batch_tokens')} a step, window "
        f"{values('settings', 'window')}, {values('settings', 'dtype')}), seed {values('seed')}; "
        f"calibration {values('calibration_windows')} windows. "
        f"GPU {values('environment', 'gpu')}, CPU {values('environment', 'cpu')}; Python "
        f"{values('environment', 'python')}, torch {values('environment', 'torch')}, transformers "
        f"{values('environment', 'transformers')}; {values('environment', 'date')}."
    )


def table(records: list[Record]) -> str:
    """Markdown; perplexities before and after healing."""
    texts = list(records[0]["before"])
    passages = [text for text in texts if "last_word" in records[0]["before"][text]]
    columns = [
        "size", "method", "parameters", *texts,
        *(f"{text}, last word" for text in passages),
        *(f"{text}, last word right" for text in passages),
        "factorise, s", "training, tokens/s", "peak, GB", "prefill, tokens/s", "decode, tokens/s",
    ]  # fmt: skip
    rows = [columns, ["---"] * len(columns)]
    for record in records:
        before, after, training = record["before"], record["after"], record["training"]
        inference = record["inference"]

        def both(text: str, before: Any = before, after: Any = after) -> str:
            return f"{figure(before[text]['perplexity'])} / {figure(after[text]['perplexity'])}"

        words = {t: (before[t]["last_word"], after[t]["last_word"]) for t in passages}
        rows.append(
            [
                record["cell"]["size"] or "-",
                record["cell"]["method"],
                f"{record['parameters']:,}",
                *(both(text) for text in texts),
                *(" / ".join(figure(w["perplexity"]) for w in words[t]) for t in passages),
                *(" / ".join(f"{w['accuracy']:.1%}" for w in words[t]) for t in passages),
                f"{record['factorise_seconds']:.1f}",
                f"{training['tokens_per_second']:,.0f}",
                f"{training['peak_bytes'] / 1e9:.2f}",
                f"{inference['prefill_tokens_per_second']:,.0f}",
                f"{inference['decode_tokens_per_second']:,.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def answer(records: list[Record]) -> list[str]:
    """For every size: the best method after healing on each text, and its lead over the next."""
    lines = []
    for size in dict.fromkeys(r["cell"]["size"] for r in records):
        rivals = [r for r in records if r["cell"]["size"] == size]
        if len(rivals) < 2:
            continue
        wins = []
        for text in rivals[0]["after"]:
            ranked = sorted((r["after"][text]["perplexity"], r["cell"]["method"]) for r in rivals)
            (first, best), (second, other) = ranked[:2]
            wins.append(best)
            lines.append(
                f"- {size}, {text}: {best} is best after healing, {figure(first)} against "
                f"{figure(second)} of {other} ({second / first - 1:.1%} more)"
            )
        holds = (
            "one method is best on all texts" if len(set(wins)) == 1 else "no method is best on all"
        )
        lines.append(f"- {size}: {holds}, of {len(rivals)} methods measured.")
    return lines


def draw(records: list[Record], path: Path) -> None:
    """A row a cell: perplexity against dense on every text, hollow before healing, full after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dense = next((r for r in records if r["cell"]["method"] == "dense"), None)
    shown = [r for r in records if r is not dense]
    if dense is None or not shown:
        return
    figure_ = Figure(figsize=(8, 1.6 + 0.28 * len(shown)), layout="constrained")
    axes: Any = figure_.subplots()
    rows = range(len(shown))
    for number, text in enumerate(dense["before"]):
        base = dense["before"][text]["perplexity"]
        for stage, fill in (("before", "none"), ("after", None)):
            ratios = [r[stage][text]["perplexity"] / base for r in shown]
            axes.plot(
                ratios,
                [row + 0.12 * number for row in rows],
                "o",
                color=f"C{number}",
                markerfacecolor=fill,
                label=text if fill is None else None,
            )
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(list(rows), [name_of(r) for r in shown])
    axes.invert_yaxis()
    axes.set_xlabel("perplexity against the dense model (hollow: before healing)")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure_).print_png(path)


def write(folder: Path, order: list[str]) -> None:
    """table.md and study.png of all cells that are there, in that order."""
    records = [json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")]
    records.sort(key=lambda r: order.index(name_of(r)))
    if not records:
        return
    text = [header(records), "Perplexity before / after healing.", table(records)]
    write_text(folder / "table.md", "\n\n".join(text) + "\n\n" + "\n".join(answer(records)) + "\n")
    draw(records, folder / "study.png")
