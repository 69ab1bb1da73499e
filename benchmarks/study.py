"""Compression of one model, method by method at equal sizes, before and after equal healing.

    python benchmarks/study.py runs/study --model MODEL --data CORPUS/corpus-000.txt.xz \\
        --texts valid=CORPUS/valid.txt.xz wikitext2 wikitext103 lambada --minutes 8.5

Cell by cell: one that has its JSON file is not run again; with `--minutes` none is begun that would
not end in time, and one that is healing then is stopped at a checkpoint, so that short runs add up.
Every cell starts from the same model and sees the same tokens in the same order. Ends with table.md
and study.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import krony
import study_report
from krony.healing.speed import fastest_dtype
from krony.healing.training import Stopped
from krony.hf.checkpoints import write_json
from krony.measure import evaluate, info
from krony.measure.bench import in_turn
from krony.measure.memory import keep_memory
from krony.measure.runtimes import Runner
from krony.text import blocks, data
from krony.words import parse_count
from methods import CELLS, DENSE, DROPPED, SIZES, Cell, Methods
from records import surroundings

HELD_OUT = 64  # blocks that choose the best weights
PROMPT, DECODED, REPEATS = 16, 64, 3  # tokens, tokens, timings
DEFAULT = "default"  # the loss of the healing recipe


def command_line(arguments: list[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description="Compress one model in every way, and heal it.")
    parser.add_argument("output", type=Path, help="folder of the cells, the table and the plot")
    parser.add_argument("--model", required=True, help="a directory, a Hub name, or demo")
    parser.add_argument("--data", nargs="+", required=True, help="text to calibrate and heal on")
    parser.add_argument(
        "--texts",
        nargs="+",
        default=["wikitext2", "wikitext103", "lambada"],
        metavar="NAME[=PATH]",
        help="to evaluate on: names, .txt, .jsonl (passages) or .txt.xz files",
    )
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--tokens", default="2M", help="of healing")
    parser.add_argument("--batch-tokens", type=int, help="in a step of healing; default: recipe's")
    # Not features, which a model with layers dropped has no partners for: one loss for all.
    parser.add_argument(
        "--loss", default="kl", help=f"of healing, to the dense model; {DEFAULT}: the recipe's"
    )
    parser.add_argument("--windows", type=int, default=128, help="to calibrate on")
    parser.add_argument(
        "--evaluated", type=int, help="most tokens of a text, a passage for each 100; default: all"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="until it stops by itself")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


class Study:
    """What the cells share: the model, texts, blocks to heal on, windows and moments."""

    def __init__(self, args: argparse.Namespace, deadline: float = math.inf) -> None:
        self.args, self.deadline = args, deadline
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = fastest_dtype(torch.device(self.device))
        self.base = krony.load_model(args.model, torch.float32, self.device)
        self.tokenizer = krony.load_tokenizer(args.model)
        self.window = min(1024, evaluate.context_length(self.base))
        self.ids: dict[str, Tensor] = {}
        self.passages: dict[str, list[str]] = {}
        for text in args.texts:
            name, _, source = text.partition("=")
            self._load(name, source or name)
        everything = blocks.load_blocks(args.data, self.tokenizer, self.window, seed=args.seed)
        self.training, held_out = blocks.hold_out(everything)
        self.held_out = held_out.select(range(min(HELD_OUT, len(held_out))))
        head = self.training.select(range(min(args.windows, len(self.training))))
        paper = all(Cell(*name_parts(c)).size in ("", *SIZES) for c in args.cells)
        self.methods = Methods(
            self.base,
            torch.tensor([row["input_ids"] for row in head]),
            args.output / "work" / "moments.safetensors",
            args.seed,
            "mlp" if paper else "all",
        )

    def _load(self, name: str, source: str) -> None:
        most = self.args.evaluated
        self.ids[name] = evaluate.tokenize(self.tokenizer, data.load_text(source))[:most]
        if source == "lambada" or source.endswith(".jsonl"):
            passages = data.load_passages(source)[0]
            self.passages[name] = passages if most is None else passages[: most // 100]

    def evaluated(self, model: PreTrainedModel) -> dict[str, Any]:
        """Perplexity on every text, and on the last words of passages."""
        model = folded(model.eval())
        found: dict[str, Any] = {}
        if self.device == "cuda":  # TF32, which keeps three bits more than bfloat16, for this only
            torch.set_float32_matmul_precision("high")
        for name, ids in self.ids.items():
            found[name] = evaluate.perplexity(model, ids, window=self.window).to_dict()
            if name in self.passages:
                word = evaluate.last_word(model, self.tokenizer, self.passages[name], name)
                found[name]["last_word"] = asdict(word)
        torch.set_float32_matmul_precision("highest")
        return found

    def healed(self, model: PreTrainedModel, cell: Cell, folder: Path) -> krony.HealRecord:
        """Train on, to the predictions of the model that it was made from.

        Raises:
            Stopped: at the deadline, after a checkpoint.
        """
        tokens = parse_count(self.args.tokens, "--tokens")
        assert tokens is not None
        taught = None if self.args.loss == DEFAULT else self.args.loss
        if cell.method == DROPPED:
            taught = "kl"
        config = krony.HealConfig(
            tokens=tokens,
            loss="ce" if cell.method == DENSE else taught,
            batch_tokens=self.args.batch_tokens,
            eval_every=max(tokens // 4, 1),
            dtype=self.dtype,
            seed=self.args.seed,
        )
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        teacher = None if cell.method == DENSE else copy.deepcopy(self.base)
        said = time.monotonic()

        def progress(what: str, step: int, steps: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said > 15:
                said = now
                print(f"  {cell.name}: {step:,} of {steps:,} steps, {what}", flush=True)
            if (
                now > self.deadline and step < steps
            ):  # as if someone had stopped it: a checkpoint, then `Stopped`
                self.deadline = math.inf
                os.kill(os.getpid(), signal.SIGTERM)

        return krony.heal(
            model,
            self.training,
            config,
            run=folder,
            evaluation=self.held_out,
            teacher=teacher,
            resume=folder.exists(),
            progress=progress,
        )

    def started(self, cell: Cell, folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The compressed model and what was measured of it, made once and kept in `folder`."""
        note = folder / "before.json"
        if note.exists():
            model = krony.load_model(folder / "start", torch.float32, self.device)
            return model, json.loads(note.read_text(encoding="utf-8"))
        began = time.perf_counter()
        self.methods.prepare(cell)
        prepared = time.perf_counter()
        model = self.methods.compressed(cell)
        factorised = time.perf_counter()
        record: dict[str, Any] = {
            "cell": asdict(cell),
            "parameters": info.parameters(model),
            "prepare_seconds": round(prepared - began, 2),
            "factorise_seconds": round(factorised - prepared, 2),
            "before": self.evaluated(model),
            "inference": inference_speed(model, self.window, self.dtype),
        }
        texts = ", ".join(f"{n} {f['perplexity']:,.2f}" for n, f in record["before"].items())
        print(f"  {cell.name}: made in {factorised - began:.0f} s, {texts}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that ended before its note
        krony.save_model(model, folder / "start", self.tokenizer)
        write_json(note, record)
        return model, record

    def run(self, cell: Cell, out: Path) -> None:
        """Compress, measure, heal, measure; write the cell's JSON."""
        began = time.perf_counter()
        folder = self.args.output / "work" / out.stem
        model, record = self.started(cell, folder)
        healing = self.healed(model, cell, folder / "run")
        record |= {
            "after": self.evaluated(model),
            "training": healing.speed,
            "curve": healing.curve,
            "settings": healing.settings,
            "model": str(self.args.model),
            "calibration_windows": len(self.methods.windows),
            "seed": self.args.seed,
            "seconds": round(time.perf_counter() - began, 1),
            "environment": surroundings(),
        }
        write_json(out, record)
        shutil.rmtree(folder)


def name_parts(name: str) -> tuple[str, str]:
    """Size and method of a cell's name."""
    return next((c.size, c.method) for c in CELLS if c.name == name)


def folded(model: PreTrainedModel) -> PreTrainedModel:
    """A dense copy of a factored model, equal up to rounding and faster on long texts."""
    if not hasattr(model, "hf_quantizer"):
        return model
    dense: PreTrainedModel = copy.deepcopy(model).dequantize()
    return dense


def inference_speed(model: PreTrainedModel, window: int, dtype: str) -> dict[str, float]:
    """Tokens a second, one text at a time: reading a full window, and writing greedily."""
    runner = Runner(copy.deepcopy(model).to(getattr(torch, dtype)))
    ids = torch.arange(window, device=model.device)[None] % model.config.vocab_size
    decoded = min(DECODED, window - PROMPT)
    jobs: dict[str, tuple[Callable[[], float], int]] = {
        "prefill": (lambda: runner.prefill(ids), window),
        "decode": (lambda: runner.loop(ids[:, :PROMPT], decoded)[0], decoded),
    }
    taken = in_turn({name: job for name, (job, _) in jobs.items()}, least=REPEATS, most=REPEATS)
    rates = {
        f"{name}_tokens_per_second": round(tokens / sorted(taken[name])[REPEATS // 2], 1)
        for name, (_, tokens) in jobs.items()
    }
    return {**rates, "prompt": window, "decoded": decoded}


def main(arguments: list[str] | None = None) -> int:
    """Run the cells that are missing, then write the table and the plot."""
    began, args = time.monotonic(), command_line(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keep_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    deadline = began + 60 * args.minutes
    study, longest, failed = Study(args, deadline), 0.0, 0
    for cell in CELLS:
        out = args.output / f"{cell.name.replace(' ', '-')}.json"
        if cell.name not in args.cells or out.exists():
            continue
        started = time.monotonic()
        if started + longest > deadline:
            print("no time for another cell; the same command goes on", flush=True)
            break
        try:
            study.run(cell, out)
        except Stopped as stop:
            print(f"{cell.name}: {stop}; the same command goes on", flush=True)
            break
        except (krony.KronyError, RuntimeError) as error:
            # The rest of the time is for the other cells.
            failed += 1
            print(f"{cell.name}: failed, {error}", file=sys.stderr, flush=True)
            continue
        longest = max(longest, time.monotonic() - started)
        print(study_report.line(json.loads(out.read_text())), flush=True)
    study_report.write(args.output, [cell.name for cell in CELLS])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
