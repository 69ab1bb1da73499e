"""Compression of one model, method by method at the sizes of Krony-PT, before and after healing.

    python recipes/study.py runs/study --model runs/standin/model --data CORPUS/corpus-000.txt.xz \\
        --texts valid=CORPUS/valid.txt.xz wikitext2 wikitext103 lambada --minutes 8.5

Cell by cell: one that has its JSON file is not run again, and with `--minutes` none is begun that
would not end in time, so that short runs add up. Every cell starts from the same model, sees the
same tokens in the same order, and has the same teacher. Ends with table.md and study.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import krony
import study_report
from gpt2_standin import read_stream
from krony.compression.limits import parse_count
from krony.healing.speed import fastest_dtype
from krony.hf.checkpoints import write_json
from krony.measure import evaluate, info
from krony.text import blocks, data
from study_methods import CELLS, DENSE, Cell, Methods

HELD_OUT = 64  # blocks that choose the best weights
PROMPT, DECODED, REPEATS = 16, 64, 3  # tokens, tokens, timings


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
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
    parser.add_argument("--batch-tokens", type=int, default=8192, help="in a step of healing")
    # Not features, which a model with layers dropped has no partners for: one loss for all.
    parser.add_argument("--loss", default="kl", help="of healing, to the model that was compressed")
    parser.add_argument("--windows", type=int, default=128, help="to calibrate on")
    parser.add_argument(
        "--evaluated", type=int, help="most tokens of a text, a passage for each 100; default: all"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no cell that ends later"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


class Study:
    """What the cells share: the model, texts, blocks to heal on, windows and moments."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
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
        self.methods = Methods(
            self.base,
            torch.tensor([row["input_ids"] for row in head]),
            args.output / "work" / "moments.safetensors",
            args.seed,
        )

    def _load(self, name: str, source: str) -> None:
        most = self.args.evaluated
        if source.endswith(".txt.xz"):
            ids = torch.from_numpy(read_stream(Path(source), self.tokenizer).astype("int64"))
        else:
            ids = evaluate.tokenize(self.tokenizer, data.load_text(source))
        self.ids[name] = ids[:most]
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
        """Train on, to the predictions of the model that it was made from."""
        tokens = parse_count(self.args.tokens, "--tokens")
        assert tokens is not None
        loss = "ce" if cell.method == DENSE else self.args.loss
        config = krony.HealConfig(
            tokens=tokens,
            loss=loss,
            batch_tokens=self.args.batch_tokens,
            eval_every=max(tokens // 4, 1),
            dtype=self.dtype,
            seed=self.args.seed,
        )
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        teacher = None if loss == "ce" else copy.deepcopy(self.base)
        return krony.heal(
            model,
            self.training,
            config,
            run=folder,
            evaluation=self.held_out,
            teacher=teacher,
            resume=folder.exists(),
        )

    def run(self, cell: Cell, out: Path) -> None:
        """Compress, measure, heal, measure; write the cell's JSON."""
        began = time.perf_counter()
        self.methods.prepare(cell)
        prepared = time.perf_counter()
        model = self.methods.compressed(cell)
        factorised = time.perf_counter()
        record = {
            "cell": asdict(cell),
            "parameters": info.parameters(model),
            "prepare_seconds": round(prepared - began, 2),
            "factorise_seconds": round(factorised - prepared, 2),
            "before": self.evaluated(model),
            "inference": inference_speed(model, self.window, self.dtype),
        }
        folder = self.args.output / "work" / out.stem
        healing = self.healed(model, cell, folder)
        record |= {
            "after": self.evaluated(model),
            "training": healing.speed,
            "curve": healing.curve,
            "settings": healing.settings,
            "model": str(self.args.model),
            "calibration_windows": len(self.methods.windows),
            "seed": self.args.seed,
            "seconds": round(time.perf_counter() - began, 1),
            "environment": evaluate.environment(),
        }
        write_json(out, record)
        shutil.rmtree(folder)


def folded(model: PreTrainedModel) -> PreTrainedModel:
    """A dense copy of a factored model, equal up to rounding and faster on long texts."""
    if not hasattr(model, "hf_quantizer"):
        return model
    return copy.deepcopy(model).dequantize()


@torch.inference_mode()
def inference_speed(model: PreTrainedModel, window: int, dtype: str) -> dict[str, float]:
    """Tokens a second, one text at a time: reading a full window, and writing greedily."""
    model = copy.deepcopy(model).to(getattr(torch, dtype))
    ids = torch.arange(window, device=model.device)[None] % model.config.vocab_size
    decoded = min(DECODED, window - PROMPT)

    def prefill() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        model.generate(  # type: ignore[operator]
            ids[:, :PROMPT],
            attention_mask=torch.ones_like(ids[:, :PROMPT]),
            do_sample=False,
            min_new_tokens=decoded,
            max_new_tokens=decoded,
            pad_token_id=0,
        )

    rates: dict[str, float] = {}
    for name, work, tokens in (("prefill", prefill, window), ("decode", decode, decoded)):
        work()  # warms up
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            work()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        rates[f"{name}_tokens_per_second"] = round(tokens / sorted(seconds)[REPEATS // 2], 1)
    return {**rates, "prompt": window, "decoded": decoded}


def main(arguments: list[str] | None = None) -> int:
    """Run the cells that are missing, then write the table and the plot."""
    began, args = time.monotonic(), options(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    study, longest, failed = Study(args), 0.0, 0
    for cell in CELLS:
        out = args.output / f"{cell.name.replace(' ', '-')}.json"
        if cell.name not in args.cells or out.exists():
            continue
        started = time.monotonic()
        if started - began + longest > 60 * args.minutes:
            print("no time for another cell; the same command goes on", flush=True)
            break
        try:
            study.run(cell, out)
        except (krony.KronyError, RuntimeError) as error:
            # The rest of the rental is for the other cells.
            failed += 1
            print(f"{cell.name}: failed, {error}", file=sys.stderr, flush=True)
            continue
        longest = max(longest, time.monotonic() - started)
        print(study_report.line(json.loads(out.read_text())), flush=True)
    study_report.write(args.output, [cell.name for cell in CELLS])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
