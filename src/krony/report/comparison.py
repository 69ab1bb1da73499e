"""The part on a comparison: every method at every size."""

import shlex
from typing import Any

from krony.report import charts
from krony.report.charts import Point
from krony.report.parts import Part, Row, Table, machine, million, number, times

Record = dict[str, Any]
DENSE, OFF = "dense", 0.005  # of the budget


def latest(row: Record) -> Record:
    """Figures by text, after healing where there was any."""
    found: Record = row["after"] if "after" in row else row["before"]
    return found


def comparison(record: Record) -> Part:
    """Methods at equal sizes; see `krony compare`."""
    rows, settings = record["rows"], record["settings"]
    dense = next((row for row in rows if row["method"] == DENSE and "before" in row), None)
    made = [row for row in rows if row is not dense and "before" in row]
    part = Part(f"Every method on {settings['source']}")
    if dense is None:
        part.notes.append("The dense model was not measured, so that nothing can be compared.")
        return part
    texts = list(dense["before"])
    part.lines += _lead(made, dense, texts)
    for text in texts:
        part.figures += _pictures(made, dense, text)
    part.tables.append(_table(made, dense, texts))
    for text in texts:
        series = [
            (f"{row['title']}, {row['budget']:.0%}", _curve(row))
            for row in made
            if row.get("curve")
        ]
        if series and text == texts[0]:
            drawn = charts.curves(series[:8], "tokens of healing", "held-out loss, nats a token")
            part.figures.append((drawn, "Healing, the same tokens for all.", ()))
    part.notes += [
        f"{row['title']} at {row['budget']:.0%}: {row['refused']}."
        for row in rows
        if "refused" in row
    ]
    protocol = dense["before"][texts[0]]
    part.facts = [
        ("command", command(settings)),
        ("calibration", f"{settings['windows']} windows of {settings['calibration']}"),
        ("texts", ", ".join(f"{t}: {dense['before'][t]['tokens']:,} tokens" for t in texts)),
        ("protocol", f"{protocol['protocol']}, window {protocol['window']}, {protocol['dtype']}"),
        ("seed", str(settings["seed"])),
        *machine(row["environment"] for row in rows if "environment" in row),
    ]
    return part


def _lead(made: list[Record], dense: Record, texts: list[str]) -> list[str]:
    """Who is best at each size, and by how much."""
    lines = [
        f"The dense model has {million(dense['parameters'])} parameters and a perplexity of "
        + ", ".join(f"{number(dense['before'][t]['perplexity'])} on {t}" for t in texts)
        + "."
    ]
    for budget in sorted({row["budget"] for row in made}, reverse=True):
        for text in texts:
            ranked = sorted(
                (r for r in made if r["budget"] == budget), key=lambda r: latest(r)[text]["nats"]
            )
            if len(ranked) < 2:
                continue
            first, second = (latest(r)[text]["perplexity"] for r in ranked[:2])
            base = dense["before"][text]["perplexity"]
            lines.append(
                f"At {budget:.0%} of the blocks, {ranked[0]['title']} is best on {text}: "
                f"{number(first)}, {times(first / base)} of dense; then {ranked[1]['title']}, "
                f"{number(second)}."
            )
    return lines


def _pictures(
    made: list[Record], dense: Record, text: str
) -> list[tuple[str, str, tuple[tuple[str, str], ...]]]:
    base = dense["before"][text]["perplexity"]
    points = [Point(dense["parameters"], base, "dense", True)]
    points += [
        Point(row["parameters"], latest(row)[text]["perplexity"], row["title"], row["ours"])
        for row in made
    ]
    budgets = sorted({row["budget"] for row in made}, reverse=True)
    hues = {budget: charts.HUES[i % len(charts.HUES)] for i, budget in enumerate(budgets)}
    titles = dict.fromkeys(row["title"] for row in made)

    def mean(title: str) -> float:
        own = [float(latest(row)[text]["nats"]) for row in made if row["title"] == title]
        return sum(own) / len(own)

    # A method without a figure at every size would look better than it is.
    full = [t for t in titles if sum(r["title"] == t for r in made) == len(budgets)]
    order = [*sorted(full, key=mean), *sorted((t for t in titles if t not in full), key=mean)]
    rows = []
    for title in order:
        own = [row for row in made if row["title"] == title]
        values = [(latest(r)[text]["perplexity"] / base, hues[r["budget"]]) for r in own]
        rows.append((title, any(r["ours"] for r in own), values))
    key = tuple((hues[budget], f"{budget:.0%} of the blocks") for budget in budgets)
    return [
        (
            charts.pareto(points, "parameters", f"perplexity on {text}"),
            f"Perplexity on {text} against parameters; less is better on both. The line is the "
            "front: nothing measured is smaller and better than what is on it. Models of more than "
            f"{charts.RUINED} times the best perplexity are left out.",
            (),
        ),
        (
            charts.dots(rows, f"perplexity on {text} against dense"),
            f"Every method on {text}, the best first; › where the axis ends.",
            key,
        ),
    ]


def _table(made: list[Record], dense: Record, texts: list[str]) -> Table:
    healed = any("after" in row for row in made)
    head = ["method", "parameters"]
    for text in texts:
        head += [text, "against dense", *(["healed", "against dense"] if healed else [])]
    head.append("seconds")
    rows = [Row([dense["title"], f"{dense['parameters']:,}", *_cells(dense, dense, texts, healed)])]
    for budget in sorted({row["budget"] for row in made}, reverse=True):
        rows.append(Row([f"{budget:.0%} of the blocks' matrices"], "part"))
        own = [row for row in made if row["budget"] == budget]
        for row in sorted(own, key=lambda r: latest(r)[texts[0]]["nats"]):
            off = " *" if abs(row["share"] - budget) > OFF else ""
            cells = [row["title"], f"{row['parameters']:,}{off}"]
            rows.append(
                Row(cells + _cells(row, dense, texts, healed), "ours" if row["ours"] else "")
            )
    return Table(head, rows)


def _cells(row: Record, dense: Record, texts: list[str], healed: bool) -> list[str]:
    cells = []
    for text in texts:
        base = dense["before"][text]["perplexity"]
        for stage in ("before", "after") if healed else ("before",):
            value = row[stage][text]["perplexity"] if stage in row else None
            cells += ["-", "-"] if value is None else [number(value), times(value / base)]
    return [*cells, f"{row.get('seconds', 0):,.0f}"]


def _curve(row: Record) -> list[tuple[float, float]]:
    return [(point["tokens"], point["held_out"]) for point in row["curve"]]


def command(settings: Record) -> str:
    """The command line that makes a comparison."""
    parts = ["krony", "compare", str(settings["source"])]
    for budget in settings["budgets"]:
        parts += ["--budget", f"{budget:g}"]
    parts += ["--methods", ",".join(settings["methods"])]
    parts += ["--calibration", settings["calibration"], "--windows", str(settings["windows"])]
    if settings["window"]:
        parts += ["--window", str(settings["window"])]
    for text in settings["texts"]:
        parts += ["--data", text]
    if settings["evaluated"]:
        parts += ["--evaluated", str(settings["evaluated"])]
    if settings["heal_tokens"]:
        parts += ["--heal-tokens", str(settings["heal_tokens"])]
        for text in settings["heal_data"]:
            parts += ["--heal-data", text]
    parts += ["--dtype", settings["dtype"], "--bos", settings["bos"]]
    return shlex.join([*parts, "--seed", str(settings["seed"]), "-o", "FOLDER"])
