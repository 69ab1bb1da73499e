"""Model directories, local or on the Hub: read as safetensors and JSON only, whole or refused."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from krony.errors import KronyError, first_line
from krony.hf import (
    integrity,
    modeling,  # noqa: F401  registers the loader
    ties,
    vetting,
)
from krony.hf.gguf import is_gguf, load_gguf, load_gguf_tokenizer
from krony.hf.modeling import config_of
from krony.hf.whole import unwrapped
from krony.nn.activations import fuse

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of a model on the Hub: weights, what describes them, and what must travel with them.
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
UNWANTED = ["*/*", "consolidated*", "*.fp16.safetensors", "*.fp32.safetensors"]
NAMED = 4  # tensors that a message lists
# What trainers write beside weights; nothing of it belongs into a model.
OPTIMIZER = re.compile(r"(^|\.)(optim(izer)?|exp_avg(_sq)?|momentum(_buffer)?|lr_scheduler)(\.|$)")
# Masks and tables of positions that older versions wrote, and newer ones compute.
COMPUTED = re.compile(
    r"(rotary_emb\.|original_)?inv_freq$|position_ids$|attn\.(masked_)?bias$"
    r"|attention\.(masked_)?bias$"
)


def resolve(source: str | Path) -> str:
    """The directory of a model: local, of the packaged one for "demo", or the snapshot of the Hub.

    Raises:
        KronyError: no such model, or one without a configuration or without safetensors weights.
    """
    if str(source) == DEMO:
        if Path(DEMO).exists():
            raise KronyError(
                f"{DEMO} is the packaged model and also a path here; write ./{DEMO} for the path, "
                "or rename it"
            )
        return str(Path(__file__).parents[1] / "demo" / "model")
    path = Path(source)
    if path.is_file():
        raise KronyError(f"{source} is a file; give the model's directory or its Hub name")
    if not path.is_dir():
        path = _snapshot(str(source))
    if not (path / "config.json").is_file():
        raise KronyError(f"{source} has no config.json, so it is no model directory")
    if not list(path.glob("*.safetensors")) and not (path / vetting.INDEX).is_file():
        kinds = ("*.bin", "*.pt*", "*.ckpt", "*.pkl")
        if pickles := [p.name for kind in kinds for p in sorted(path.glob(kind))]:
            raise KronyError(
                f"{source} has its weights only as a pickle ({pickles[0]}), which can run code "
                "when it is read; convert it once with transformers where you trust it: "
                "model.save_pretrained(directory) writes safetensors"
            )
        raise KronyError(f"{source} has a config.json but no *.safetensors weights")
    return str(path)


def _snapshot(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:  # the network library's own kinds among them
        raise KronyError(
            f"can't find a model {name!r}: it is no local directory, and no model of that name "
            f"could be had from the Hugging Face Hub; check the name and the network, or use "
            f"{DEMO!r}, the packaged model"
        ) from error


def load(
    source: str | Path, dtype: torch.dtype | str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer; see `load_model` and `load_tokenizer`."""
    return load_model(source, dtype, device), load_tokenizer(source)


def load_model(
    source: str | Path, dtype: torch.dtype | str | None = None, device: str | None = None
) -> PreTrainedModel:
    """A causal language model, dense or factored, in evaluation mode, whole.

    GPT-2's GELU, eight operations in transformers, is one kernel here, in dense models too: else a
    factored model would be compared with a slower one. The two are equal but for rounding, and
    `krony.nn.activations.restore` takes it back.

    Tensors that the class has no place for (heads for further tokens, say) are named in a warning
    and travel with the model: `save_model` writes them again.

    Args:
        source: a Hub name, a local directory, or "demo".
        dtype: None keeps the dtype of the checkpoint.
        device: a torch device; None leaves the model on the CPU.
    Raises:
        KronyError: nothing there; no safetensors weights; a tensor that is missing, of another
            shape, or with NaN in it; a factor that differs from its checksum; an encoder; files
            that say what can't be.
    """
    if is_gguf(source):
        model, report = load_gguf(source, dtype)
        check_decoder(model.config, str(source))
        _check_report(str(source), report)
        _check_finite(str(source), model)
    else:
        model = _of_directory(source, dtype)
    fuse(model)
    if device is not None:
        model = model.to(torch.device(device))  # type: ignore[arg-type]
    model.eval()
    return model


def _of_directory(source: str | Path, dtype: torch.dtype | str | None) -> PreTrainedModel:
    """As `load_model`, as the files have it."""
    folder = Path(resolve(source))
    found = vetting.weights(folder)
    vetting.configuration(folder, found)
    integrity.check_factors(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_decoder(config, str(source))
        vetting.check_size(folder, config, found)
        options: dict[str, Any] = {}
        if (prefix := vetting.wrapper(found)) is not None:
            warnings.warn(f"names in {source} carry {prefix}; read without it", stacklevel=2)
            options["key_mapping"] = vetting.renamed(found)
        made: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and end it below
            **options,
        )
    except KronyError:
        raise
    except Exception as error:  # whatever a library makes of files that are not what they should be
        raise KronyError(f"can't load the model {source}: {_first_line(error)}") from error
    model, report = cast(tuple[PreTrainedModel, dict[str, Any]], made)
    # Saved again, the names are those of the model.
    mapped = options.get("key_mapping", {})
    conversions: Any = model._weight_conversions
    kept = [c for c in conversions if not mapped.keys() & set(c.source_patterns)]
    vars(model)["_weight_conversions"] = kept
    _check_report(str(source), report)
    if config_of(model) is None and not hasattr(model.config, "quantization_config"):
        vetting.check_dtypes(str(source), model, found)
    _check_finite(str(source), model)
    if ties.settle(model):
        warnings.warn(
            f"config.json of {source} says of the output matrix what the weights do not: it is "
            f"{'the embedding' if ties.output_is_tied(model) else 'a matrix of its own'}, and is "
            "saved as that",
            stacklevel=2,
        )
    _keep_left_over(str(source), model, report["unexpected_keys"], found)
    return model


def _first_line(error: Exception) -> str:
    text = first_line(error, 300) if str(error).strip() else ""
    # Messages of a bare key or number say nothing without the kind of error.
    plain = isinstance(error, OSError | ValueError | RuntimeError) and len(text.split()) > 3
    return text if plain else f"{type(error).__name__} {text}".strip()


def check_decoder(config: Any, source: str) -> None:
    """Raise `KronyError` for an encoder, which sees what it would have to predict."""
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder:
        if config.model_type in ("bart", "mbart", "mvp"):  # their decoders alone are loaded
            return
        raise KronyError(
            f"{source} is an encoder ({config.model_type}): every token sees those behind it, so "
            "that predicting the next one, perplexity and text mean nothing; give a decoder"
        )


def _check_report(source: str, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if mismatched := sorted(report["mismatched_keys"]):
        key, has, wants = mismatched[0]
        raise KronyError(
            f"{len(mismatched)} tensors of {source} have another shape than its config.json says: "
            f"{key} is {_sides(has)} in the file and {_sides(wants)} in the model; one of the two "
            "is of another model"
        )
    if missing:
        raise KronyError(
            f"{source} lacks {len(missing)} tensors that the model needs: {names(missing)}; get "
            "the whole checkpoint"
        )
    if report["error_msgs"]:
        raise KronyError(f"can't load the model {source}: {report['error_msgs'][0][:300]}")


def _sides(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def names(found: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more


def _check_finite(source: str, model: PreTrainedModel) -> None:
    if (found := vetting.not_finite(model)) is not None:
        name, bad, weight = found
        raise KronyError(
            f"{name} of {source} has {bad} NaN or Inf among its {weight.numel():,} numbers; "
            "the checkpoint is damaged, get it again or train it with a lower learning rate"
        )


def _keep_left_over(
    source: str, model: PreTrainedModel, unexpected: Iterable[str], found: vetting.Weights
) -> None:
    """Note the tensors that the class has no place for, also those that it drops in silence."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    silent = re.compile("|".join(f"({p})" for p in patterns)) if patterns else None
    state = model.state_dict().keys()
    left: dict[str, tuple[Path, str]] = {}
    for key, shape in found.shapes.items():
        name = unwrapped(key)
        dropped = silent is not None and silent.search(name) and name not in state
        if (dropped or name in unexpected) and 0 not in shape and not COMPUTED.search(name):
            left[name] = (found.files[key], key)
    states = sorted(name for name in left if OPTIMIZER.search(name))
    others = sorted(left.keys() - set(states))
    if others:
        warnings.warn(
            f"{len(others)} tensors of {source} have no place in {type(model).__name__} and travel "
            f"along as they are: {names(others)}",
            stacklevel=3,
        )
    if states:
        warnings.warn(
            f"{len(states)} tensors of {source} are of an optimizer and are left out: "
            f"{names(states)}",
            stacklevel=3,
        )
    if others:
        vars(model)["left_over"] = {name: left[name] for name in others}


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that travels with a model. Raises `KronyError` if there is none."""
    path = str(source) if is_gguf(source) else resolve(source)
    missing = (
        f"{source} has no tokenizer that transformers can load{{}}; copy the tokenizer files of "
        "the original model into it"
    )
    try:
        if is_gguf(source):
            tokenizer = load_gguf_tokenizer(source)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the Rust library's panic is no Exception
        reason = _first_line(error) if isinstance(error, Exception) else "it breaks the library"
        raise KronyError(missing.format(f" ({reason})")) from error
    # Where a model has no tokenizer files, transformers makes up one without a vocabulary.
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.vocab_size < 2:
        raise KronyError(missing.format(""))
    return tokenizer


def find_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or None where the model has none (a randomly initialized one, say).

    One that can't be loaded is said in a warning.
    """
    try:
        return load_tokenizer(source)
    except KronyError as error:
        folder = Path(source).parent if is_gguf(source) else Path(resolve(source))
        if any(folder.glob("tokenizer*")) or any(folder.glob("*.model")):
            warnings.warn(f"texts can't be read: {error}", stacklevel=2)
        return None


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that lies where a model came from.

    Raises:
        KronyError: the model came from nowhere, or there is none.
    """
    if not model.name_or_path:
        raise KronyError("this model came from no directory, so give its tokenizer too")
    return load_tokenizer(model.name_or_path)
