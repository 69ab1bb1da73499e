"""Tables of docs/results.md about healing, and those that sum up before and after it."""

import json
from statistics import mean
from typing import Any

from tables_speed import DECODE, PREFILL, model_speed
from tabular import DOCS, RESULTS, markdown, million, percent, read, table, times


@table
def readme() -> str:
    """README's one table: size, quality and speed of a real model, a toy, and GPT-2's shapes."""
    dense = read("smollm2")["rows"][0]["perplexity"]
    rows = []
    for r in read("smollm2")["rows"][1:]:
        if r.get("summary"):
            healed_to = times(r["healed"] / dense, 2) if "healed" in r else "-"
            speeds = [times(r[key], 2) if key in r else "-" for key in ("decode", "prefill")]
            name = f"SmolLM2-135M, {r['method']}"
            quality = times(r["perplexity"] / dense, 2)
            rows.append([name, million(r["parameters"]), quality, healed_to, *speeds])
    quarter = next(r for r in read("initialisations")["quarter"] if r["name"] == "budget, data")
    toy = next(
        r for r in json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))["rows"][::-1]
    )
    rows.append(
        [
            "packaged model, a quarter of the MLPs",
            million(toy["parameters"]),
            times(quarter["topics"]["against_dense"], 2),
            times(float(healed("budget, kl+features, default", "topics")[:-1]), 2),
            "-",
            "-",
        ]
    )
    speeds = [model_speed("a quarter by a budget", what) for what in (DECODE, PREFILL)]
    size = read("model-budget")["parameters"]["a quarter by a budget"]
    rows.append(["GPT-2 small's shapes, a quarter of the MLPs", million(size), "-", "-", *speeds])
    head = ["model", "parameters", "perplexity, untrained", "healed", "decode", "prefill"]
    return markdown(head, rows)


@table
def packaged_summary() -> str:
    """A quarter of the packaged model's MLPs: methods before and after healing."""
    before = {r["name"]: r["topics"]["against_dense"] for r in read("initialisations")["quarter"]}
    recipe = "kl+features, default"
    rows = {
        "paper's scaled Van Loan": ("paper, van-loan-scaled", f"van-loan-scaled, {recipe}"),
        "whitened SVD": ("low rank, whitened SVD", f"whitened SVD, {recipe}"),
        "low rank by data": ("low rank, data", f"low rank, {recipe}"),
        "balanced Kronecker sums by data": ("balanced sum, data", f"balanced sum, {recipe}"),
        "fewer hidden units": ("narrowed, data", f"narrowed, {recipe}"),
        "what a budget finds (the default)": ("budget, data", f"budget, {recipe}"),
    }
    return markdown(
        ["method", "no training", "healed with 1.2M tokens"],
        ([name, times(before[m]), healed(cell, "topics")] for name, (m, cell) in rows.items()),
    )


@table
def objectives() -> str:
    """What the planner's objectives cost."""
    found = read("objectives")
    return markdown(
        ["`--objective`", "what it finds", "multiply-adds", "in memory", "predicted harm",
         "after 1.2M tokens: topics, docstrings", "speed, float32", "bfloat16"],
        (
            [
                f"`{r['objective']}`",
                r["finds"],
                percent(r["multiply_adds"]),
                percent(r["in_memory"]),
                f"{r['predicted_nats']:.3f}",
                f"{healed(r['cell'], 'topics')}, {healed(r['cell'], 'docstrings')}",
                r["speed_float32"],
                r["speed_bfloat16"],
            ]
            for r in found["rows"]
        ),
    )  # fmt: skip


def cells() -> list[dict[str, Any]]:
    """All healing runs."""
    files = sorted((RESULTS / "healing").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def healed(cell: str, text: str) -> str:
    """The mean over seeds of one cell after 1.2M tokens, against dense."""
    found = [c for c in cells() if c["cell"] == cell and c["tokens"] == 1_200_000]
    return times(mean(c["against_dense"][text] for c in found))


@table
def healing() -> str:
    """Every start, loss and seed, after 1.2M and after 5M tokens."""
    runs: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for cell in cells():
        name, tokens = cell["cell"], cell["tokens"]
        if tokens not in (1_200_000, 5_000_000):
            spelled = f"{tokens / 1e6:g}M" if tokens >= 1e6 else f"{tokens // 1000}k"
            name, tokens = f"{name}, {spelled} tokens", 1_200_000
        runs.setdefault((name, cell["seed"]), {})[tokens] = cell
    rows = []
    for (name, seed), found in runs.items():
        first = found.get(1_200_000, next(iter(found.values())))
        row: list[object] = [
            name + (f", seed {seed}" if seed else ""),
            first["settings"]["dtype"],
            f"{first['before']['topics']:,.1f}",
        ]
        for tokens in (1_200_000, 5_000_000):
            for text in ("topics", "docstrings"):
                there = found.get(tokens)
                row.append(times(there["against_dense"][text]) if there else "-")
        rows.append((first["against_dense"]["topics"], row))
    rows.sort(key=lambda pair: -pair[0])
    return markdown(
        ["start, loss", "precision", "topics before", "1.2M tokens: topics", "docstrings",
         "5M tokens: topics", "docstrings"],
        (row for _, row in rows),
    )  # fmt: skip
