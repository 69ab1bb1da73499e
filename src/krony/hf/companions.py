"""What lies beside the weights and comes along as it was: configuration, generation settings,
tokenizer files, licenses.

transformers writes all of these anew, and not as they were: newer names that older readers do not
know, another class of tokenizer, generation settings only if it finds them valid.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

TEMPLATES = "additional_chat_templates"
TOKENIZERS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "tekken.json",
    "chat_template*",
    f"{TEMPLATES}/*.jinja",
)
OTHERS = (
    "licen[cs]e*",
    "notice*",
    "copying*",
    "copyright*",
    "*use_policy*",
    "*acceptable_use*",
    "preprocessor_config.json",
    "processor_config.json",
)
GENERATION, CONFIG = "generation_config.json", "config.json"
# Of a configuration: what says how the weights are stored, or which code reads them, is not the
# source's business.
OWN = ("quantization_config", "auto_map", "transformers_version", "torch_dtype", "dtype")
NEWER_TOKENIZER, OLDER_TOKENIZER = "TokenizersBackend", "PreTrainedTokenizerFast"
GPT_NEOX = ("gpt_neox", "gpt_neox_japanese")  # the older names of their own


def companions(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Put beside a model that is being written into `folder` what belongs to it, as it was.

    Tokenizer files and licenses are copied byte for byte (but for the name of a class that
    transformers 4 does not know) from where the model and the tokenizer were loaded, unless the
    tokenizer was changed since, and generation settings likewise, valid or not. `config.json`,
    if it is there already, gets back what transformers renamed or left out, and the rotary
    settings under both their newer and their older names.

    Args:
        tokenizer: written by transformers where it was changed, or has no files to copy.
    """
    home = source_folder(model.name_or_path, getattr(model.config, "_commit_hash", None))
    if home is not None:
        _copy(home, folder, OTHERS)
    _generation(model, home, folder)
    if (folder / CONFIG).is_file():
        _complete_config(model, home, folder / CONFIG)
    theirs = home if tokenizer is None else source_folder(tokenizer.name_or_path)
    copied = False
    if theirs is not None and (tokenizer is None or _unchanged(tokenizer, theirs)):
        copied = bool(_copy(theirs, folder, TOKENIZERS))
    if tokenizer is not None and not copied:
        tokenizer.save_pretrained(folder)
    _older_tokenizer(folder / "tokenizer_config.json")


def save_weights(
    model: PreTrainedModel,
    folder: Path,
    max_shard_size: str = "5GB",
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """`model.save_pretrained`, which generation settings that transformers refuses do not stop.

    They are left to `companions`.
    """
    with _without_generation(model):
        model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=state_dict)
    for weights in folder.glob("*.safetensors"):  # the library writes them for their owner alone
        shutil.copymode(folder / CONFIG, weights)


def source_folder(name: str | None, revision: str | None = None) -> Path | None:
    """The directory that something was loaded from: itself, or the copy of what is on the Hub.

    None where there is no such thing any more, or never was.
    """
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import snapshot_download

    wanted = [*TOKENIZERS, "LICEN[CS]E*", "NOTICE*", CONFIG, GENERATION]
    for offline in (False, True):
        try:
            return Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=wanted, local_files_only=offline
                )
            )
        except Exception:  # whatever a network can do; what is in the cache is enough
            continue
    return None


def is_companion(name: str, patterns: tuple[str, ...] = (*TOKENIZERS, *OTHERS)) -> bool:
    """Whether a file's name within a model directory matches one of the patterns."""
    inside = name.startswith(f"{TEMPLATES}/")
    return any(fnmatch(name.lower(), p) and ("/" in p) == inside for p in patterns)


def _copy(source: Path, folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """The files of `source` that match, copied byte for byte; their names."""
    names = []
    for path in sorted([*source.glob("*"), *source.glob(f"{TEMPLATES}/*")]):
        name = path.relative_to(source).as_posix()
        if path.is_file() and is_companion(name, patterns):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
            names.append(name)
    return names


def _unchanged(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether the files there make this tokenizer."""
    try:
        fresh = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception:  # files of every kind are read here, and each reader fails in its own way
        return False
    return _state(tokenizer) == _state(fresh)


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        inside: Any = tokenizer.get_vocab()
    else:
        inside = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # what the last call asked for
            inside.pop(passing, None)
    return {
        "class": type(tokenizer).__name__,
        "inside": inside,
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "template": getattr(tokenizer, "chat_template", None),
        "length": tokenizer.model_max_length,
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
    }


@contextmanager
def _without_generation(model: PreTrainedModel) -> Iterator[None]:
    """Inside, saving the model neither judges nor writes generation settings."""

    class Silent:
        def save_pretrained(self, *_: Any, **__: Any) -> None: ...

    kept: Any = model.__dict__.get("generation_config")
    # Settings of generation inside of the model's configuration, as older models have them.
    inside = model.config._get_generation_parameters()
    for key in inside:
        setattr(model.config, key, None)
    if kept is not None:
        model.generation_config = Silent()  # type: ignore[assignment]
    try:
        yield
    finally:
        if kept is not None:
            model.generation_config = kept
        for key, value in inside.items():
            setattr(model.config, key, value)


def _generation(model: PreTrainedModel, home: Path | None, folder: Path) -> None:
    settings = getattr(model, "generation_config", None)
    if settings is None or not model.can_generate():
        return
    there = None if home is None else home / GENERATION
    if there is not None and there.is_file():
        try:
            fresh = GenerationConfig.from_pretrained(there.parent)
            same = _settings(fresh) == _settings(settings)
        except Exception:  # not even readable by transformers; the model got along without it
            same = True
        if same:
            shutil.copyfile(there, folder / GENERATION)
            return
    settings.to_json_file(folder / GENERATION, use_diff=True)


def _settings(config: GenerationConfig) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k != "transformers_version"}


def _complete_config(model: PreTrainedModel, home: Path | None, path: Path) -> None:
    """Add to config.json what the source had and what older readers look for, key by key, as far as
    transformers then reads the same configuration from it as before."""
    written = json.loads(path.read_text(encoding="utf-8"))
    source: dict[str, Any] = {}
    if home is not None and (home / CONFIG).is_file() and home.resolve() != path.parent.resolve():
        source = json.loads((home / CONFIG).read_text(encoding="utf-8"))
    full, plain = written, _read(model, written)
    settings = model.config._get_generation_parameters()
    for key, value in {**_left_out(source, written), **_older(written)}.items():
        more = _merged(full, {key: value})
        if key in settings or _read(model, more) == plain:
            full = more
    if "dtype" in written:
        full["torch_dtype"] = written["dtype"]  # its name before transformers 4.56
    path.write_text(json.dumps(full, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _left_out(source: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """What the source's configuration has and the written one does not, nested ones included."""
    found: dict[str, Any] = {}
    for key, value in source.items():
        if key in OWN:
            continue
        other = written.get(key)
        if key not in written:
            found[key] = value
        elif key.endswith("_config") and isinstance(value, dict) and isinstance(other, dict):
            found[key] = _left_out(value, other)
    return found


def _older_tokenizer(path: Path) -> None:
    """Call the class of a tokenizer that is in tokenizer.json as a whole by the name that
    transformers 4 knows too: the one word of a tokenizer's files that is not as it was."""
    try:
        text = path.read_text(encoding="utf-8")
        written = json.loads(text)
    except (OSError, ValueError):  # none there, or none that anybody could read
        return
    if isinstance(written, dict) and written.get("tokenizer_class") == NEWER_TOKENIZER:
        old = json.dumps(NEWER_TOKENIZER)
        path.write_text(text.replace(old, json.dumps(OLDER_TOKENIZER)), encoding="utf-8")


def _older(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, of transformers 5, under the names that came before; nested too."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("_config") and key not in OWN and isinstance(value, dict):
            found[key] = _older(value)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return found
    if isinstance(whole := rope.get("full_attention"), dict):
        if isinstance(local := rope.get("sliding_attention"), dict) and "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
        rope = whole
    if "rope_theta" not in rope:
        return found
    neox = config.get("model_type") in GPT_NEOX
    found["rotary_emb_base" if neox else "rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        name = "rotary_pct" if neox else "partial_rotary_factor"
        found[name] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        aside = ("rope_theta", "partial_rotary_factor")
        found["rope_scaling"] = {k: v for k, v in rope.items() if k not in aside}
    return found


def _merged(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    full = dict(config)
    for key, value in more.items():
        inner = full.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict) and key.endswith("_config")
        full[key] = _merged(inner, value) if both and isinstance(inner, dict) else value
    return full


def _read(model: PreTrainedModel, config: dict[str, Any]) -> Any:
    """What transformers makes of a configuration, less what is as good under an older name."""
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    try:
        read = type(model.config).from_dict(json.loads(json.dumps(plain)))
    except Exception as error:  # a class may refuse what another one takes
        return repr(error)
    return _without_older(read.to_dict())


def _without_older(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    aside = (
        "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor",
        "rotary_emb_base", "rotary_pct", "type", "torch_dtype",
    )  # fmt: skip
    return {k: _without_older(v) for k, v in config.items() if k not in aside}
