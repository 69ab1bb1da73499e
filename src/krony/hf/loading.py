"""Model directories, local or on the Hub: read as safetensors and JSON only, whole or refused."""

from pathlib import Path

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
