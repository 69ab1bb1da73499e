"""States of a run as safetensors and JSON: no pickle is written or read.

A state is any nest of dictionaries, lists and tuples; its tensors go to FILE.safetensors, the rest
to FILE.json, where a tensor is the number under which it is stored.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from krony.errors import KronyError
from krony.hf.saving import write_file, write_json

TENSOR, KEYS = "__tensor__", "__keys__"


def save_state(state: Any, stem: Path) -> None:
    """Write a nest of dictionaries, lists, numbers, text and tensors. Raises `KronyError`."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            # A copy: parts of one tensor, or one twice, are no matter here.
            tensors[name] = value.detach().cpu().clone().contiguous()
            return {TENSOR: name}
        if isinstance(value, dict):
            if all(isinstance(key, str) for key in value):
                return {key: plain(v) for key, v in value.items()}
            return {KEYS: [[plain(k), plain(v)] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} in the state of a run")

    data = plain(state)
    write_file(stem.with_suffix(".safetensors"), lambda path: save_file(tensors, path))
    write_json(stem.with_suffix(".json"), data)


def load_state(stem: Path) -> Any:
    """The inverse of `save_state`, on the CPU; tuples come back as lists. Raises `KronyError`."""
    try:
        tensors = load_file(stem.with_suffix(".safetensors"))
        data = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise KronyError(
            f"can't read the state {stem}: {error}; remove that checkpoint's folder to go on from "
            "the one before, or start the run again"
        ) from error

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(v) for v in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        if value.keys() == {KEYS}:
            return {whole(k): whole(v) for k, v in value[KEYS]}
        return {key: whole(v) for key, v in value.items()}

    return whole(data)


def random_state() -> dict[str, Any]:
    """Of the generators of Python, NumPy and torch, on the CPU and on every GPU."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`; a GPU that is not there any more has no part in it."""
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for device, one in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.random.set_rng_state(one, device)
