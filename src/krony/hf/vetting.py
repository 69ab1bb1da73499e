"""A model directory judged before transformers reads it: files may lie, and may be made to.

What is bounded here costs seconds and gigabytes elsewhere: a configuration that asks for a million
blocks, an index that points out of the directory, a header that promises what the file lacks.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from krony.errors import KronyError
from krony.hf.plan import Plan
from krony.hf.strict import array, mapping, read_json, shown
from krony.hf.whole import WRAPPERS, unwrapped
from krony.nn.packing import Quantized
from krony.runtime.layers import is_quantized
from krony.runtime.loader import check_format

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER = 32 * 2**20  # bytes: some 300,000 tensors in one file
MOST_LAYERS = 1024  # that a configuration may name beyond the number of tensors in the files
MOST_NUMBER = 2**40
BUFFERS = 2**26  # entries of masks and tables of positions that any model may have


@dataclass(frozen=True)
class Weights:
    """The tensors of a model directory.

    Attributes:
        shapes: by name as the file has it.
        files: where each of them is. dtypes: as the format spells them.
    """

    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]
    dtypes: dict[str, str]

    @property
    def numbers(self) -> int:
        """Entries of all tensors together."""
        return sum(map(math.prod, self.shapes.values()))


def weights(folder: Path) -> Weights:
    """What a directory's safetensors files hold, by their headers.

    Raises:
        KronyError: an index that is none, names files outside of the directory or that are missing,
            or a file whose header can't be.
    """
    names = [SINGLE] if (folder / SINGLE).is_file() else _indexed(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    dtypes: dict[str, str] = {}
    for name in names:
        for key, (shape, dtype) in header(folder / name).items():
            if key in shapes:
                raise KronyError(f"{key} is both in {files[key].name} and in {name} of {folder}")
            shapes[key], files[key], dtypes[key] = shape, folder / name, dtype
    return Weights(shapes, files, dtypes)


def _indexed(folder: Path) -> list[str]:
    """The files that the index names; without an index, the one file that transformers reads."""
    if not (folder / INDEX).is_file():
        found = sorted(p.name for p in folder.glob("*.safetensors"))
        raise KronyError(
            f"{folder} has neither {SINGLE} nor {INDEX}, but {', '.join(found[:3])}; rename the "
            f"file to {SINGLE}, or bring the index along"
        )
    content = mapping(read_json(folder / INDEX, 8 * 2**20), str(folder / INDEX))
    entries = mapping(content.get("weight_map"), f"weight_map in {folder / INDEX}")
    names = set()
    for key, name in entries.items():
        plain = isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
        if not plain or len(name) > 200 or "\\" in name or not name.endswith(".safetensors"):
            raise KronyError(
                f"{folder / INDEX} says that {key[:100]!r} is in {shown(name)}, which is no "
                "safetensors file of that directory; it is not read"
            )
        names.add(name)
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing or not names:
        raise KronyError(
            f"{folder / INDEX} names {len(names)} files, of which {len(missing)} are not there"
            f"{': ' + ', '.join(missing[:3]) if missing else ''}; bring the whole model"
        )
    return sorted(names)


def header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """By name the shapes and the dtypes (as the format spells them) in a safetensors file; the
    library checks that they fill the file exactly, and do not overlap. Raises `KronyError`."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MOST_HEADER:
            raise KronyError(
                f"{path} has a header of {length:,} bytes, and {MOST_HEADER:,} is the most there "
                "can be; the file is damaged, or was made to do harm"
            )
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {k: (tuple(each.get_shape()), each.get_dtype()) for k, each in slices.items()}
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, KronyError):
            raise
        raise KronyError(
            f"{path} is no safetensors file that can be read ({str(error)[:120]}); get it again"
        ) from error


def check_finite(found: Weights) -> None:
    """Raise `KronyError` for NaN or Inf in any tensor of the files, read one at a time."""
    for path in sorted(set(found.files.values())):
        with safe_open(path, framework="pt") as file:
            for key in (key for key, home in found.files.items() if home == path):
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and (bad := bad_numbers(tensor)):
                    raise KronyError(
                        f"{key} in {path} has {bad} NaN or Inf among its "
                        f"{tensor.numel():,} numbers; the file is damaged, get it or make it again"
                    )


def check_dtypes(source: str, model: torch.nn.Module, found: Weights) -> None:
    """Raise `KronyError` for whole numbers where the model has weights: they were packed by a
    program whose scales are lost, and would be taken for weights."""
    state = model.state_dict()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for key, dtype in found.dtypes.items():
        name = unwrapped(key)
        weight = state.get(name, state.get(prefix + name))
        whole = dtype[0] in "IU" or dtype == "BOOL"
        if whole and weight is not None and weight.is_floating_point() and not is_quantized(weight):
            raise KronyError(
                f"{key} of {source} is stored as whole numbers ({dtype}), and the model takes it "
                "for weights: it was quantized by a program that config.json does not name; get "
                "the checkpoint in half precision"
            )


def not_finite(model: torch.nn.Module) -> tuple[str, int, torch.Tensor] | None:
    """The first tensor of a model with NaN or Inf: its name, how many, and itself.

    Of quantized weights it is their scales; what is on a disk is passed over.
    """
    for name, value in model.state_dict().items():
        tensor = value.detach()
        if is_quantized(tensor):
            name, tensor = f"{name}.scale", tensor.scale
        if not tensor.is_meta and tensor.is_floating_point() and (bad := bad_numbers(tensor)):
            return name, bad, tensor
    return None


def bad_numbers(tensor: torch.Tensor) -> int:
    """How many of a tensor's numbers are NaN or Inf."""
    if tensor.element_size() == 1:  # 8-bit floats have no minimum in torch
        tensor = tensor.float()
    # Both ends of the range: NaN spreads to them, and it is a tenth of the time of isfinite.
    if not tensor.numel() or torch.stack(tensor.aminmax()).isfinite().all():
        return 0
    return int((~tensor.isfinite()).sum())


def configuration(folder: Path, found: Weights) -> dict[str, Any]:
    """The configuration, if nothing in it is absurd beside the weights.

    Raises:
        KronyError: no JSON object, an adapter, numbers that no model has, or a plan that can't be.
    """
    path = folder / "config.json"
    config = mapping(read_json(path), str(path))
    if (folder / "adapter_config.json").is_file():
        raise KronyError(
            f"{folder} has an adapter beside or instead of a model (adapter_config.json); merge it "
            "with peft's merge_and_unload, and save the result"
        )
    _check_numbers(config, str(path), max(MOST_LAYERS, len(found.shapes)))
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "kronecker":
        try:  # before the plan, which may be of a form that is not known yet
            check_format(quantization.get("format", 1))
        except ValueError as error:
            raise KronyError(f"{path}: {error}") from error
        Plan.from_dict(quantization.get("plan"))
        _check_provenance(quantization.get("provenance"), f"the provenance in {path}")
        for key in ("quantized", "quantised"):  # the latter in files of 0.1
            if quantization.get(key) is not None:
                Quantized.from_dict(quantization[key])
    _check_provenance(config.get("krony"), f"krony in {path}")
    return config


def _check_provenance(value: Any, name: str) -> None:
    """Raise `KronyError` unless what is said of how a model was made has the form of it."""
    if value is None:
        return
    found = mapping(value, name)
    for text in array(found.get("texts", []), f"texts of {name}", 100_000):
        mapping(text, f"a text of {name}")
    for key, row in mapping(found.get("matrices", {}), f"matrices of {name}").items():
        mapping(row, f"{key} of {name}")


def _check_numbers(value: Any, name: str, layers: int) -> None:
    """Raise `KronyError` for numbers of layers beyond any sense, at any depth."""
    waiting = [("", value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, x) for x in value]
        elif type(value) is int and (
            abs(value) > MOST_NUMBER
            or (re.search(r"layer|block|depth|expert|head", key) and value > 65536)
            or (re.search(r"layers?$", key) and value > layers)
        ):
            raise KronyError(f"{key} in {name} is {shown(value)}, which no model has")


def check_size(folder: Path, config: Any, found: Weights) -> None:
    """Raise `KronyError` where the configuration asks for more numbers than the files hold.

    The model is built without memory for its weights, so that a vocabulary of 10¹² words costs
    nothing before it is refused.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = sum(p.numel() for p in model.parameters())
    quantization = getattr(config, "quantization_config", None)
    quantization = quantization if isinstance(quantization, dict) else vars(quantization or object)
    if quantization.get("quant_method") == "kronecker":
        wanted -= sum(m.saved for m in Plan.from_dict(quantization.get("plan")).matrices)
    elif quantization.get("quant_method"):
        return  # packed by another method: entries are not numbers
    tables = sum(b.numel() for b in model.buffers())
    # A little less than what is wanted is a tensor that is missing, which the loader will name.
    if wanted > 2 * found.numbers + BUFFERS or tables > 4 * found.numbers + BUFFERS:
        raise KronyError(
            f"{folder} is for {wanted:,} parameters and {tables:,} numbers in tables by its "
            f"config.json, and its files hold {found.numbers:,}"
        )


def renamed(found: Weights) -> dict[str, str]:
    """Patterns and what they become, for `from_pretrained`.

    Raises:
        KronyError: two tensors would get one name.
    """
    names = [unwrapped(name) for name in found.shapes]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise KronyError(
            f"{twice} is there twice, with and without a wrapper's prefix; save the model again"
        )
    return {(r"^module\." if w == "module" else rf"{w}\."): "" for w in WRAPPERS}


def wrapper(found: Weights) -> str | None:
    """What left its prefix in the names, for a sentence; None: nothing did."""
    names = [name for name in found.shapes if unwrapped(name) != name]
    for prefix, maker in WRAPPERS.items():
        if any(f"{prefix}." in name for name in names):
            return f"{prefix}. ({maker})"
    return None
