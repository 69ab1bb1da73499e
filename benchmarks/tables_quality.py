"""Tables of docs/results.md about perplexity: compression, healing, quantized forms."""

import json
from typing import Any

from tabular import DOCS, markdown, million, number, percent, read, table, times


@table
def environment(name: str) -> str:
    """Machine, versions and date of one file, as a sentence."""
    found = read(name)["environment"]
    gpu = "" if found["gpu"] == "none" else f", {found['gpu']}"
    return (
        f"Measured {found['date']}: Python {found['python']}, torch {found['torch']}, "
        f"transformers {found['transformers']}, CPU with {found['cpu']}{gpu}."
    )


@table
def summary() -> str:
    """The real model, best rows by size: parameters, perplexity, speed."""
    return _real_rows([r for r in read("smollm2")["rows"] if r.get("summary")])


@table
def real_model() -> str:
    """The real model, every row."""
    return _real_rows(read("smollm2")["rows"])


def _real_rows(rows: list[dict[str, Any]]) -> str:
    dense = read("smollm2")["rows"][0]["perplexity"]
    return markdown(
        [
            "SmolLM2-135M",
            "parameters",
            "perplexity",
            "against dense",
            "healed",
            "decode",
            "prefill",
        ],
        (
            [
                r["method"],
                million(r["parameters"]),
                f"{r['perplexity']:,.4g}",  # as many digits as were written down
                times(r["perplexity"] / dense, 2),
                times(r["healed"] / dense, 2) if "healed" in r else "-",
                *(times(r[key], 2) if key in r else "-" for key in ("decode", "prefill")),
            ]
            for r in rows
        ),
    )


@table
def real_model_note() -> str:
    """Who measured the real model, when."""
    found = read("smollm2")
    return f"Measured {found['environment']['date']} by {found['by']}; no training but where said."


@table
def smollm2_protocol() -> str:
    """How the real model was measured."""
    return f"{read('smollm2')['what']}. {environment('smollm2')}"


@table
def paper(name: str) -> str:
    """The paper's initialisations in both orders of factors."""
    rows = read(f"paper-{name}")["rows"]
    found = {(r["part"], r["init"], r["layout"]): r for r in rows}
    return markdown(
        ["MLPs", "initialization", "parameters", "large-outer (the paper's order)", "small-outer"],
        (
            [
                f"a {part}",
                init,
                million(r["parameters"]),
                *(
                    f"{number(found[part, init, layout]['perplexity'])} "
                    f"({times(found[part, init, layout]['against_dense'])})"
                    for layout in ("large-outer", "small-outer")
                ),
            ]
            for (part, init, layout), r in found.items()
            if layout == "large-outer"
        ),
    )


@table
def demo() -> str:
    """`krony demo`, every row."""
    rows = json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))["rows"]
    head = ["MLPs", "of dense", "parameters", "on disk (float32)", "perplexity", "against dense"]
    return markdown(
        [*head, "factors", "reloaded"],
        (
            [
                row["name"],
                percent(row["mlp_share"]),
                f"{row['parameters']:,}",
                f"{row['bytes'] / 1e6:.2f} MB",
                number(row["perplexity"]),
                f"{row['perplexity'] / rows[0]['perplexity']:,.2f}x",
                f"{row['factorize_seconds']:.2f} s",
                "equal" if row["reloaded_equal"] else "differs",
            ]
            for row in rows
        ),
    )


@table
def packaged() -> str:
    """The packaged model on text that it was not trained on."""
    final = json.loads((DOCS / "pretrain_demo.json").read_text(encoding="utf-8"))["final"]
    texts = {
        "validation": "held-out docstrings (2 % of documents)",
        "topics": "`pydoc_data.topics`, the language reference, never trained on",
    }
    return markdown(
        ["text", "nats a token", "perplexity"],
        (
            [label, f"{final[key]['nats_per_token']:.4f}", f"{final[key]['perplexity']:.2f}"]
            for key, label in texts.items()
        ),
    )


@table
def factorise() -> str:
    """Seconds to factor GPT-2 small's MLPs."""
    rows = read("factorise")["rows"]
    return markdown(
        ["plan", "parameters of the model", "seconds"],
        ([r["plan"], f"{r['parameters']:,}", f"{r['seconds']:.2f}"] for r in rows),
    )


@table
def methods(part: str) -> str:
    """Every method at one share of the packaged model's MLPs."""
    return markdown(
        ["method", "share", "topics", "against dense", "docstrings", "against dense",
         "multiply-adds", "seconds"],
        (
            [
                r["name"],
                percent(r["share"]),
                number(r["topics"]["perplexity"]),
                times(r["topics"]["against_dense"]),
                number(r["docstrings"]["perplexity"]),
                times(r["docstrings"]["against_dense"]),
                f"{r['multiply_adds']:.2f}x",
                f"{r['seconds']:.0f}",
            ]
            for r in read("initialisations")[part]
        ),
    )  # fmt: skip


@table
def chosen_plans() -> str:
    """What a budget chose, matrix by matrix, at a quarter and at a half."""
    found = read("initialisations")
    quarter, half = (
        next(r["plan"] for r in found[part] if r["name"] == "budget, data")
        for part in ("quarter", "half")
    )

    def text(parts: list[str]) -> str:
        plain = [part.removesuffix(" interpolative") for part in parts]
        return f"{plain[0]}: {' + '.join(plain[1:])}"

    return markdown(
        ["matrix", "a quarter", "a half"],
        ([name, text(quarter[name]), text(half[name])] for name in quarter),
    )


@table
def ablation() -> str:
    """Each ingredient of the default removed in turn."""
    return markdown(
        ["without", "share", "topics, against dense", "docstrings, against dense"],
        (
            [
                r["name"],
                percent(r["share"]),
                times(r["topics"]["against_dense"]),
                times(r["docstrings"]["against_dense"]),
            ]
            for r in read("initialisations")["ablation_quarter"]
        ),
    )


@table
def prediction() -> str:
    """One sentence: predicted harm against measured loss."""
    found = read("initialisations")["prediction"]
    return (
        f"**Predicted harm against measured loss**, {len(found['points'])} random plans fitted "
        "independently, with 512 to 1,024 hidden units at random in every MLP and low rank in "
        f"every matrix: Spearman rank correlation {found['spearman']:.3f}."
    )


@table
def embedding() -> str:
    """The embedding of the packaged model alone."""
    rows = []
    for r in read("targets")["embedding"]:
        share, init = r["method"].split()
        rows.append(
            [
                init,
                percent(float(share), 0),
                f"{r['parameters']:,}",
                number(r["topics"]["perplexity"]),
                times(r["topics"]["against_dense"]),
                times(r["docstrings"]["against_dense"]),
            ]
        )
    head = ["factors by", "of the embedding", "parameters of the model"]
    return markdown([*head, "perplexity, reference", "against dense", "docstrings"], rows)


SPENT = {
    "mlp": "MLPs",
    "all": "MLPs and attention",
    "everything": "MLPs, attention and the embedding",
}


@table
def whole() -> str:
    """One size for the whole packaged model, spent on ever more of it."""
    return markdown(
        ["spent on", "parameters of the model", "predicted, nats", "reference, against dense",
         "docstrings"],
        (
            [
                SPENT[r["method"]],
                f"{r['parameters']:,}",
                f"{r['predicted_nats']:.3f}",
                times(r["topics"]["against_dense"]),
                times(r["docstrings"]["against_dense"]),
            ]
            for r in read("targets")["whole"]
        ),
    )  # fmt: skip


@table
def second_family() -> str:
    """The small Llama, every method at both shares."""
    found = read("llama")
    return markdown(
        ["MLPs", "method", "topics", "docstrings", "seconds"],
        (
            [
                f"a {part}",
                r["method"],
                times(r["topics"]["against_dense"]),
                times(r["docstrings"]["against_dense"]),
                f"{r['seconds']:.0f}",
            ]
            for part in ("quarter", "half")
            for r in found[part]
        ),
    )


@table
def scale() -> str:
    """What calibrating and fitting take at GPT-2 small's size."""
    found = read("scale")
    moments, following = found["moments"], found["following"]
    windows = f"4 and {moments['measured_windows']} windows"

    def minutes(seconds: float) -> str:
        return f"{seconds / 60:.1f}"

    rows: list[list[object]] = [
        [
            "moments and loss gradients",
            f"{windows} of 128",
            f"{moments['measured_seconds_a_window']:.1f} a window, "
            f"{moments['measured_seconds_once']:.1f} once",
            minutes(moments["seconds"]),
        ]
    ]
    labels = {"narrowed": "planning a budget of a quarter: widths, then prices",
              "with all units": "the same with all hidden units"}  # fmt: skip
    for key, label in labels.items():
        r = found["planning"][key]
        seconds = f"{r['measured_seconds_a_block']:.0f}"
        rows.append([label, "one block of 12", seconds, minutes(r["seconds"])])
    for r in found["algebra"]:
        seconds = f"{r['measured_seconds_a_block']:.1f}"
        label = f"factors, a quarter: {r['factors']}"
        rows.append([label, "one block of 12", seconds, minutes(r["seconds"])])
    rows.append(
        [
            "following the inputs from block to block",
            f"{windows}, one block",
            f"{following['measured_seconds_a_window_and_block']:.2f} a window",
            minutes(following["seconds"]),
        ]
    )
    return markdown(["what", "measured on", "seconds measured", "minutes in all"], rows)


@table
def quantized() -> str:
    """Quantized forms of the packaged model and two compressed ones."""
    rows = read("quantized")["rows"]
    base = {r["model"]: r["perplexity"] for r in rows if r["form"] == "float16"}
    return markdown(
        ["model", "weights", "on disk", "perplexity", "against itself in float16"],
        (
            [
                r["model"],
                r["form"],
                f"{r['bytes'] / 1e6:.2f} MB",
                number(r["perplexity"]),
                f"{r['perplexity'] / base[r['model']]:.4f}x",
            ]
            for r in rows
        ),
    )


@table
def same_bytes() -> str:
    """What commands write, against an earlier version."""
    content = read("bytes")
    rows = []
    for row, run in zip(content["against"], content["rows"], strict=True):
        weights: list[tuple[str, str]] = []
        others: list[tuple[str, str]] = []
        for path, how in row["differs"].items():
            name = path.partition("/")[2] or path
            if name.endswith(".py"):
                name, how = "modules that travel along", ""
            (weights if name.endswith((".safetensors", ".onnx")) else others).append((name, how))
        says = "; ".join(how for _, how in weights) or "equal" * any(
            path.endswith((".safetensors", ".onnx")) for path in run["files"]
        )
        names = ", ".join(dict.fromkeys(name for name, _ in others))
        rows.append([f"`{row['command']}`", says or "-", row["equal"], names or "-"])
    return markdown(["command", "weights", "files equal", "other files that differ"], rows)
