"""GGUF files as models: read by transformers, with the tokenizer's rule for splitting texts."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from krony.errors import KronyError, first_line

# What GGUF calls the architectures that krony writes; transformers reads more.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def is_gguf(source: str | Path) -> bool:
    """Whether a source is a GGUF file here."""
    return str(source).lower().endswith(".gguf") and Path(source).is_file()


def needed() -> Any:
    """The `gguf` package. Raises `KronyError` where it is not installed."""
    try:
        importlib.import_module("gguf.quants")
        return importlib.import_module("gguf")
    except ImportError as error:
        raise KronyError(
            "GGUF files need the gguf package; install it with pip install 'krony[gguf]'"
        ) from error


def load_gguf(
    source: str | Path, dtype: torch.dtype | str | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in a GGUF file, its quantized weights widened, and the report of what was missing.

    Args:
        dtype: None: float16, what half-precision files hold; quantized ones lose less than they
            lost already.
    Raises:
        KronyError: no `gguf` package, or a file that transformers can't read.
    """
    path, package = Path(source), needed()
    try:
        _check_rotary(source, package.GGUFReader(path))
        config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if config.model_type == "gpt2":  # transformers (5.24) reads two of its keys under others
            config.n_positions = getattr(config, "n_ctx", config.n_positions)
            config.n_inner = getattr(config, "feed_forward_length", config.n_inner)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=dtype or torch.float16,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    except KronyError:
        raise
    except Exception as error:  # whatever the libraries make of a file that is not what it says
        raise KronyError(
            f"can't load the model {source}: {first_line(error, 300)}; get the file again"
        ) from error
    made: Any = loaded[0]
    report: dict[str, Any] = loaded[1]
    _say_left_over(source, made, package.GGUFReader(path))
    # The configuration of an ordinary model: the loaded one says that the weights are quantized.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        vars(made.config).pop(name, None)
    vars(made).pop("hf_quantizer", None)
    for name in ("is_quantized", "quantization_method"):
        vars(made).pop(name, None)
    made.config._name_or_path = made.name_or_path = ""
    return made, report


def _check_rotary(source: str | Path, reader: Any) -> None:
    """Raise `KronyError` for scaled frequencies, which transformers (5.24) passes over in silence
    in all but one architecture."""
    keys = [key for key in reader.fields if key.endswith(".rope.scaling.type")]
    scaled = [key for key in keys if str(reader.get_field(key).contents()) != "none"]
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        scaled.append("rope_freqs.weight")
    if scaled and not scaled[0].startswith("gpt-oss"):
        raise KronyError(
            f"{source} has scaled rotary frequencies ({scaled[0]}), which can't be read from GGUF: "
            "the model would be another one; give the directory that the file was made from"
        )


def _say_left_over(source: str | Path, model: PreTrainedModel, reader: Any) -> None:
    """Warn of tensors that transformers passed over in silence: a bias, a head for more tokens."""
    try:
        library = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        known = library.get_gguf_hf_weights_map(model, library.TensorProcessor())
    except Exception:  # a part of transformers that is not public
        return
    left = [t.name for t in reader.tensors if t.name not in known and "exp" not in t.name]
    if left:
        warnings.warn(
            f"{len(left)} tensors of {source} have no place in {type(model).__name__} and are left "
            f"out: {', '.join(left[:4])}",
            stacklevel=4,
        )


def load_gguf_tokenizer(source: str | Path) -> Any:
    """The tokenizer in a GGUF file."""
    package, path = needed(), Path(source)
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    field = package.GGUFReader(path).get_field("tokenizer.ggml.pre")
    name = "" if field is None else str(field.contents())
    if name in PRE and tokenizer.backend_tokenizer is not None:
        # transformers splits all of them as GPT-2 does.
        made: Any = PRE[name]
        tokenizer.backend_tokenizer.pre_tokenizer = made()
    tokenizer.name_or_path = ""
    return tokenizer


def pre_tokenizer_name(state: Any) -> str:
    """What llama.cpp calls a way to split texts. Raises `KronyError` for one that has no name here.

    Args:
        state: of the pre-tokenizer, as tokenizer.json has it.
    """
    steps = [] if state is None else state.get("pretokenizers", [state])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0].get("pattern", {}).get("Regex")
        for name, known in (("qwen2", QWEN2), ("llama-bpe", LLAMA3)):
            if pattern == known:
                return name
    raise KronyError(
        f"the tokenizer splits texts in a way ({', '.join(kinds) or 'none'}) that krony has no "
        "name for in GGUF; use llama.cpp's converter"
    )


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: _split(QWEN2),
    "llama-bpe": lambda: _split(LLAMA3),
}
