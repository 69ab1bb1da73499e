"""Directories and files written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError
from krony.hf.loading import resolve
from krony.hf.modeling import config_of
from krony.hf.whole import left_over


def check_destination(destination: str | Path) -> Path:
    """The path, if a new directory can be made there. Raises `KronyError` otherwise.

    Meant to be called before the work starts.
    """
    path = Path(destination)
    if path.exists():
        raise KronyError(f"{path} exists already; choose another name or remove it first")
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KronyError(f"can't make the folder {parent}: {error.strerror}") from error
    if not os.access(parent, os.W_OK):
        raise KronyError(f"can't write into {parent}: permission denied; choose another folder")
    return path


@contextmanager
def new_directory(destination: str | Path) -> Iterator[Path]:
    """A temporary sibling that becomes `destination` at the end, or vanishes on any error.

    Raises:
        KronyError: the destination exists, or the system can't write (a full disk, say).
    """
    path = check_destination(destination)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's directory is private
        os.rename(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise KronyError(
            f"can't write {path}: {reason}; nothing was left there, free some space or choose "
            "another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_model(
    model: PreTrainedModel,
    destination: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str = "5GB",
    also: Callable[[Path], object] | None = None,
) -> Path:
    """Write the model, its generation configuration and its tokenizer: whole or not at all.

    Args:
        also: writes whatever else belongs into the directory.
    Raises:
        KronyError: the destination exists, or can't be written.
    """
    with new_directory(destination) as temporary:
        # Tensors that travel along; of a factored model its quantizer adds them.
        extra = left_over(model) if config_of(model) is None else {}
        state = {**model.state_dict(), **extra} if extra else None
        model.save_pretrained(temporary, max_shard_size=max_shard_size, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if also is not None:
            also(temporary)
    return Path(destination)


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all, replacing what was there. Raises `KronyError`."""
    target = Path(path)
    write_file(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary sibling of the same suffix, then rename it to `path`."""
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise KronyError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: str | Path, data: Any) -> None:
    """Indented JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def directory_bytes(path: str | Path, files: str = "*.safetensors") -> int:
    """Bytes of the weights in a model directory."""
    folder = Path(path) if Path(path).is_dir() else Path(resolve(path))
    return sum(p.stat().st_size for p in folder.glob(files))
