"""What the commands share: the two consoles, the progress bar, and options of more than one."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from typer.core import TyperArgument, TyperCommand, TyperGroup

from krony import words
from krony.hf.claims import check_destination, check_file, claim

# Wide when not a terminal: a table that is piped into a file must not be cut at 80 columns.
out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
err = Console(stderr=True, highlight=False)


def _claimed(context: typer.Context, destination: Path) -> Path:
    """The destination, checked and claimed until the command ends: before any work."""
    if not context.resilient_parsing and os.environ.get("RANK", "0") == "0":
        check_destination(destination)
        context.with_resource(claim(destination))
    return destination


def _figures(context: typer.Context, path: Path | None) -> Path | None:
    """A file of figures, checked before any work: only such a one is replaced."""
    if path is None or context.resilient_parsing:
        return path
    wanted = FIGURES[str(context.info_name)]

    def ours(content: bytes) -> bool:
        try:
            found = json.loads(content)
        except ValueError:
            return not content
        if isinstance(found, list):  # ten sizes of a plan
            found = found[0] if found else {}
        return isinstance(found, dict) and any(key in found for key in wanted)

    return check_file(path, ours)


# By command, what its figures are known by.
FIGURES = {
    "plan": ("matrices", "harm"), "evaluate": ("results", "tasks"), "bench": ("models",),
}  # fmt: skip


class Command(TyperCommand):
    """A command whose help shows a type only where it says something."""

    def get_params(self, ctx: Any) -> list[Any]:
        """As click has it, without the noise."""
        return _in_words(super().get_params(ctx))


class Group(TyperGroup):
    """The same for krony itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """As click has it, without the noise."""
        return _in_words(super().get_params(ctx))


def _in_words(params: list[Any]) -> list[Any]:
    """A switch takes no value; the name of an argument says what it takes."""
    for param in params:
        if isinstance(param, TyperArgument):
            # typer shows "<str>" beside the name and has no option against it.
            param.display_type_rich = _nothing  # type: ignore[method-assign]
        elif getattr(param, "is_flag", False):
            param.metavar = ""
    return params


def _nothing(ctx: Any) -> str:
    return ""


# Panels of more than one command; those that only one has stand with it.
TEXT = "Text"
OUTPUT = "Output"
MACHINE = "Machine"
MEASURED = "What is measured"

Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hub name, a model directory, or demo.")
]
Destination = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER", help="A directory that does not exist yet.", callback=_claimed
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the figures to this file.",
        callback=_figures,
        rich_help_panel=OUTPUT,
    ),
]
PrintJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]
StoredDtype = Annotated[
    words.Dtype | None,
    typer.Option("--dtype", help="Default: that of the checkpoint.", rich_help_panel=OUTPUT),
]
RunDtype = Annotated[
    words.Dtype | None,
    typer.Option(
        "--dtype",
        help="Default: float32 on a CPU, the checkpoint's elsewhere.",
        rich_help_panel=MACHINE,
    ),
]
Bos = Annotated[
    words.Bos,
    typer.Option(
        "--bos",
        help="The token that begins a text, in front of every window.",
        rich_help_panel=TEXT,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="A torch device; default: cuda if there is one.",
        rich_help_panel=MACHINE,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The dense model, or another one, measured too.",
        rich_help_panel=MEASURED,
    ),
]


class Told(Progress):
    """A bar, and where the error stream is no terminal a line a minute instead."""

    every = 60.0  # seconds
    clock: Callable[[], float] = time.monotonic
    total: float | None = None  # of the stage; another one, or less done, is another stage
    first = latest = began = said = 0.0

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """As rich has it."""
        super().update(task_id, **fields)
        self._tell(self.tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As rich has it."""
        super().advance(task_id, advance)
        self._tell(self.tasks[task_id])

    def _tell(self, task: Task) -> None:
        now = self.clock()
        if task.total != self.total or task.completed < self.latest or not self.began:
            self.total, self.first, self.began = task.total, task.completed, now
            self.said = self.said or now
        self.latest = task.completed
        if not self.disable or now - self.said < self.every:
            return
        self.said = now
        err.print(f"krony: {self._line(task, now - self.began)}", markup=False, soft_wrap=True)

    def _line(self, task: Task, seconds: float) -> str:
        from krony.measure.memory import peak_resident_bytes

        parts = [task.description]
        if task.total:
            parts.append(f"{task.completed:,.0f} of {task.total:,.0f}")
            if task.completed:
                left = seconds * (task.total - task.completed) / task.completed
                parts.append(
                    f"about {left / 60:.0f} min left" if left >= 60 else "under 1 min left"
                )
        return ", ".join([*parts, f"peak memory {peak_resident_bytes() / 1e9:.1f} GB"])


def progress_bar(clock: Callable[[], float] = time.monotonic) -> Told:
    """A bar on the error stream; a line a minute, by that clock, where that is no terminal."""
    bar = Told(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    bar.clock = clock
    return bar
