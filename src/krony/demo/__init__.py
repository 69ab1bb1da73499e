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
from transformers import PreTrainedModel

from krony import checkpoints, data, evaluate, info
from krony.factorise import INITS, compress
from krony.kron import Shape
from krony.plan import make_plan

PROMPT = "Return the number of"
# Small factors: a half of the MLP parameters (hidden axis halved) and a quarter (both halved).
SIZES: dict[str, Shape] = {"half": (2, 1), "quarter": (2, 2)}


def run(
    output: Path,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    characters: int | None = None,
) -> dict[str, Any]:
    """Compress the packaged model with each initialisation at two sizes; measure; draw.

    Args:
        output: folder for demo.json and demo.png; made if need be.
        progress: called with (what, steps done, steps in all).
        characters: evaluate on the head of the text only.
    Returns:
        What demo.json holds: the protocol, the environment, one row a model (the dense one first).
    """
    tokenizer = checkpoints.load_tokenizer(checkpoints.DEMO)
    text = data.load_text("python-docs")
    text = data.Text(text.name, text.text[:characters], text.origin)
    ids = evaluate.tokenize(tokenizer, text)
    jobs = [(size, init) for size in SIZES for init in INITS]
    rows = []
    for number, job in enumerate([None, *jobs]):
        name = "dense" if job is None else f"{job[0]}, {job[1]}"
        progress(name, number, len(jobs) + 1)
        model = checkpoints.load_model(checkpoints.DEMO, torch.float32)
        share, seconds = 1.0, 0.0
        if job is not None:
            plan, started = make_plan(model, small=SIZES[job[0]]), time.perf_counter()
            compress(model, plan, init=job[1])
            seconds = time.perf_counter() - started
            share = plan.parameters / plan.dense_parameters
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
                "factorise_seconds": seconds,
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


def _round_trip(model: PreTrainedModel, ids: torch.Tensor) -> tuple[int, bool]:
    """Bytes of the saved weights, and whether the reloaded model's logits are equal to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        saved = checkpoints.save_model(model, Path(folder) / "model")
        again = checkpoints.load_model(saved)
        with torch.inference_mode():
            equal = torch.equal(model(ids[None]).logits, again(ids[None]).logits)
        return checkpoints.directory_bytes(saved), equal


def draw(record: dict[str, Any], path: Path) -> None:
    """Perplexity by initialisation, a group of bars a size, the dense model as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dense, rows = record["rows"][0], record["rows"][1:]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(INITS)
    for offset, init in enumerate(INITS):
        mine = [row for row in rows if row["init"] == init]
        places = [i + (offset - (len(INITS) - 1) / 2) * width for i in range(len(mine))]
        bars = axes.bar(places, [row["perplexity"] for row in mine], width * 0.92, label=init)
        axes.bar_label(bars, [f"{row['perplexity']:,.0f}" for row in mine], fontsize=8, padding=2)
    label = f"dense {dense['perplexity']:.1f}"
    axes.axhline(dense["perplexity"], color="black", linestyle="--", linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_ylim(dense["perplexity"] / 2, max(row["perplexity"] for row in rows) * 2)
    axes.set_xticks(range(len(SIZES)), [_size_label(rows, size) for size in SIZES])
    axes.set_ylabel("perplexity (log scale)")
    axes.set_title("MLPs factored, no training: held-out perplexity by initialisation", fontsize=11)
    axes.legend(frameon=False, ncols=len(INITS) + 1, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)


def _size_label(rows: list[dict[str, Any]], size: str) -> str:
    row = next(row for row in rows if row["size"] == size)
    share = 100 * row["mlp_share"]
    return f"{share:.0f} % of the MLP parameters\n{row['parameters'] / 1e6:.2f}M in all"
