"""Pretrain the small GPT-2-architecture model that is packaged with Krony.

The text is the docstrings of the Python installation it runs on, so no network is needed:

    python recipes/pretrain_demo.py runs/demo --minutes 70

`--family llama` trains a small Llama on the same text instead, to measure on a second family; it
is written into the run's own folder, not into the package:

    python recipes/pretrain_demo.py runs/llama --family llama --minutes 20

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pretraining import (
    Windows,
    fresh_sibling,
    learning_rate_factor,
    load_checkpoint,
    optimisers,
    replace_folder,
    save_checkpoint,
)

END = "<|endoftext|>"
END_ID = 0  # the trainer gives special tokens the first identifiers
WINDOW = 256
VOCABULARY = 4096
ROOT = Path(__file__).resolve().parents[1]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain the packaged demonstration model.")
    parser.add_argument("output", type=Path, help="folder for the data, checkpoints and log")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="gpt2")
    parser.add_argument("--export", type=Path, help="folder of the model; gpt2: the package's")
    parser.add_argument("--report", type=Path, help="folder of the report; gpt2: docs")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="training time after which the run ends whatever its step: the learning rate "
        "follows the time when it is ahead of the steps (and the run is then not reproducible)",
    )
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--float32",
        action="store_true",
        help="for CPUs that only emulate bfloat16: no autocast, and AdamW for the matrices too, "
        "since Muon's own steps are in bfloat16",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-export", action="store_true", help="for trials of settings")
    args = parser.parse_args()
    packaged = args.family == "gpt2"
    args.export = args.export or (
        ROOT / "src/krony/demo/model" if packaged else args.output / "model"
    )
    args.report = args.report or (ROOT / "docs" if packaged else args.output)
    return args


def keep_memory() -> None:
    """Have glibc keep freed memory: returning each large tensor costs a third of the speed."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for each large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer, whose first identifier is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return the texts as one stream of identifiers, each followed by the end of text."""
    stream: list[int] = []
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        stream += [*encoding.ids, END_ID]
    return np.array(stream, dtype=np.uint16)


def prepare(folder: Path, seed: int) -> None:
    """Write the tokenizer, the token streams and the description of the corpus."""
    if folder.exists():
        return
    # Imported here because a run that goes on has its data already.
    from krony.text.docstrings import documents, held_out_topics

    temporary = fresh_sibling(folder)
    found = documents()
    texts = {s: [item.text for item in found if item.split == s] for s in ("train", "validation")}
    # Documents of one package stand together in the list: mix them before packing.
    np.random.default_rng(seed).shuffle(texts["train"])
    texts["topics"] = [held_out_topics()]
    tokenizer = train_tokenizer(texts["train"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(temporary / "tokenizer")
    corpus: dict[str, Any] = {}
    for split, members in texts.items():
        stream = encode(tokenizer, members)
        np.save(temporary / f"{split}.npy", stream)
        characters = sum(map(len, members))
        size = {"documents": len(members), "characters": characters, "tokens": len(stream)}
        corpus[split] = size
    by_package: Counter[str] = Counter()
    for item in found:
        by_package[item.package] += len(item.text)
    corpus["characters_by_package"] = dict(by_package.most_common())
    (temporary / "corpus.json").write_text(json.dumps(corpus, indent=2) + "\n")
    replace_folder(temporary, folder)


def mean_loss(
    model: torch.nn.Module, stream: np.ndarray, windows: int | None = None, half: bool = False
) -> float:
    """Return the nats per predicted token over windows of 256 at stride 256."""
    starts = range(0, len(stream) - 1, WINDOW)[:windows]
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(starts), 16):
            rows = [stream[start : start + WINDOW] for start in starts[first : first + 16]]
            # The last window is shorter: it goes by itself, and all are weighted by tokens.
            groups = [[row for row in rows if len(row) == WINDOW]]
            groups += [[row] for row in rows if 1 < len(row) < WINDOW]
            for group in filter(None, groups):
                ids = torch.from_numpy(np.stack(group).astype(np.int64))
                predictions = ids.numel() - len(group)
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    loss = model(input_ids=ids, labels=ids).loss
                total += float(loss) * predictions
                count += predictions
    model.train()
    return total / count


def new_gpt2() -> GPT2LMHeadModel:
    """4.3 million parameters; the embedding is tied to the output matrix."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=WINDOW,
        n_embd=256,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        tie_word_embeddings=True,
    )
    return GPT2LMHeadModel(config)


def new_llama() -> LlamaForCausalLM:
    """3.2 million parameters; gated MLPs, grouped keys and values, an output matrix of its own."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=WINDOW,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {"gpt2": new_gpt2, "llama": new_llama}


def edit_json(
    path: Path, remove: tuple[str, ...] = (), change: dict[str, Any] | None = None
) -> None:
    """Rewrite a JSON file with some keys removed and others set."""
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps(content | (change or {}), indent=2, sort_keys=True) + "\n")


def export(model: PreTrainedModel, tokenizer: Path, folder: Path) -> None:
    """Write the model in float16 with its tokenizer, by way of a temporary sibling."""
    temporary = fresh_sibling(folder)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    copy.half().save_pretrained(temporary)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, temporary / path.name)
    # Nothing of the machine goes into the package, and any version may load the tokenizer.
    edit_json(temporary / "config.json", remove=("_name_or_path",))
    edit_json(temporary / "generation_config.json", remove=("_from_model_config",))
    edit_json(
        temporary / "tokenizer_config.json", change={"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    for path in temporary.iterdir():
        path.chmod(0o644)
    replace_folder(temporary, folder)


def plot(curve: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    tokens = [point["tokens"] / 1e6 for point in curve]
    axes.plot(tokens, [point["train_loss"] for point in curve], label="training", alpha=0.6)
    axes.plot(
        tokens, [point["validation_loss"] for point in curve], label="validation docstrings (head)"
    )
    axes.plot(
        tokens, [point["topics_loss"] for point in curve], label="held-out pydoc topics (head)"
    )
    axes.set(xlabel="training tokens (millions)", ylabel="nats per token")
    axes.set_title("Pretraining on docstrings")
    axes.set_ylim(top=min(6.0, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def report(args: argparse.Namespace, data: Path, state: dict[str, Any]) -> None:
    """Evaluate the exported files themselves and write the report and the plot."""
    model = AutoModelForCausalLM.from_pretrained(args.export, dtype=torch.float32)
    AutoTokenizer.from_pretrained(args.export)
    final = {}
    for split in ("validation", "topics"):
        nats = mean_loss(model, np.load(data / f"{split}.npy"))
        final[split] = {"nats_per_token": round(nats, 4), "perplexity": round(math.exp(nats), 3)}
    tokens = state["step"] * args.batch * WINDOW
    content = {
        "final": final,
        "evaluation": "exported float16 weights run in float32; windows of 256 at stride 256",
        "curve_evaluation": "first 160 windows of validation and 96 of topics, in "
        f"{'float32' if args.float32 else 'bfloat16'}: cheaper, and over other text than the "
        "final figures",
        "parameters": model.num_parameters(),
        "steps": state["step"],
        "tokens_seen": tokens,
        "training_seconds": round(state["seconds"]),
        "tokens_per_second": round(tokens / state["seconds"]),
        "time_limit_minutes": args.minutes if math.isfinite(args.minutes) else None,
        "batch_windows": args.batch,
        "learning_rates": {"muon": None if args.float32 else args.muon_lr, "adamw": args.adam_lr},
        "seed": args.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{args.threads} CPU threads, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "corpus": json.loads((data / "corpus.json").read_text()),
        "curve": state["curve"],
    }
    args.report.mkdir(parents=True, exist_ok=True)
    name = "pretrain_demo" if args.family == "gpt2" else f"pretrain_{args.family}"
    (args.report / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(state["curve"], args.report / f"{name}.png")
    print(json.dumps(final), flush=True)


def main() -> None:
    args = options()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    keep_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = args.output / "data"
    prepare(data, args.seed)
    streams = {s: np.load(data / f"{s}.npy") for s in ("train", "validation", "topics")}
    model = FAMILIES[args.family]()
    muon_lr = None if args.float32 else args.muon_lr
    optims = optimisers(model, args.adam_lr, muon_lr)
    state = load_checkpoint(args.output, model, optims)
    batches = Windows(streams["train"], WINDOW, args.batch, args.seed)
    print(f"{model.num_parameters():,} parameters, {len(streams['train']):,} tokens", flush=True)

    half = not args.float32
    model.train()
    exported, last_save = False, time.monotonic()
    recent: list[float] = []
    while True:
        progress = max(state["step"] / args.steps, state["seconds"] / (60 * args.minutes))
        done = progress >= 1.0
        if state["step"] and (done or state["step"] % args.evaluate_every == 0) and recent:
            point = {
                "step": state["step"],
                "tokens": state["step"] * args.batch * WINDOW,
                "train_loss": round(sum(recent) / len(recent), 4),
                "validation_loss": round(mean_loss(model, streams["validation"], 160, half), 4),
                "topics_loss": round(mean_loss(model, streams["topics"], 96, half), 4),
                "seconds": round(state["seconds"], 1),
            }
            recent = []
            state["curve"].append(point)
            rate = point["tokens"] / state["seconds"]
            print(f"{progress:6.1%} {rate:6.0f} tokens/s {json.dumps(point)}", flush=True)
        if done or time.monotonic() - last_save > 60 * args.checkpoint_minutes:
            if not args.no_export:
                save_checkpoint(args.output, model, optims, state)
                if done or not exported:
                    export(model, data / "tokenizer", args.export)
                    exported = True
            last_save = time.monotonic()
        if done:
            break
        began = time.monotonic()
        factor = learning_rate_factor(state["step"], progress, args.warmup)
        rates = (args.adam_lr,) if args.float32 else (args.muon_lr, args.adam_lr)
        for optim, rate in zip(optims, rates, strict=True):
            for group in optim.param_groups:
                group["lr"] = rate * factor
        ids = batches(state["step"])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        recent.append(loss.item())
        state["step"] += 1
        state["seconds"] += time.monotonic() - began
    if not args.no_export:
        report(args, data, state)


if __name__ == "__main__":
    main()
