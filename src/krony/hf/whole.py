"""Whether a checkpoint has all that its plan says, and what it has beyond what the model takes."""

import re
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.hf.plan import MatrixPlan, Plan

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
# "module." is a wrapper in front only: further in, a model may call a part of itself so.
_WRAPPED = re.compile(
    r"^(?:module\.)+|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers of a training put into it."""
    return _WRAPPED.sub("", name)


def check_shape(matrix: MatrixPlan, weight: torch.Tensor) -> None:
    """Raise `KronyError` unless the plan's matrix has the shape that the model's has."""
    m, n = matrix.dense_shape or matrix.shape
    if tuple(weight.shape) != ((n, m) if matrix.conv1d else (m, n)):
        raise KronyError(
            f"the plan in config.json has {matrix.name} as a matrix of {m}x{n}, and the model's is "
            f"{'x'.join(map(str, weight.shape))}; config.json and its plan are of two models"
        )


def check_factors(model: PreTrainedModel, plan: Plan, files: list[str]) -> None:
    """Raise `KronyError` for a factor that none of the files has.

    transformers would fill it with random numbers and only log that it did.
    """
    held: set[str] = set()
    prefix = model.base_model_prefix + "."
    for path in files:
        with safe_open(path, framework="pt") as file:
            held |= {unwrapped(key).removeprefix(prefix) for key in file.keys()}  # noqa: SIM118
    wanted = [
        f"{matrix.name}.{name}"
        for matrix in plan.matrices
        for name in model.get_submodule(matrix.name).state_dict()
    ]
    # Under names of older classes (GPT-NeoX's embed_out) the loader finds them too.
    modules = {name.removeprefix(prefix) for name, _ in model.named_modules()}
    foreign = {
        k.partition(".groups.")[2] for k in held if k.partition(".groups.")[0] not in modules
    }

    def there(name: str) -> bool:
        if name in held or name.partition(".groups.")[2] in foreign - {""}:
            return True
        return name.removesuffix(".weight") + ".qdata" in held  # quantized: in parts

    lacking = [name for name in wanted if not there(name.removeprefix(prefix))]
    if lacking:
        raise KronyError(
            f"the checkpoint lacks {len(lacking)} tensors of factored matrices, {lacking[0]} the "
            "first; get the whole checkpoint"
        )


def left_over(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that travel with a model: its class has no place for them (`loading.py`).

    Raises:
        KronyError: the files that they are in are gone.
    """
    found: dict[str, torch.Tensor] = {}
    for name, (path, key) in getattr(model, "left_over", {}).items():
        try:
            with safe_open(path, framework="pt") as file:
                found[name] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise KronyError(
                f"{name} is to travel with the model, and {path} can't be read any more"
            ) from error
    return found
