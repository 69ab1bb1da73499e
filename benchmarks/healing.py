"""Healing on the packaged model: initialisations, losses and recipes at equal tokens.

Cell by cell: a cell that has its JSON file is not run again, and an interrupted one resumes.

python benchmarks/healing.py [--cells NAME ...] [--tokens 1.2M] [--seeds 0] [--list]
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

import krony
import methods
from krony.compression import calibrate
from krony.compression.budget import make_budget_plan
from krony.compression.factorise import DATA
from krony.healing import curves
from krony.healing.recipe import RECIPES, Recipe, Stage
from krony.hf.checkpoints import write_json, write_text
from krony.measure import evaluate
from krony.measure.memory import keep_memory
from krony.text import blocks, data
from krony.text.docstrings import installed, python_docstrings
from krony.words import parse_count
from records import RESULTS, parser, surroundings

WINDOW, EVALUATED, CALIBRATION = 256, 65_536, 256
HELD_OUT = 64  # blocks that choose the best weights
# What the planner is told for each of the starts that it finds.
PLANNED: dict[str, dict[str, Any]] = {
    "budget": {"sums": True},
    "budget for decode": {"objective": "decode", "sums": True},
    "budget for throughput": {"objective": "throughput"},
    "mix": {"sums": True, "narrow": False},
}
COMPARISON = "comparison"  # one plain recipe for all starts and losses


def comparison(width: int, tokens: int) -> Recipe:
    """AdamW, 4,096 tokens a step."""
    return Recipe((Stage(4096, 1.5e-3, 0.0, 50),), decay=0.0)


RECIPES[COMPARISON] = comparison


@dataclass(frozen=True)
class Cell:
    """One run: how the quarter-size MLPs start, and what they are trained on.

    "budget" is what the planner finds with sums, "budget for decode" and "for
    throughput" with these; "mix" what it finds with all hidden units, low rank beside
    balanced sums; "narrowed" fewer units and nothing factored.
    """

    start: str
    loss: str
    recipe: str = COMPARISON

    @property
    def name(self) -> str:
        recipe = "" if self.recipe == COMPARISON else f", {self.recipe}"
        return f"{self.start}, {self.loss}{recipe}"


CELLS = [
    Cell("van-loan-scaled", "ce"),
    Cell("van-loan-scaled", "kl"),
    Cell("whitened SVD", "kl"),
    Cell("low rank", "kl"),
    Cell("balanced sum", "kl"),
    Cell("mix", "kl"),
    Cell("narrowed", "kl"),
    Cell("budget", "kl"),
    Cell("mix", "kl", "default"),
    Cell("budget", "kl", "default"),
    Cell("budget", "kl+features", "default"),
    Cell("budget for decode", "kl+features", "default"),
    Cell("budget for throughput", "kl+features", "default"),
    Cell("mix", "kl+features", "default"),
    Cell("narrowed", "kl+features", "default"),
    Cell("balanced sum", "kl+features", "default"),
    Cell("low rank", "kl+features", "default"),
    Cell("whitened SVD", "kl+features", "default"),
    Cell("van-loan-scaled", "kl+features", "default"),
    Cell("mix", "ce"),
    Cell("narrowed", "ce"),
    Cell("budget", "ce"),
    Cell("whitened SVD", "ce"),
    Cell("low rank", "ce"),
    Cell("balanced sum", "ce"),
    Cell("one term", "kl"),
    Cell("one term", "ce"),
    Cell("van-loan", "ce"),
    Cell("van-loan", "kl"),
    Cell("prune, half", "ce"),
    Cell("prune, half", "kl"),
    Cell("random", "ce"),
    Cell("random", "kl"),
    Cell("dense", "ce"),
    Cell("van-loan-scaled", "ce", "krony-pt"),
    Cell("van-loan-scaled", "ce", "default"),
    Cell("mix", "ce+kl"),
    Cell("budget", "kl+features"),
    Cell("mix", "kl+features", "lora"),
]

# All starts with KL, the paper's with its own loss, and the best.
DRAWN = {
    *(cell.name for cell in CELLS if cell.loss == "kl" and cell.recipe == COMPARISON),
    *("van-loan-scaled, ce", "mix, kl+features, default", "budget, kl+features, default"),
} - {"prune, half, kl", "random, kl"}


def started(start: str, folder: Path) -> transformers.PreTrainedModel:
    """The packaged model with its MLPs factored, made once and kept in `folder`."""
    if start == "dense":
        return krony.load_model("demo", torch.float32)
    path = folder / start.replace(" ", "-").replace(",", "")
    if not path.exists():
        model = krony.load_model("demo", torch.float32)
        windows, moments = None, None
        if start in (*PLANNED, methods.ONE_TERM, *methods.STRUCTURES):
            tokenizer = krony.load_tokenizer("demo")
            windows = calibrate.calibration_windows(
                "python-docstrings", model, tokenizer, CALIBRATION
            )
        if windows is not None and start in PLANNED:
            budget = make_budget_plan(model, windows, share=0.25, **PLANNED[start])
            found, moments = methods.Start(budget.plan, DATA), budget.moments
        elif start == "prune, half":
            found = methods.named(model, "prune", 0.5)
        else:
            found = methods.named(model, start, 0.25)
        krony.compress(
            model,
            found.plan,
            init=found.init,
            calibration=windows,
            moments=moments,
            options=found.options,
        )
        krony.save_model(model, path, krony.load_tokenizer("demo"))
    return krony.load_model(path, torch.float32)


def held_out_docstrings(work: Path) -> data.Text:
    """Of every installed package; kept in `work`, since reading them takes minutes."""
    path = work / f"docstrings-{installed()[:16]}.txt"
    if not path.exists():
        write_text(path, data.SEPARATOR.join(python_docstrings("validation")))
    return data.Text("docstrings", path.read_text(encoding="utf-8"), "held out")


def run(cell: Cell, tokens: int, seed: int, work: Path, out: Path) -> None:
    """Start, heal, measure on both held-out texts, and write the cell's JSON."""
    keep_memory()
    tokenizer = krony.load_tokenizer("demo")
    model = started(cell.start, work)
    texts = {"topics": data.load_text("python-docs"), "docstrings": held_out_docstrings(work)}
    ids = {name: evaluate.tokenize(tokenizer, text)[:EVALUATED] for name, text in texts.items()}
    before = {name: evaluate.perplexity(model, i).perplexity for name, i in ids.items()}
    training = blocks.load_blocks(["python-docstrings"], tokenizer, WINDOW)
    training, held_out = blocks.hold_out(training)
    teacher = krony.load_model("demo", torch.float32)
    config = krony.HealConfig(
        tokens=tokens,
        recipe=cell.recipe,
        loss=cell.loss,
        seed=seed,
        eval_every=tokens // 6,
        save_minutes=3,
    )
    folder = work / out.stem
    started_at = time.perf_counter()
    record = krony.heal(
        model,
        training,
        config,
        run=folder,
        evaluation=held_out.select(range(HELD_OUT)),
        teacher=teacher if cell.loss != "ce" else None,
        resume=folder.exists(),
    )
    after = {name: evaluate.perplexity(model, i).perplexity for name, i in ids.items()}
    dense = {name: evaluate.perplexity(teacher, i).perplexity for name, i in ids.items()}
    write_json(
        out,
        {
            "cell": cell.name,
            "tokens": tokens,
            "seed": seed,
            "before": before,
            "after": after,
            "dense": dense,
            "against_dense": {name: after[name] / dense[name] for name in ids},
            "curve": record.curve,
            "speed": record.speed,
            "settings": record.settings,
            "seconds": round(time.perf_counter() - started_at),
            "environment": surroundings(),
        },
    )
    shutil.rmtree(folder)


def summary(folder: Path, tokens: int, spelled: str) -> None:
    """The table of all cells that are there, and the picture of those with so many tokens."""
    records = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    records.sort(key=lambda r: (r["tokens"], r["after"]["topics"]))
    print("| start, loss | tokens | seed | topics before | after | against dense | docstrings |")
    print("|---|---|---|---|---|---|---|")
    for r in records:
        print(
            f"| {r['cell']} | {r['tokens'] / 1e6:.1f}M | {r['seed']} "
            f"| {r['before']['topics']:,.1f} | {r['after']['topics']:.2f} "
            f"| {r['against_dense']['topics']:.3f}x | {r['against_dense']['docstrings']:.3f}x |"
        )
    runs = {
        r["cell"]: r["curve"]
        for r in records
        if r["tokens"] == tokens and r["seed"] == 0 and r["cell"] in DRAWN
    }
    if not runs:
        return
    # Those far behind would leave no room for the others.
    last = {name: curve[-1]["held_out"] for name, curve in runs.items()}
    runs = {name: curve for name, curve in runs.items() if last[name] < min(last.values()) + 0.7}
    title = f"Healing with {spelled} tokens at a quarter of the MLP parameters"
    curves.draw(runs, folder.with_name(f"{folder.name}-{spelled}.png"), title)


def main() -> None:
    """Run the cells that are missing, then print the table."""
    made = parser(__doc__ or "", "healing")
    made.set_defaults(out=RESULTS / "healing")  # a folder, of a file for each cell
    names = [cell.name for cell in CELLS]
    made.add_argument("--cells", nargs="+", default=names, choices=names, metavar="NAME")
    made.add_argument("--tokens", default="1.2M")
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--work", type=Path, default=Path("healing-work"))
    made.add_argument("--list", action="store_true", help="only show what there is")
    options = made.parse_args()
    if options.small:
        options.cells, options.tokens = options.cells[:1], "8k"
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokens = parse_count(options.tokens, "--tokens")
    assert tokens is not None
    began = time.perf_counter()
    for seed in options.seeds:
        for cell in [] if options.list else CELLS:
            if options.limit is not None and time.perf_counter() - began > options.limit:
                break
            stem = f"{cell.name} {options.tokens} {seed}".replace(",", "").replace(" ", "-")
            out = options.out / f"{stem}.json"
            if cell.name in options.cells and not out.exists():
                run(cell, tokens, seed, options.work, out)
                print(f"{cell.name}: {json.loads(out.read_text())['after']}", flush=True)
    summary(options.out, tokens, options.tokens)


if __name__ == "__main__":
    main()
