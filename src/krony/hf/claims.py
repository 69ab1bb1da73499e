"""A destination is claimed before the work starts, and what becomes it grows out of sight.

A claim on DIR is the folder .DIR.partial beside it, with a lock that the system lifts when its
owner ends. Files are written in there and renamed to DIR when they are whole. Whatever is left of a
run that was killed goes when its janitor (`janitor.py`) sees the end of it, at the latest with the
next claim on the same destination.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from krony.errors import KronyError
from krony.hf import janitor


@dataclass
class Claim:
    """A claim of this process. `uses` counts who relies on it."""

    folder: Path
    lock: int
    watcher: "subprocess.Popen[bytes] | None"
    process: int
    uses: int = 0


_HELD: dict[Path, Claim] = {}  # one entry a claim, gone with it


def check_destination(destination: str | Path) -> Path:
    """The path, if a new directory can be made there. Raises `KronyError` otherwise.

    Meant to be called before the work starts.
    """
    path = Path(destination)
    if path == Path("demo"):
        raise KronyError("demo is the name of the packaged model; choose another for yours")
    if path.exists() or path.is_symlink():
        raise KronyError(f"{path} exists already; choose another name or remove it first")
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KronyError(f"can't make the folder {parent}: {error.strerror}") from error
    if not os.access(parent, os.W_OK):
        raise KronyError(f"can't write into {parent}: permission denied; choose another folder")
    return path


def check_file(path: str | Path, ours: Callable[[bytes], bool]) -> Path:
    """The path of a file that can be written there, before the work starts.

    Args:
        ours: whether what is there already is what would be written anew; anything else stays.
    Raises:
        KronyError: a folder, somebody else's file, or a place where nothing can be written.
    """
    path = Path(path)
    if path.is_dir():
        raise KronyError(f"{path} is a folder; give the name of a file")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else None
    except OSError as error:
        raise KronyError(f"can't write {path}: {error.strerror or error}") from error
    if content is not None and not ours(content):
        raise KronyError(
            f"{path} exists and is not what this command writes; choose another name or remove it"
        )
    if not os.access(path.absolute().parent, os.W_OK):
        raise KronyError(f"can't write {path}: permission denied; choose another folder")
    return path


@contextmanager
def claim(destination: str | Path) -> Iterator[Path]:
    """Inside, no other process of krony writes `destination`; the folder to write in meanwhile.

    May be nested: the command claims before it starts, the function that writes once more.

    Raises:
        KronyError: another process has claimed it, or nothing can be written beside it.
    """
    path = Path(destination).absolute()
    held = _HELD.get(path)
    if held is None or held.process != os.getpid():
        held = _HELD[path] = _made(path)
    held.uses += 1
    try:
        yield held.folder
    finally:
        held.uses -= 1
        if held.uses == 0:
            del _HELD[path]
            _lift(held)


@contextmanager
def new_directory(destination: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `destination` at the end, or vanishes on any error.

    Raises:
        KronyError: the destination exists or is claimed by another process, or the system can't
            write (a full disk, say).
    """
    path = check_destination(destination)
    with claim(path) as claimed:
        try:
            # Again, with its parents: the work may have taken hours, and somebody tidied up.
            claimed.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix="new.", dir=claimed))
        except OSError as error:
            raise KronyError(f"can't write {path}: {error.strerror}") from error
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())  # mkdtemp's directory is private
            if path.exists():  # an empty one would be replaced in silence
                raise KronyError(f"{path} was made by somebody else meanwhile; nothing was written")
            os.rename(temporary, path)
        except KronyError:
            raise
        except Exception as error:
            if (reason := write_error(error)) is None:
                raise
            raise KronyError(
                f"can't write {path}: {reason}; nothing was left there, free some space or "
                "choose another place"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_error(error: BaseException) -> str | None:
    """What the system said when it could not write, whichever library was writing; else None."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    own = type(error).__name__ == "SafetensorError"
    if own or "os error" in text or "PytorchStreamWriter" in text or "No space left" in text:
        return first
    return None


def discard(folder: Path, destination: str | Path) -> None:
    """Remove a folder so that no half of it is ever seen: out of sight first, under a claim."""
    with claim(destination) as claimed:
        aside = claimed / f"old.{folder.name}"
        try:
            os.rename(folder, aside)
        except OSError:  # on another file system, or gone
            aside = folder
        shutil.rmtree(aside, ignore_errors=True)


def _made(path: Path) -> Claim:
    folder = path.with_name(f".{path.name}.partial")
    for _ in range(100):  # each time another one has just given it up
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
        except OSError as error:
            raise KronyError(
                f"can't write beside {path}: {error.strerror}; choose another place"
            ) from error
        try:
            lock = janitor.locked(folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise KronyError(
                f"can't write beside {path}: {error.strerror}; choose another place"
            ) from error
        if lock is None:
            raise KronyError(
                f"another krony is writing {path} at this moment; wait for it, or choose another "
                "destination"
            )
        for stale in folder.iterdir():  # of a run that was killed together with its janitor
            if stale.name != janitor.LOCK:
                shutil.rmtree(stale, ignore_errors=True)
        return Claim(folder, lock, _watcher(folder), os.getpid())
    raise KronyError(f"{path} is claimed and given up by others all the time; choose another name")


def _watcher(folder: Path) -> "subprocess.Popen[bytes] | None":
    command = [sys.executable, "-I", "-S", janitor.__file__, str(folder)]
    try:
        # Its standard error is that of its owner: who reads that to its end finds all removed.
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
    except OSError:  # no more processes: then the next claim cleans up
        return None


def _lift(held: Claim) -> None:
    if held.process != os.getpid():  # a fork's copy
        return
    shutil.rmtree(held.folder, ignore_errors=True)
    os.close(held.lock)
    if held.watcher is not None:
        with suppress(OSError):
            held.watcher.communicate(b".")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
