"""Directories and files written whole or not at all."""

import glob
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError
from krony.hf import integrity, ties
from krony.hf.claims import check_destination, claim, discard, new_directory
from krony.hf.companions import companions, save_weights
from krony.hf.loading import resolve
from krony.hf.modeling import config_of
from krony.hf.vetting import not_finite
from krony.hf.whole import left_over

__all__ = [
    "check_destination",
    "claim",
    "companions",
    "directory_bytes",
    "discard",
    "new_directory",
    "save_model",
    "save_weights",
    "write_file",
    "write_json",
    "write_text",
]


def save(
    model: PreTrainedModel,
    destination: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a model and its tokenizer to a directory that `load` reads; see `save_model`.

    Raises:
        KronyError: a destination that exists already or can't be written.
    """
    return save_model(model, destination, tokenizer)


def save_model(
    model: PreTrainedModel,
    destination: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str = "5GB",
    also: Callable[[Path], object] | None = None,
) -> Path:
    """Write the model with what belongs to it (`companions.py`), whole or not at all.

    A factored model gets checksums (`integrity.py`).

    Args:
        also: writes whatever else belongs into the directory.
    Raises:
        KronyError: NaN or Inf in the model; the destination exists, is being written by another
            process, or can't be written.
    """
    _check_finite(model)
    ties.settle(model)
    with new_directory(destination) as temporary:
        # Tensors that travel along; of a factored model its quantizer adds them.
        extra = left_over(model) if config_of(model) is None else {}
        state = {**model.state_dict(), **extra} if extra else None
        save_weights(model, temporary, max_shard_size, state)
        companions(model, temporary, tokenizer)
        if also is not None:
            also(temporary)
        integrity.record(temporary)
    return Path(destination)


def _check_finite(model: PreTrainedModel) -> None:
    """Raise `KronyError` for numbers that no loader should accept, as rounding to half makes."""
    if (found := not_finite(model)) is not None:
        name, bad, weight = found
        raise KronyError(
            f"{name} has {bad} NaN or Inf among its {weight.numel():,} numbers in "
            f"{str(weight.dtype).removeprefix('torch.')}; write the model in a dtype with a "
            "wider range: bfloat16 or float32"
        )


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
        _sweep(target)
        write(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise KronyError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sweep(target: Path) -> None:
    """Remove what processes that are no more left of their attempts to write `target`."""
    start, end = f".{target.stem}.", target.suffix
    for path in target.parent.glob(f"{glob.escape(start)}*{glob.escape(end)}"):
        number = path.name.removeprefix(start).removesuffix(end)
        if number.isdigit() and not _alive(int(number)):
            with suppress(OSError):
                path.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_json(path: str | Path, data: Any) -> None:
    """Indented JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def directory_bytes(path: str | Path, files: str = "*.safetensors") -> int:
    """Bytes of the weights in a model directory."""
    folder = Path(path) if Path(path).is_dir() else Path(resolve(path))
    return sum(p.stat().st_size for p in folder.glob(files))
