"""The parts on model directories, and on figures measured of them."""

import math
from typing import Any

from krony.hf.plan import MatrixPlan
from krony.measure.tasks import is_score
from krony.report import charts
from krony.report.charts import Point
from krony.report.parts import Figure, Part, Row, Table, machine, megabytes, million, number, times
from krony.report.read import Directory, Found, block_of, saved_by_block

Record = dict[str, Any]
WORST = 12  # matrices that the table of harm lists


def model(found: Directory) -> Part:
    """One directory: sizes, pictures, how it was made."""
    part = Part(found.name)
    dense = found.dense_parameters
    part.numbers = [(million(found.parameters), "parameters")]
    if dense != found.parameters:
        share = found.parameters / dense
        part.numbers.append((f"{share:.0%}", f"of the dense model's {million(dense)}"))
    part.numbers.append((megabytes(found.bytes), f"of weights in {found.dtype}"))
    if found.plan is not None:
        adds = found.plan.multiply_adds / found.plan.dense_multiply_adds
        part.numbers.append((f"{adds:.0%}", "of the multiply-adds of the matrices that changed"))
    if (harm := predicted(found)) is not None:
        part.numbers.append((f"{harm:.3f}", "nats a token of harm predicted, before healing"))
    part.figures = _pictures(found)
    part.facts = _facts(found)
    if (table := _harm(found)) is not None:
        part.tables.append(table)
    if found.heal is not None:
        curve = [(p["tokens"], p["held_out"]) for p in found.heal.get("curve", [])]
        lines = [("held-out", curve)]
        trained = [
            (p["tokens"], p["training"]) for p in found.heal.get("curve", []) if "training" in p
        ]
        lines.append(("training", trained))
        drawn = charts.curves(lines, "tokens of healing", "loss, nats a token")
        part.figures.append(
            (drawn, "Healing: held-out text, and the text that was trained on.", ())
        )
    return part


def predicted(found: Directory) -> float | None:
    """Nats a token that the plan was predicted to cost; None where a part of it is not known.

    Matrices say what their fits cost, not what the hidden units cost that were taken out before.
    """
    total = found.provenance.get("predicted_harm")
    if isinstance(total, int | float):
        return float(total)
    if found.plan is None or any(m.narrowed for m in found.plan.matrices):
        return None
    measured = found.provenance.get("matrices")
    each = [m["harm"] for m in (measured or {}).values() if isinstance(m, dict) and "harm" in m]
    return math.fsum(each) if each else None


def _pictures(found: Directory) -> list[Figure]:
    if not found.by_block:
        return []
    now = [float(found.by_block.get(i, 0)) for i in range(max(found.by_block) + 1)]
    saved = saved_by_block(found.plan) if found.plan else {}
    before = [value + saved.get(i, 0) for i, value in enumerate(now)]
    caption = "Parameters of each block, before the outline of what the dense model has."
    made: list[Figure] = [(charts.blocks(before, now, "parameters"), caption, ())]
    if found.plan is None:
        return made
    # Of matrices that the plan leaves alone a token costs their parameters.
    old, new = list(before), list(now)
    rows: dict[str, list[tuple[float, str] | None]] = {}
    for matrix in found.plan.matrices:
        if (block := block_of(matrix)) is None or block >= len(now):
            continue
        new[block] += matrix.multiply_adds - matrix.parameters
        old[block] += matrix.dense_multiply_adds - matrix.dense_parameters
        kind = matrix.name.rpartition(".")[2]
        cells = rows.setdefault(kind, [None] * len(now))
        cells[block] = matrix.parameters / matrix.dense_parameters, _said(matrix)
    doubled = ([2 * v for v in old], [2 * v for v in new])
    caption = (
        "Floating-point operations of each block for one token, attention's products left out."
    )
    made.append((charts.blocks(*doubled, "operations a token"), caption, ()))
    caption = (
        "The model: how much stays of every matrix that the plan changes. Hover for its shape."
    )
    made.append((charts.grid(list(rows.items())), caption, ()))
    return made


def _said(matrix: MatrixPlan) -> str:
    """Name, width and factors of a matrix, for its title."""
    (m, n), (m0, n0) = matrix.shape, matrix.dense_shape or matrix.shape
    parts = [f"{matrix.name}: {m}x{n}" + (f" of {m0}x{n0}" if (m, n) != (m0, n0) else "")]
    for g in matrix.groups:
        if g.large[1] == 1 and g.small[0] == 1:
            parts.append(f"rank {g.terms}")
        else:
            parts.append(
                f"{g.terms} terms of {g.large[0]}x{g.large[1]} by {g.small[0]}x{g.small[1]}"
            )
    parts.append(f"{matrix.parameters / matrix.dense_parameters:.0%} of its parameters")
    return ", ".join(parts)


def _facts(found: Directory) -> list[tuple[str, str]]:
    facts = [("architecture", ", ".join(found.config.get("architectures") or ["unknown"]))]
    source = found.provenance
    for key, word in (("init", "factors by"), ("structure", "structure"), ("seed", "seed")):
        if source.get(key) is not None:
            facts.append((word, str(source[key])))
    for text in source.get("texts", []):
        facts.append((str(text.get("use")), f"{text.get('name')} ({text.get('origin')})"))
    healed = (found.heal or {}).get("settings") or source.get("healed")
    if healed:
        facts.append(
            (
                "healed",
                f"{healed['tokens']:,} tokens, loss {healed['loss']}, recipe {healed['recipe']}, "
                f"{healed['dtype']}, seed {healed['seed']}",
            )
        )
    if found.heal:
        facts += machine([found.heal.get("environment", {})])
    return facts


def _harm(found: Directory) -> Table | None:
    """The matrices that were predicted to cost the most."""
    measured = found.provenance.get("matrices")
    if not isinstance(measured, dict):
        return None
    entries = [(m["harm"], name, m) for name, m in measured.items() if "harm" in m]
    if not entries:
        return None
    entries.sort(reverse=True)
    rows = [
        Row([name, f"{harm:.5f}", f"{m['relative_error']:.3f}", f"{m['norm_kept']:.3f}"])
        for harm, name, m in entries[:WORST]
    ]
    return Table(["the matrices that cost the most", "harm, nats", "error", "norm kept"], rows)


def prediction(found: Found) -> Part | None:
    """Predicted harm beside what was measured, where both are known."""
    rows = []
    by_name = {str(d.path): d for d in found.directories}
    by_name |= {d.name: d for d in found.directories}
    for record in found.evaluations:
        results = record.get("results", {})
        nats = {name: result["nats"] for name, result in results.items()}
        for name in nats:
            directory = by_name.get(name)
            rest = [value for other, value in nats.items() if other != name]
            if directory is None or len(rest) != 1 or (harm := predicted(directory)) is None:
                continue
            text = results[name]["data"]
            when = "healed" if directory.heal else "not healed"
            rows.append(Row([name, text, f"{harm:.3f}", f"{nats[name] - rest[0]:.3f}", when]))
    if not rows:
        return None
    head = ["model", "text", "predicted, nats", "measured, nats", ""]
    part = Part("Harm, predicted and measured", tables=[Table(head, rows)])
    part.notes.append(
        "Predicted to second order on the calibration text, before healing; measured against the "
        "dense model on another text."
    )
    return part


def evaluation(records: list[Record]) -> Part | None:
    """Perplexities and scores of tasks."""
    if not records:
        return None
    part = Part("Measured")
    for record in records:
        results, tasks = record.get("results", {}), record.get("tasks", {})
        if results:
            first = next(iter(results.values()))
            head = ["model", f"perplexity on {first['data']}", "against the last", "bits a byte"]
            last = list(results.values())[-1]["perplexity"]
            rows = [
                Row(
                    [
                        name,
                        number(r["perplexity"]),
                        times(r["perplexity"] / last),
                        f"{r['bits_per_byte']:.3f}" if r.get("bits_per_byte") else "-",
                    ]
                )
                for name, r in results.items()
            ]
            part.tables.append(Table(head, rows))
            part.notes.append(
                f"{first['data']}: {first['tokens']:,} tokens, protocol {first['protocol']}, "
                f"window {first['window']}, stride {first['stride']}, {first['dtype']}."
            )
        if tasks:
            part.tables.append(_scores(tasks))
    part.facts = machine(record.get("environment", {}) for record in records)
    return part


def _scores(tasks: Record) -> Table:
    rows = []
    for task, figures in next(iter(tasks.values())).items():
        for figure in figures:
            if not is_score(figure):
                continue
            values = [each.get(task, {}).get(figure) for each in tasks.values()]
            shown = ["-" if v is None else f"{v:.4f}" if abs(v) < 10 else number(v) for v in values]
            count = f"{figures.get('examples', 0):,}"
            rows.append(Row([task, figure, *shown, count]))
    return Table(["task", "figure", *tasks, "examples"], rows)


def speed(records: list[Record]) -> Part | None:
    """What `krony bench` measured."""
    if not records:
        return None
    part = Part("Speed")
    for record in records:
        keys = [k for k, v in record["rows"][0].items() if isinstance(v, str | int | float)]
        rows = [Row([_cell(row.get(key)) for key in keys]) for row in record["rows"]]
        part.tables.append(Table(keys, rows))
    part.facts = machine(record.get("environment", {}) for record in records)
    return part


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value) if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"
    return "-" if value is None else str(value)


def sizes(found: Found) -> Figure | None:
    """Bytes of directories against their perplexity, where an evaluation names them."""
    by_name = {str(d.path): d for d in found.directories}
    points = []
    for record in found.evaluations:
        for name, result in record.get("results", {}).items():
            if (directory := by_name.get(name)) is not None:
                points.append(Point(directory.bytes, result["perplexity"], directory.name, True))
    if len(points) < 2:
        return None
    return charts.pareto(points, "bytes", "perplexity"), "Perplexity against bytes of weights.", ()
