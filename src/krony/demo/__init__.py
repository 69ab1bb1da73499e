"""`krony demo`: the main job on the packaged model, every figure measured then and there.

`model/` holds a GPT-2 of 4.3 million parameters, trained by `recipes/pretrain_demo.py` on the
docstrings of Python and its libraries. The text it is measured on, the language reference inside
`pydoc_data`, was held out from that training.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.compression import calibrate
from krony.compression.budget import make_budget_plan
from krony.compression.factorise import DATA, compress
from krony.compression.inits import INITS
from krony.hf import checkpoints
from krony.hf.plan import Plan, make_plan
from krony.maths.kron import Shape
from krony.measure import evaluate, info
from krony.text import data

PROMPT = "Return the number of"
# Small factors: a half of the MLP parameters (hidden axis halved) and a quarter (both halved).
SIZES: dict[str, Shape] = {"half": (2, 1), "quarter": (2, 2)}
BUDGET = ("quarter", f"{DATA}, budget")
CHARACTERS = 240_000  # about half of the text: the whole takes twice as long


def run(
    output: Path,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    characters: int | None = CHARACTERS,
    windows: int = 128,
) -> dict[str, Any]:
    """Compress the packaged model with each initialization at two sizes; measure; draw.

    The last model is at the smaller size again, its shapes found for that budget and its factors
    fitted to data.

    Args:
        output: folder for demo.json and demo.png; made if need be.
        progress: called with (what, steps done, steps in all).
        characters: evaluate on the head of the text; None: on all of it.
        windows: of calibration text for the last model.
    Returns:
        What demo.json holds: the protocol, the environment, one row a model (the dense one first).
    """
    tokenizer = checkpoints.load_tokenizer(checkpoints.DEMO)
    text = data.load_text("python-docs")
    text = data.Text(text.name, text.text[:characters], text.origin)
    ids = evaluate.tokenize(tokenizer, text)
    jobs = [(size, init) for size in SIZES for init in INITS] + [BUDGET]
    rows = []
    for number, job in enumerate([None, *jobs]):
        name = "dense" if job is None else f"{job[0]}, {job[1]}"
        progress(name, number, len(jobs) + 1)
        model = checkpoints.load_model(checkpoints.DEMO, torch.float32)
        share, started = 1.0, time.perf_counter()
        if job is not None:
            if job == BUDGET:
                plan = _by_budget(model, tokenizer, windows)
            else:
                # The order of factors that the paper has.
                plan = make_plan(model, small=SIZES[job[0]], layout="large-outer")
                compress(model, plan, init=job[1])
            share = plan.parameters / plan.dense_parameters
        seconds = time.perf_counter() - started if job else 0.0
        result = evaluate.perplexity(model, ids, text)
        size, equal = _round_trip(model, ids[:64])
        rows.append(
            {
                "name": name,
                "size": job[0] if job else "dense",
                "init": job[1] if job else None,
                "mlp_share": share,
                "parameters": info.parameters(model),
                "bytes": size,
                "perplexity": result.perplexity,
                "nats": result.nats,
                "factorize_seconds": seconds,
                "evaluate_seconds": result.seconds,
                "reloaded_equal": equal,
                "text": evaluate.generate(model, tokenizer, PROMPT, 24, temperature=0.7),
            }
        )
    record = {
        "environment": evaluate.environment(),
        "data": result.origin,
        "protocol": result.protocol,
        "window": result.window,
        "stride": result.stride,
        "windows": result.windows,
        "tokens": result.tokens,
        "prompt": PROMPT,
        "rows": rows,
    }
    checkpoints.write_json(output / "demo.json", record)
    checkpoints.write_file(output / "demo.png", lambda path: draw(record, path))
    return record


def _by_budget(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: int) -> Plan:
    """Compress the model to a quarter of its MLP parameters, whatever shapes that takes."""
    tokens = calibrate.calibration_windows("python-docstrings", model, tokenizer, windows)
    found = make_budget_plan(model, tokens, share=0.25, sums=True)
    compress(model, found.plan, init=DATA, calibration=tokens, moments=found.moments)
    return found.plan


def _round_trip(model: PreTrainedModel, ids: torch.Tensor) -> tuple[int, bool]:
    """Bytes of the saved weights, and whether the reloaded model's logits are equal to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        saved = checkpoints.save_model(model, Path(folder) / "model")
        again = checkpoints.load_model(saved)
        with torch.inference_mode():
            equal = torch.equal(model(ids[None]).logits, again(ids[None]).logits)
        return checkpoints.directory_bytes(saved), equal


def draw(record: dict[str, Any], path: Path) -> None:
    """Perplexity by initialization, a group of bars a size, the dense model as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dense, rows = record["rows"][0], record["rows"][1:]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    series = list(dict.fromkeys(row["init"] for row in rows))
    width = 0.85 / len(series)
    for offset, init in enumerate(series):
        mine = [row for row in rows if row["init"] == init]
        shift = (offset - (len(series) - 1) / 2) * width
        places = [list(SIZES).index(row["size"]) + shift for row in mine]
        bars = axes.bar(places, [row["perplexity"] for row in mine], width * 0.92, label=init)
        axes.bar_label(bars, [f"{row['perplexity']:,.0f}" for row in mine], fontsize=8, padding=2)
    label = f"dense {dense['perplexity']:.1f}"
    axes.axhline(dense["perplexity"], color="black", linestyle="--", linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_ylim(dense["perplexity"] / 2, max(row["perplexity"] for row in rows) * 60)
    axes.set_xticks(range(len(SIZES)), [_size_label(rows, size) for size in SIZES])
    axes.set_ylabel("perplexity (log scale)")
    axes.set_title("MLPs factored, no training: held-out perplexity by initialization", fontsize=11)
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)


def _size_label(rows: list[dict[str, Any]], size: str) -> str:
    row = next(row for row in rows if row["size"] == size)
    share = 100 * row["mlp_share"]
    return f"{share:.0f} % of the MLP parameters\n{row['parameters'] / 1e6:.2f}M in all"
