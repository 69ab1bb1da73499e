"""What a command that failed after a while says: what was kept, and how to go on."""

import shutil
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

from krony.cli.options import err

LONG = 60.0  # seconds; what failed sooner is simply given again
NOTHING = "nothing was kept: the same command begins again"


class Kept:
    """What the command that now begins keeps, asked for at the end only.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.began = clock, clock()
        self.found: Callable[[], str | None] = lambda: None
        self.folder: Path | None = None  # goes with a command that failed soon
        _OF_THE_COMMAND.set(self)

    def tell(self) -> None:
        """Say it, if the command took long."""
        seconds = self.clock() - self.began
        if seconds < LONG:
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
            return
        minutes = f"{seconds / 60:,.0f} minute" + ("s" if round(seconds / 60) != 1 else "")
        said = self.found() or NOTHING
        err.print(f"krony: after {minutes}: {said}", markup=False, soft_wrap=True)


_OF_THE_COMMAND: ContextVar[Kept | None] = ContextVar("kept", default=None)


def keeps(found: Callable[[], str | None], folder: Path | None = None) -> None:
    """Of the command that runs: what to say of what is kept by then; None: nothing is.

    Args:
        folder: where it is kept. What a command that failed soon put there goes with it, unless an
            earlier one had left something there.
    """
    if (kept := _OF_THE_COMMAND.get()) is not None:
        kept.found = found
        kept.folder = None if folder is None or folder.exists() else folder


def unless_json() -> str:
    """What is said where only a file that is to be written would have a place beside it."""
    return "nothing was kept: with --json FILE what is finished is kept beside the file"


def work(folder: Path) -> Callable[[], str | None]:
    """What is said of finished stages in a work folder."""

    def found() -> str | None:
        if not folder.is_dir() or not any(folder.iterdir()):
            return None
        size = sum(path.stat().st_size for path in folder.iterdir())
        return (
            f"what is finished is kept in {folder} ({size / 1e6:,.0f} MB): the same command goes "
            "on from there; remove it if you don't want to"
        )

    return found


def run(folder: Path) -> Callable[[], str | None]:
    """What is said of the run directory of healing."""

    def found() -> str | None:
        if not folder.is_dir():
            return None
        from krony.healing.training import last_checkpoint

        stages = sorted(folder.glob("stage-*"))
        last = next(filter(None, (last_checkpoint(each) for each in reversed(stages))), None)
        if last is None and len(stages) < 2:
            return (
                f"{folder} has no checkpoint yet (--save-minutes says how often): with --resume "
                "the same command begins again"
            )
        at = "the end of a stage" if last is None else f"step {last.name.partition('-')[2]}"
        return f"{folder} keeps everything up to {at}: the same command with --resume goes on there"

    return found
