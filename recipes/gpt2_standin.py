"""Pretrain a stand-in for GPT-2: its architecture and tokenizer, a text of one's own.

    python recipes/gpt2_standin.py runs/standin --corpus FOLDER --minutes 12

FOLDER has the training text in *.txt.xz files and a held-out one in valid.txt.xz; in each, a line
<|endoftext|> ends a document. A time limit, not a number of steps, ends the run, and the learning
rate follows it. A run that was stopped, by `--piece-minutes` too, goes on from its last checkpoint
when the same command is given again. The model lands in runs/standin/model, and with `--parts` in
float16 in files of at most 15 MB, to be carried away:

    cat parts/model.safetensors.* > parts/model.safetensors
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerBase

import krony
from krony.healing import curves
from krony.healing.objective import Objective
from krony.healing.speed import fastest_dtype, flops_per_token
from krony.hf import checkpoints
from krony.hf.checkpoints import write_json
from krony.measure import evaluate
from krony.measure.memory import peak_bytes
from krony.text import data
from pretraining import (
    Windows,
    fresh_sibling,
    learning_rate_factor,
    load_checkpoint,
    optimisers,
    replace_folder,
    save_checkpoint,
)

VALID = "valid.txt.xz"
EVALUATIONS, EVALUATED = 24, 65_536  # in a run; tokens of the held-out text for each
PART_BYTES = 15_000_000
SETTINGS = ("minutes", "window", "batch", "muon_lr", "adam_lr", "warmup", "compile", "seed")


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pretrain GPT-2's architecture from scratch.")
    parser.add_argument("output", type=Path, help="folder for tokens, checkpoints and the model")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.txt.xz files")
    parser.add_argument(
        "--tokenizer", type=Path, help="its folder; default: gpt2-tokenizer in KRONY_DATA"
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="of training steps in all")
    parser.add_argument(
        "--piece-minutes",
        type=float,
        default=math.inf,
        help="after which this call writes a checkpoint and ends, preparation included",
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--batch", type=int, default=128, help="windows in a step")
    parser.add_argument("--micro", type=int, default=32, help="windows in one pass")
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the faster one")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="torch.compile; default: on a GPU",
    )
    parser.add_argument("--parts", action="store_true", help="also float16, in small files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.batch % args.micro:
        parser.error(f"--batch {args.batch} is no multiple of --micro {args.micro}")
    return args


def load_tokenizer(folder: Path | None) -> PreTrainedTokenizerBase:
    """Of a model directory, or of GPT-2's vocab.json and merges.txt."""
    if folder is None:
        found = data.data_folder()
        if found is None:
            raise krony.KronyError("no tokenizer: give --tokenizer, or set KRONY_DATA")
        folder = found / "gpt2-tokenizer"
    if (folder / "tokenizer.json").exists():
        return krony.load_tokenizer(folder)
    return GPT2Tokenizer.from_pretrained(folder)


def read_stream(path: Path, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The token ids of a .txt.xz, (T,) uint16: every document, then the end of text."""
    if len(tokenizer) > 2**16:
        raise krony.KronyError(f"{len(tokenizer)} tokens do not fit in 16 bits")
    mark = f"\n{tokenizer.eos_token}\n"
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        documents = [text.strip("\n") for text in f"\n{file.read()}\n".split(mark)]
    end = tokenizer.eos_token_id
    # All cores work here: the tokenizer's own threads take a document each.
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(
        [text for text in documents if text.strip()], add_special_tokens=False
    )
    rows = [np.array([*encoding.ids, end], dtype=np.uint16) for encoding in encoded]
    if not rows:
        raise krony.KronyError(f"{path} has no text")
    return np.concatenate(rows)


def prepare(folder: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write train.npy and valid.npy, once."""
    if folder.exists():
        return
    shards = sorted(path for path in corpus.glob("*.txt.xz") if path.name != VALID)
    if not shards or not (corpus / VALID).exists():
        raise krony.KronyError(f"{corpus} must have training *.txt.xz files and a {VALID}")
    temporary, began = fresh_sibling(folder), time.monotonic()
    np.save(temporary / "valid.npy", read_stream(corpus / VALID, tokenizer))
    train = np.concatenate([read_stream(path, tokenizer) for path in shards])
    np.save(temporary / "train.npy", train)
    replace_folder(temporary, folder)
    print(f"{len(train):,} tokens in {time.monotonic() - began:.0f} s", flush=True)


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """transformers' GPT-2, seeded, without dropout: every text is seen a few times at most."""
    torch.manual_seed(args.seed)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.window,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # the default, found with a warning that breaks compiled graphs
    return model


class Run:
    """The training: its model, its optimisers, and where it stands."""

    def __init__(
        self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, began: float
    ) -> None:
        self.args, self.began = args, began
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = args.dtype or fastest_dtype(self.device)
        self.model = new_model(args, tokenizer)
        self.model.to(self.device)  # type: ignore[arg-type]
        self.compiled = torch.compile(self.model) if args.compile else self.model
        self.rates = (args.muon_lr, args.adam_lr)
        self.optims = optimisers(self.model, args.adam_lr, args.muon_lr)
        self.state = load_checkpoint(args.output, self.model, self.optims)
        streams = {s: np.load(args.output / "data" / f"{s}.npy") for s in ("train", "valid")}
        self.valid = torch.from_numpy(streams["valid"].astype(np.int64))
        self.batches = Windows(streams["train"], args.window, args.batch, args.seed)

    @property
    def tokens(self) -> int:
        """Seen so far."""
        return int(self.state["step"]) * self.args.batch * self.args.window

    @property
    def progress(self) -> float:
        """Of the time limit, from 0 to 1."""
        return float(self.state["seconds"]) / (60 * self.args.minutes)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 products where they are faster."""
        half = self.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def step(self) -> float:
        """One optimiser step; the mean loss in nats. Its time, that of compiling too, counts."""
        began, args = time.monotonic(), self.args
        factor = learning_rate_factor(self.state["step"], self.progress, args.warmup)
        for optim, rate in zip(self.optims, self.rates, strict=True):
            for group in optim.param_groups:
                group["lr"] = rate * factor
        ids = self.batches(self.state["step"]).to(self.device)
        total = torch.zeros((), device=self.device)
        for rows in ids.split(args.micro):
            with self.autocast():
                loss = self.compiled(input_ids=rows, labels=rows, use_cache=False).loss
            loss = loss * (args.micro / args.batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optim in self.optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        value = float(total)  # waits for the device, so that the time is that of the step
        self.state["step"] += 1
        self.state["seconds"] += time.monotonic() - began
        return value

    def held_out(self, tokens: int | None = None) -> evaluate.Perplexity:
        """Of the validation text, or of its head."""
        self.model.eval()
        with self.autocast():
            found = evaluate.perplexity(self.model, self.valid[:tokens], window=self.args.window)
        self.model.train()
        return found

    def train(self) -> bool:
        """Until the time limit or the end of the piece; whether it was the limit."""
        self.model.train()
        saved, recent = time.monotonic(), list[float]()
        while self.progress < 1.0:
            recent.append(self.step())
            if not math.isfinite(recent[-1]):
                raise krony.KronyError(
                    f"the loss became {recent[-1]} at step {self.state['step']}; lower the rates"
                )
            if self.progress >= min(1.0, len(self.state["curve"]) / EVALUATIONS):
                point = {
                    "tokens": self.tokens,
                    "held_out": round(self.held_out(EVALUATED).nats, 4),
                    "training": round(sum(recent) / len(recent), 4),
                    "seconds": round(self.state["seconds"], 1),
                }
                self.state["curve"].append(point)
                recent = []
                print(f"{self.progress:6.1%} {json.dumps(point)}", flush=True)
            now = time.monotonic()
            over = now - self.began > 60 * self.args.piece_minutes
            if over or now - saved > 60 * self.args.checkpoint_minutes or self.progress >= 1.0:
                save_checkpoint(self.args.output, self.model, self.optims, self.state)
                saved = now
            if over and self.progress < 1.0:
                return False
        return True


def write_parts(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The model in float16, its one weights file cut: the embedding alone is 77 MB."""
    temporary = fresh_sibling(folder)
    model.half().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    whole = temporary / "model.safetensors"
    content = whole.read_bytes()
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        part = temporary / f"{whole.name}.{number:02}"
        part.write_bytes(content[start : start + PART_BYTES])
    whole.unlink()
    replace_folder(temporary, folder)


def report(run: Run) -> None:
    """The loss curve, as JSON and PNG, and what the run was."""
    args, state = run.args, run.state
    found = run.held_out()
    flops = flops_per_token(run.model, Objective(run.model, ("ce",)), args.window)
    rate = run.tokens / state["seconds"]
    record = {
        "validation": found.to_dict(),
        "parameters": run.model.num_parameters(),
        "training_tokens": len(run.batches.stream),
        "tokens_seen": run.tokens,
        "steps": state["step"],
        "seconds": round(state["seconds"], 1),
        "tokens_per_second": round(rate, 1),
        "flops_per_token": flops,
        "flops_per_second": round(rate * flops),
        "peak_bytes": peak_bytes(run.model),
        "dtype": run.dtype,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "environment": evaluate.environment(),
        "curve": state["curve"],
    }
    write_json(args.output / "standin.json", record)
    curves.draw({"": state["curve"]}, args.output / "standin.png", "Pretraining the stand-in")
    print(f"perplexity {found.perplexity:.2f} on held-out text, {rate:,.0f} tokens/s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Prepare, train until the time is over, write the model and the report."""
    began, args = time.monotonic(), options(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer.model_max_length = args.window
    prepare(args.output / "data", args.corpus, tokenizer)
    run = Run(args, tokenizer, began)
    print(f"{run.model.num_parameters():,} parameters, step {run.state['step']}", flush=True)
    if not run.train():
        print(f"{run.progress:.0%} of the time is used; the same command goes on", flush=True)
        return
    report(run)
    if not (args.output / "model").exists():
        checkpoints.save_model(run.model, args.output / "model", tokenizer)
    if args.parts:
        write_parts(run.model, tokenizer, args.output / "parts")


if __name__ == "__main__":
    main()
