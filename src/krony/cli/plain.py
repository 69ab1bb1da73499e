"""`krony compress --structure plain`: an ordinary, smaller model."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from krony import words
from krony.cli import kept, planning, tables
from krony.cli.options import err, out
from krony.cli.shapes import SMALL
from krony.errors import KronyError

StructureOption = Annotated[
    words.Structure,
    typer.Option(
        "--structure",
        help="factored: low rank and Kronecker products, in krony's layers; plain: an ordinary, "
        "smaller model of the same architecture, which loads everywhere.",
        rich_help_panel=SMALL,
    ),
]


def check_plain(budget: dict[str, Any], others: dict[str, Any]) -> None:
    """Raise `KronyError` for options that say nothing of an ordinary model."""
    given = [name for name, value in others.items() if value]
    if given:
        raise KronyError(
            f"{', '.join(given)}: for factors, and --structure plain has none; it takes --size or "
            "--budget, --target, and how to calibrate"
        )
    if not budget:
        raise KronyError(
            "say how small: --size 60% of the whole model, or --budget 0.8 of the matrices of its "
            "blocks"
        )
    if budget["flops"] is not None or budget["objective"] != "size" or budget["sums"]:
        raise KronyError(
            "--flops, --objective and --sums: for factors; an ordinary model has as many "
            "multiply-adds as its matrices have parameters"
        )


def compress_plain(
    source: str,
    destination: Path,
    share: float | None,
    params: str | None,
    target: str | None,
    text: dict[str, Any],
    seed: int,
    memory: str | None,
    dtype: words.Dtype | None,
) -> None:
    """Make the model, write it, and say what it became."""
    from krony.compression import needed, together
    from krony.compression.plain import parameters_of, slim
    from krony.compression.work import Work, beside
    from krony.hf import checkpoints
    from krony.measure import info
    from krony.measure.memory import keep_memory, parse_bytes, peak_bytes

    tokenizer = checkpoints.find_tokenizer(source)
    model = checkpoints.load_model(source)
    keep_memory()
    before, target = info.parameters(model), target or "all"
    wanted = parameters_of(model, target, share=share, size=params)
    folder, started = beside(destination), time.monotonic()
    kept.keeps(kept.work(folder), folder)
    windows = text["windows"]
    windows = needed.of_target(model, target) if windows is None else windows
    tokens = planning.calibration_text(
        model, tokenizer, text["calibration"], windows, seed, text["bos"], folder
    )
    work = Work.of(model, tokens, seed, folder)
    with planning.reporting("Calibrating") as told:
        made = slim(
            model,
            tokens,
            parameters=wanted,
            target=target,
            seed=seed,
            progress=told,
            work=work,
            memory=parse_bytes(memory),
        )
    if dtype is not None:
        made.to(checkpoints.DTYPES[dtype])  # type: ignore[arg-type]
    if together.place()[0] == 0:
        checkpoints.save_model(made, destination, tokenizer)
        work.remove()
    together.meet()
    err.print(
        f"Made in {planning.minutes(time.monotonic() - started)}, {peak_bytes(made) / 1e9:.1f} GB"
    )
    out.print(tables.sizes_table(model.config, made.config))
    after = info.parameters(made)
    out.print(
        f"{after:,} parameters of {before:,}: {tables.percent(1 - after / before)} saved. It loads "
        "wherever the original does, and needs no krony."
    )
