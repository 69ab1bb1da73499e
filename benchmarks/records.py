"""What every benchmark shares: figures as JSON, what they were measured on, a limit of time.

The whole file is written anew after every row, so that a run that is cut off keeps what it had.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from krony.hf.checkpoints import write_json
from krony.measure.evaluate import environment

RESULTS = Path(__file__).resolve().parent / "results"
HIDDEN = ("out", "command", "only")  # of the command line, no settings of what is measured


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The command line with what all have.

    Args:
        name: of the file of results.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--small", action="store_true", help="toy sizes, to see that it runs")
    made.add_argument(
        "--limit", type=float, metavar="SECONDS", help="begin nothing after so many seconds"
    )
    return made


def commit() -> str:
    """Of the sources: the environment variable COMMIT where there is no repository, else git's."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def surroundings() -> dict[str, Any]:
    """Date, hardware, versions and commit."""
    found: dict[str, Any] = {**environment(), "commit": commit()}
    found["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    if torch.cuda.is_available():
        found["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


class Record:
    """A file of results.

    Args:
        options: its settings, and its path, `options.out`.
        keep: parts that a run does not measure keep their last figures.
    Attributes:
        content: as JSON; change it and call `write`.
    """

    def __init__(self, what: str, options: argparse.Namespace, keep: bool = False) -> None:
        self.path: Path = options.out
        self.limit: float | None = options.limit
        self.began = time.perf_counter()
        self.content: dict[str, Any] = {}
        if keep and self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
        settings = {k: _plain(v) for k, v in vars(options).items() if k not in HIDDEN}
        self.content |= {
            "what": what,
            "settings": settings,
            "seed": options.seed,
            "environment": surroundings(),
        }
        self.content.pop("not_done", None)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        """The file as it now should be, whole."""
        self.content["seconds"] = round(time.perf_counter() - self.began, 1)
        write_json(self.path, self.content)

    def add(self, row: dict[str, Any], part: str = "rows") -> None:
        """One row more, on disk at once."""
        self.content.setdefault(part, []).append(row)
        self.write()

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return float("inf") if self.limit is None else self.limit - self.spent

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    def has_time(self, name: str, seconds: float = 0.0) -> bool:
        """Whether what takes so long can still be done; what can't is noted in the file and said.

        Args:
            seconds: a guess, from what was done so far.
        """
        if self.left > seconds:
            return True
        self.content.setdefault("not_done", []).append(name)
        self.write()
        print(f"not done, no time left: {name}", flush=True)
        return False


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def show_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a Markdown table."""
    names = list(head)
    print("| " + " | ".join(names) + " |")
    print("|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
