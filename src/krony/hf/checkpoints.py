"""Model directories: read as safetensors and JSON only, written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from krony.errors import KronyError
from krony.hf import modeling  # noqa: F401  registers the loader
from krony.nn.activations import fuse

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(source: str | Path) -> str:
    """The directory of the packaged model for "demo", else `source`, checked as far as possible.

    Raises:
        KronyError: a local directory without a configuration or without safetensors weights.
    """
    if str(source) == DEMO:
        return str(Path(__file__).parents[1] / "demo" / "model")
    path = Path(source)
    if path.is_file():
        raise KronyError(f"{source} is a file; give the model's directory or its Hub name")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise KronyError(f"{source} has no config.json, so it is no model directory")
        if not list(path.glob("*.safetensors")):
            pickles = sorted(p.name for p in path.glob("*.bin")) + sorted(
                p.name for p in path.glob("*.pt*")
            )
            if pickles:
                raise KronyError(_pickle_message(str(source), pickles[0]))
            raise KronyError(f"{source} has a config.json but no *.safetensors weights")
    return str(source)


def _pickle_message(source: str, name: str) -> str:
    return (
        f"{source} has its weights only as a pickle ({name}), which can run code when it is read; "
        "convert it once with transformers where you trust it: "
        "model.save_pretrained(directory) writes safetensors"
    )


def load_model(
    source: str | Path, dtype: torch.dtype | str | None = None, device: str | None = None
) -> PreTrainedModel:
    """A causal language model, dense or factored, in evaluation mode.

    Args:
        source: a Hub name, a local directory, or "demo".
        dtype: None keeps the dtype of the checkpoint.
        device: a torch device; None leaves the model on the CPU.
    Raises:
        KronyError: nothing there, no safetensors weights, or weights that do not load.
    """
    path = resolve(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, KronyError):
            raise
        raise KronyError(_load_message(str(source), error)) from error
    fuse(model)
    if device is not None:
        model = model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval()


def _load_message(source: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    if "safetensors" in first and not Path(source).exists():
        return _pickle_message(source, "pytorch_model.bin")
    if isinstance(error, OSError) and not Path(source).exists():
        return (
            f"can't find a model {source!r}: it is no local directory, and no model of that name "
            f"could be had from the Hugging Face Hub; check the name and the network, or use "
            f"{DEMO!r}, the packaged model"
        )
    return f"can't load the model {source}: {first}"


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that travels with a model. Raises `KronyError` if there is none."""
    path = resolve(source)
    missing = KronyError(
        f"{source} has no tokenizer that transformers can load; copy the tokenizer files of the "
        "original model into it"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise missing from error
    # Where a model has no tokenizer files, transformers makes up one without a vocabulary.
    if tokenizer.vocab_size < 2:
        raise missing
    return tokenizer


def find_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or None where the model has none (a randomly initialised one, say)."""
    try:
        return load_tokenizer(source)
    except KronyError:
        return None


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
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
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
