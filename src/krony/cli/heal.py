"""krony heal: continued training from the command line."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony import words
from krony.cli import kept
from krony.cli.options import (
    MACHINE,
    OUTPUT,
    TEXT,
    Bos,
    Destination,
    Device,
    Source,
    err,
    out,
    progress_bar,
)
from krony.errors import KronyError
from krony.words import parse_count

if TYPE_CHECKING:
    from accelerate import PartialState

    from krony.healing.heal import HealConfig, HealRecord
    from krony.text.blocks import Blocks

TRAINING = "How it is trained"
RUN = "Stopping and going on"


def heal_command(
    source: Source,
    destination: Destination,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help=(
                "Training text: python-docstrings, openwebtext, wikitext103, a file, a folder, "
                "owner/set:name:split, or self: text that the teacher writes. May be repeated."
            ),
            rich_help_panel=TEXT,
        ),
    ],
    tokens: Annotated[
        str,
        typer.Option(
            metavar="COUNT",
            help="To train on: 2M, 300M, 27B.",
            rich_help_panel=TEXT,
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model; with it, KL to it.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="LOSS",
            help="ce, kl, features, or a sum such as ce+kl. Default: recipe's.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="NUMBER",
            help="Of the KL divergence.",
            rich_help_panel=TRAINING,
        ),
    ] = 1.0,
    recipe: Annotated[
        words.Recipe,
        typer.Option(
            help="krony-pt is the paper's.",
            rich_help_panel=TRAINING,
        ),
    ] = "default",
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--lr",
            metavar="RATE",
            help="Instead of the recipe's.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="Tokens in a step, instead of the recipe's: 122k.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Default: the model's, at most 1024.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    reconstruct: Annotated[
        int,
        typer.Option(
            metavar="STEPS",
            help="First fit each MLP to the teacher's by so many steps: 300.",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
    freeze: Annotated[
        words.Freeze,
        typer.Option(
            help="dense: train the factors only.",
            rich_help_panel=TRAINING,
        ),
    ] = "none",
    eval_data: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Held-out text. Default: 1 % of the training blocks.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    eval_every: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="Tokens between evaluations. Default: a twentieth, more in short runs.",
            rich_help_panel=RUN,
        ),
    ] = None,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            help="Read the text while training, store nothing.",
            rich_help_panel=TEXT,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where an interrupted run stopped.",
            rich_help_panel=RUN,
        ),
    ] = False,
    save_minutes: Annotated[
        float,
        typer.Option(
            metavar="MINUTES",
            help="Between checkpoints.",
            rich_help_panel=RUN,
        ),
    ] = 10.0,
    keep: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Checkpoints that stay.",
            rich_help_panel=RUN,
        ),
    ] = 2,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Of autocast: bfloat16 or float32. Default: the faster.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    micro_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="Most tokens in one pass, for little memory: 4k.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Less memory, a third slower.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="torch.compile the model.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    log_to: Annotated[
        str,
        typer.Option(
            metavar="TRACKER",
            help="A tracker: tensorboard, wandb, …",
            rich_help_panel=OUTPUT,
        ),
    ] = "none",
    bos: Bos = "auto",
    device: Device = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Of the order of the blocks.",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
) -> None:
    """Train a compressed model on; with --teacher towards the dense model's predictions."""
    import datasets
    import torch

    from krony.healing.heal import HealConfig, heal
    from krony.hf import checkpoints
    from krony.hf.probes import rows
    from krony.measure import evaluate
    from krony.measure.memory import keep_memory
    from krony.text import blocks as blocks_module

    keep_memory()
    state = _processes(device)
    checkpoints.check_destination(destination)
    run = destination.with_name(destination.name + ".run")
    kept.keeps(kept.run(run))
    config = HealConfig(
        tokens=parse_count(tokens, "--tokens") or 0,
        recipe=recipe,
        loss=loss,
        temperature=temperature,
        learning_rate=learning_rate,
        batch_tokens=parse_count(batch_tokens, "--batch-tokens"),
        reconstruct=reconstruct,
        freeze=freeze,
        eval_every=parse_count(eval_every, "--eval-every"),
        save_minutes=save_minutes,
        keep=keep,
        dtype=dtype,
        micro_tokens=parse_count(micro_tokens, "--micro-tokens"),
        gradient_checkpointing=gradient_checkpointing,
        compile=compiled,
        log_to=log_to,
        seed=seed,
    )
    where = str(state.device)
    tokenizer = checkpoints.load_tokenizer(source)
    model = checkpoints.load_model(source, device=where)
    stored = model.dtype
    # Trained in float32 whatever the file holds: updates are smaller than half precision resolves.
    model.float()
    dense = checkpoints.load_model(teacher, torch.float32, where) if teacher else None
    if window is None:
        window = min(1024, evaluate.context_length(model))
    if not 2 <= window <= evaluate.context_length(model):
        raise KronyError(
            f"a window of {window} can't be; the model takes 2 to {evaluate.context_length(model)}"
        )
    datasets.disable_progress_bars()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{destination}.logs")
    with state.main_process_first():
        how: dict[str, Any] = {"bos": bos, "vocabulary": rows(model)}
        training = _training(data, tokenizer, dense, config, window, streaming, seed, how)
        if eval_data is None:
            training, held_out = blocks_module.hold_out(training)
        else:
            held_out = blocks_module.load_blocks([eval_data], tokenizer, window, **how)
            most = min(len(held_out), blocks_module.HELD_OUT_MOST)
            held_out = held_out.select(range(most))
    with progress_bar() as bar:
        task = bar.add_task("Healing", total=None)
        latest = -1

        def progress(what: str, step: int, steps: int) -> None:
            nonlocal latest
            bar.update(task, description=what, completed=step, total=steps)
            # In a file, a line at each evaluation, the second call at a step, instead of the bar.
            if bar.disable and step == latest:
                err.print(f"krony: step {step} of {steps}: {what}", markup=False, soft_wrap=True)
            latest = step

        record = heal(
            model,
            training,
            config,
            run=run,
            evaluation=held_out,
            teacher=dense,
            resume=resume,
            progress=progress,
        )
    if state.is_main_process:
        if record.sharded:
            home = model.name_or_path
            model = checkpoints.load_model(run / "best")
            model.name_or_path = home
        model.to(stored)  # type: ignore[arg-type]
        _write(model, destination, tokenizer, record, data)
        checkpoints.discard(run, destination)
        first, last = record.curve[0], record.curve[-1]
        out.print(
            f"Held-out loss {first['held_out']:.4f} before, {record.best:.4f} at best, "
            f"{last['held_out']:.4f} at the end, over {last['tokens']:,} tokens."
        )
        if record.best >= first["held_out"]:
            err.print(
                "krony: healing did not help, and the weights are those that it began with; try a "
                "lower --lr (a third or a tenth), or text of the kind that the model was made for"
            )
        for name, (before, after) in record.reconstruction.items():
            out.print(f"{name}: error {before:.3f} of the variance, reconstructed {after:.3f}")
        speed = record.speed
        out.print(
            f"{speed['tokens_per_second']:,.0f} tokens a second, "
            f"{speed['flops_per_second'] / 1e9:,.1f} GFLOP/s, "
            f"peak memory {speed['peak_bytes'] / 1e9:.2f} GB, {record.settings['dtype']}."
        )
        out.print(f"Wrote {destination}, with heal.json and heal.png")
    state.wait_for_everyone()


def _processes(device: str | None) -> "PartialState":
    """The processes that a launcher started, or this one alone; on the CPU if asked for."""
    import torch
    from accelerate import PartialState

    cpu = device == "cpu" or not torch.cuda.is_available()
    if device not in (None, "cpu", "cuda"):
        raise KronyError(
            f"--device {device!r} can't be; give cpu or cuda, and choose among GPUs with "
            "CUDA_VISIBLE_DEVICES or the launcher"
        )
    state = PartialState(cpu=cpu)
    if not state.is_main_process:
        out.quiet = err.quiet = True
    return state


def _training(
    names: list[str],
    tokenizer: Any,
    teacher: Any,
    config: "HealConfig",
    window: int,
    streaming: bool,
    seed: int,
    how: dict[str, Any],
) -> "Blocks":
    from krony.compression.calibrate import SELF, sample
    from krony.text import blocks as blocks_module

    if SELF not in names:
        return blocks_module.load_blocks(
            names, tokenizer, window, streaming=streaming, seed=seed, **how
        )
    if names != [SELF] or teacher is None:
        raise KronyError("--data self is text that the teacher writes: alone, and with --teacher")
    return blocks_module.from_ids(sample(teacher, -(-config.tokens // window) + 1, window, seed))


def _write(
    model: Any, destination: Path, tokenizer: Any, record: "HealRecord", names: list[str]
) -> None:
    from accelerate import PartialState

    from krony.healing import curves
    from krony.hf import checkpoints
    from krony.hf.provenance import provenance
    from krony.measure import evaluate
    from krony.text.blocks import describe

    figures = {
        "data": names,
        "settings": record.settings,
        "best_held_out": record.best,
        "curve": record.curve,
        "reconstruction": record.reconstruction,
        "speed": record.speed,
        "processes": PartialState().num_processes,
        "sharded": record.sharded,
        "environment": evaluate.environment(),
    }
    known = provenance(model)
    if known is not None:
        known["healed"] = {"data": names, **record.settings}
        read = [describe(name) for name in names if name != words.SELF]
        texts = [*known.get("texts", []), *({**t, "use": "healing"} for t in read)]
        if texts:
            known["texts"] = texts

    def also(folder: Path) -> None:
        checkpoints.write_json(folder / "heal.json", figures)
        curves.draw({"": record.curve}, folder / "heal.png", "Healing")

    checkpoints.save_model(model, destination, tokenizer, also=also)
