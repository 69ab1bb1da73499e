"""What the commands share: the two consoles, the progress bar, and options of more than one."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from krony import words
from krony.hf.claims import check_destination, claim

# Wide when not a terminal: a table that is piped into a file must not be cut at 80 columns.
out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
err = Console(stderr=True, highlight=False)


def _claimed(context: typer.Context, destination: Path) -> Path:
    """The destination, checked and claimed until the command ends: before any work."""
    if not context.resilient_parsing and os.environ.get("RANK", "0") == "0":
        check_destination(destination)
        context.with_resource(claim(destination))
    return destination


Source = Annotated[str, typer.Argument(help="A Hub name, a model directory, or demo.")]
Destination = Annotated[
    Path, typer.Argument(help="A directory that does not exist yet.", callback=_claimed)
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
DtypeOption = Annotated[words.Dtype | None, typer.Option(help="Default: that of the checkpoint.")]
Bos = Annotated[
    words.Bos,
    typer.Option("--bos", help="The token that begins a text, in front of every window."),
]
Device = Annotated[str | None, typer.Option(help="A torch device; default: cuda if there is one.")]


def progress_bar() -> Progress:
    """A bar on the error stream; nothing where that is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
