"""The command line: each command is a few lines over functions of the library."""

import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from krony.cli import tables
from krony.cli.bench import bench_command
from krony.cli.compare import compare_command
from krony.cli.compress import compress_command, plan_command
from krony.cli.evaluate import evaluate_command, load_to_run
from krony.cli.export import export_command, quantize_command
from krony.cli.heal import heal_command
from krony.cli.kept import Kept
from krony.cli.options import (
    MEASURED,
    OUTPUT,
    TEXT,
    Command,
    Device,
    Group,
    PrintJson,
    RunDtype,
    Source,
    err,
    out,
    progress_bar,
)
from krony.cli.push import push_command
from krony.cli.report import report_command
from krony.cli.verify import verify_command
from krony.errors import KronyError
from krony.maths import schemes

Run = TypeVar("Run", bound=Callable[..., Any])

app = typer.Typer(
    cls=Group,
    help="Smaller transformers with Kronecker products.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


SMALLER, MEASURE = "Make it smaller", "Measure it"
ELSEWHERE, LOOK = "Take it elsewhere", "Look around"


def command(name: str, panel: str, example: str) -> Callable[[Run], Run]:
    """Register a command under a heading of `krony --help`, with an example below its own."""
    return app.command(
        name, cls=Command, rich_help_panel=panel, epilog=f"Example: krony {name} {example}"
    )


# In the order of `krony --help`; those of this file follow below.
command("plan", SMALLER, "demo --size 60%")(plan_command)
command("compress", SMALLER, "demo small --size 60%")(compress_command)
command("heal", SMALLER, "small healed --teacher demo --data python-docstrings --tokens 300k")(
    heal_command
)
command("quantize", SMALLER, "demo small-int8 --to int8")(quantize_command)
command(
    "compare", MEASURE, "demo --budget 0.8 --calibration python-docstrings --data python-docs -o c"
)(compare_command)
command("evaluate", MEASURE, "small --against demo --data python-docs")(evaluate_command)
command("bench", MEASURE, "small --against demo")(bench_command)
command("report", MEASURE, "small -o report.html")(report_command)
command("export", ELSEWHERE, "small small-onnx --to onnx")(export_command)
command("push", ELSEWHERE, "small owner/small --dry-run")(push_command)
command("verify", ELSEWHERE, "small")(verify_command)


@command("schemes", LOOK, "--hidden 3072 --model 768 --terms 2")
def schemes_command(
    hidden: Annotated[
        int,
        typer.Option(
            metavar="N", help="Width of the MLP's hidden axis.", rich_help_panel="The matrix"
        ),
    ] = 3072,
    model: Annotated[
        int,
        typer.Option(metavar="N", help="Width of the model axis.", rich_help_panel="The matrix"),
    ] = 768,
    terms: Annotated[
        int,
        typer.Option(
            metavar="N", help="Kronecker products that are summed.", rich_help_panel="The matrix"
        ),
    ] = 1,
    everything: Annotated[
        bool, typer.Option("--all", help="Also shapes of lower rank.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: PrintJson = False,
) -> None:
    """The design space of one matrix: shapes, rank, parameters, multiply-adds."""
    if min(hidden, model, terms) < 1:
        raise KronyError(f"sizes and terms must be at least 1, not {hidden}, {model} and {terms}")
    rows = [schemes.describe(f) for f in schemes.design_space((hidden, model), terms)]
    rows = [row for row in rows if everything or row["full_rank"]]
    named: dict[tuple[int, ...], str] = {}
    if (hidden, model) == (schemes.GPT2_HIDDEN, schemes.GPT2_MODEL):
        named = {(*s.shape, s.terms): s.name for s in schemes.SCHEMES.values()}
    if as_json:
        named_totals = {
            s.name: schemes.gpt2_total(s.shape, s.terms, s.scalars)
            for s in schemes.SCHEMES.values()
        }
        print(json.dumps({"space": rows, "gpt2": named_totals}, indent=2))
        return
    if not rows:
        raise KronyError(f"no shape of {hidden}x{model} has {terms} independent terms; use fewer")
    out.print(tables.space_table(rows, named))
    out.print(
        f"\n{len(rows)} shapes of {hidden}x{model}"
        + ("." if everything else " of full rank; --all lists the others too.")
    )
    if named:
        paper = tables.table("\nThe paper's models of GPT-2", "name", "A", "terms", "parameters")
        paper.add_column("note", justify="left")
        for s in schemes.SCHEMES.values():
            total = schemes.gpt2_total(s.shape, s.terms, s.scalars)
            count = f"{s.terms}" + (" with scalars" if s.scalars else "")
            paper.add_row(s.name, tables.sides(s.shape), count, f"{total:,}", s.note)
        out.print(paper)


@command("generate", LOOK, "demo 'Return the number of' --max-new-tokens 20")
def generate_command(
    source: Source,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens to add.", rich_help_panel=TEXT)
    ] = 40,
    temperature: Annotated[
        float,
        typer.Option(metavar="NUMBER", help="0 takes the likeliest token.", rich_help_panel=TEXT),
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="For a temperature above 0.", rich_help_panel=TEXT),
    ] = 0,
    dtype: RunDtype = None,
    device: Device = None,
) -> None:
    """Let a model go on from a prompt."""
    from krony.hf import checkpoints
    from krony.measure import evaluate

    model, tokenizer = load_to_run(source, dtype, device), checkpoints.load_tokenizer(source)
    text = evaluate.generate(model, tokenizer, prompt, max_new_tokens, temperature, seed)
    out.print(text, markup=False, soft_wrap=True)


@command("info", MEASURE, "demo")
def info_command(
    source: Source,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show which kernel takes each layer and MLP, and why.",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    tokens: Annotated[
        int,
        typer.Option(metavar="N", help="For --explain: tokens at once.", rich_help_panel=MEASURED),
    ] = 1,
    as_json: PrintJson = False,
) -> None:
    """Per matrix: shapes, terms, parameters, norm kept; in total: parameters, bytes, the saving."""
    if explain:
        from krony.nn.explain import explain as explain_model

        rows = explain_model(load_to_run(source, None, None), tokens)
        if as_json:
            print(json.dumps([asdict(row) for row in rows], indent=2))
        else:
            out.print(tables.explain_table(rows, tokens))
        return
    from krony.hf import checkpoints
    from krony.measure import info

    figures = info.model_info(checkpoints.load_model(source))
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    out.print(tables.info_table(figures))
    total, dense = figures["parameters"], figures["dense_parameters"]
    line = f"\n{total:,} parameters, {tables.megabytes(figures['bytes'])} in {figures['dtype']}"
    if figures["quantized"]:
        line += f" and {figures['quantized']}"
    if figures["factored"]:
        line += f"; dense {dense:,}: {tables.percent(1 - total / dense)} saved"
    out.print(line)


@command("demo", LOOK, "--out figures")
def demo_command(
    output: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FOLDER", help="Folder for the figures.", rich_help_panel=OUTPUT
        ),
    ] = Path("krony-demo"),
) -> None:
    """Compress the packaged model in every way, measure each, and draw the result."""
    from krony.demo import run

    with progress_bar() as bar:
        task = bar.add_task("Demo", total=None)
        record = run(
            output, lambda what, i, n: bar.update(task, description=what, completed=i, total=n)
        )
    out.print(tables.demo_table(record))
    out.print(f"\nAfter {record['prompt']!r}:", markup=False)
    for row in record["rows"]:
        out.print(f"  {row['name']}: {row['text']!r}", markup=False, soft_wrap=True)
    out.print(f"\nWrote {output / 'demo.json'} and {output / 'demo.png'}")


def main(clock: Callable[[], float] = time.monotonic) -> None:
    """Run a command; bad input ends in one sentence and exit code 2.

    Whatever fails after more than a minute says what was kept.

    Args:
        clock: seconds, of that minute.
    """
    # krony speaks for itself: transformers' loading bars and hints would bury its output.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if (loaded := sys.modules.get("transformers")) is not None:
        loaded.logging.set_verbosity_error()
        loaded.logging.disable_progress_bar()
    warnings.showwarning = lambda message, *_: err.print(f"krony: {message}", style="yellow")
    # So that whatever is half-written is removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    kept = Kept(clock)
    try:
        app()
    except KronyError as error:
        err.print(f"krony: {error}", style="red", markup=False, soft_wrap=True)
        kept.tell()
        sys.exit(error.exit_code)
    except SystemExit as stop:  # also of a signal
        if stop.code:
            kept.tell()
        raise
    except BaseException:
        kept.tell()
        raise


if __name__ == "__main__":
    main()
