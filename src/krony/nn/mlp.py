"""Whole MLPs by one kernel: which modules are one, and how they come to use it.

An MLP is up, activation, down, or gate, activation, times up, down. Called one after the other they
write the hidden axis three to five times and read it as often, and for one token the calls take
longer than reading the factors. So `install` gives such a module a `forward` of its own that asks
`dispatch` first: an attribute of the instance, as accelerate's hooks are. A hook of torch's would
not do, since it can't leave out the forward; nor a module around it, since checkpoints, adapters
and sharding know the old one by name and class. The class stays what it was, and what is saved too.
"""

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from krony.nn import dispatch
from krony.nn.activations import kind_of
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.lower import Parts, forget
from krony.runtime.layers import KroneckerLinear

_PROBE = 2  # tokens on which the parts are checked against the module's own forward
_RECORD = "_krony_mlp"


@dataclass
class Record:
    """What is known of a module that looks like an MLP.

    Attributes:
        right: whether its parts make up what it computes: found out at its first call.
    """

    parts: Parts
    right: bool | None = None


def install(model: nn.Module, narrowed: Collection[str] = ()) -> None:
    """Give the MLPs of a model their faster way; `restore` is the inverse.

    Args:
        narrowed: names of layers that are not factored but only lost hidden units. An MLP without
            any of these, and without a factored layer, stays as it is.
    """
    smaller = {id(model.get_submodule(name)) for name in narrowed}
    for module in list(model.modules()):
        parts = None if record_of(module) is not None else _parts(module)
        if parts is not None and any(
            isinstance(child, KroneckerLinear) or id(child) in smaller
            for child in module.children()
        ):
            _install(module, parts)


def _install(module: nn.Module, parts: Parts) -> None:
    mine = MethodType(forward, module)
    if "forward" not in module.__dict__:
        module.__dict__["forward"] = mine
    elif "_old_forward" in module.__dict__:  # accelerate's, which calls what was there before it
        module.__dict__["_old_forward"] = mine
    else:  # somebody else's, who knows what for
        return
    module.__dict__[_RECORD] = Record(parts)
    replicate = MethodType(_replicate_for_data_parallel, module)
    module.__dict__["_replicate_for_data_parallel"] = replicate


def restore(model: nn.Module) -> None:
    """The inverse of `install`."""
    for module in model.modules():
        if module.__dict__.pop(_RECORD, None) is None:
            continue
        forget(module)
        _uninstall(module)
        if _is_ours(module.__dict__.get("_old_forward")):
            module.__dict__["_old_forward"] = MethodType(type(module).forward, module)


def _uninstall(module: nn.Module) -> None:
    if _is_ours(module.__dict__.get("forward")):
        del module.__dict__["forward"]
    module.__dict__.pop("_replicate_for_data_parallel", None)


def _is_ours(method: Any) -> bool:
    return isinstance(method, MethodType) and method.__func__ is forward


def record_of(module: nn.Module) -> Record | None:
    """What is known of a module that `install` found to look like an MLP; None for others."""
    found: Record | None = module.__dict__.get(_RECORD)
    return found


def forward(self: nn.Module, *inputs: Any, **options: Any) -> Any:
    """As the class's own."""
    record: Record | None = self.__dict__.get(_RECORD)
    if record is not None and len(inputs) == 1 and not options:
        made = _run(self, record, inputs[0])
        if made is not None:
            return made
    return type(self).forward(self, *inputs, **options)


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """As torch's; the replica's forward is its class's, since this one's would run this one."""
    replica: nn.Module = type(self)._replicate_for_data_parallel(self)
    replica.__dict__.pop(_RECORD, None)
    _uninstall(replica)
    return replica


def _run(mlp: nn.Module, record: Record, x: Any) -> Tensor | None:
    """The MLP of x (..., n), or None where its own forward is to be taken."""
    if mlp.training:
        if not torch.compiler.is_compiling():
            forget(mlp)  # it may hold a W of its layers
        return None
    if torch.is_grad_enabled() or not isinstance(x, Tensor):
        return None
    if not (record.right or is_right(mlp, x)):
        return None
    return dispatch.run_mlp(mlp, x, record.parts)


def example(mlp: nn.Module) -> Tensor:
    """Inputs (2, n) for a module that `install` found."""
    record = record_of(mlp)
    assert record is not None
    some = next(p for p in mlp.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE, _inputs(mlp.get_submodule(record.parts.ups[0])), generator=generator)
    return x.to(some.device, some.dtype)


def is_right(mlp: nn.Module, x: Tensor) -> bool:
    """Whether a module computes what its parts make up, for inputs (..., n).

    Not by class: in some models a layer's MLP does more than another's.
    """
    record = record_of(mlp)
    assert record is not None
    if record.right is None:
        if torch.compiler.is_compiling() or not x.numel() or not cpu_kernels.undisturbed(x):
            return False  # for now
        record.right = False  # whatever happens below
        some = x.reshape(-1, x.shape[-1])[:_PROBE]
        # Shapes that don't fit, other arguments: something else than an MLP.
        with contextlib.suppress(RuntimeError, TypeError):
            found = _composed(mlp, record.parts, some)
            wanted = type(mlp).forward(mlp, some)
            record.right = torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True)
    return record.right


def _parts(module: nn.Module) -> Parts | None:
    """The parts of a module that consists of an MLP's and nothing else."""
    linear, found = [], []
    for name, child in module.named_children():
        if isinstance(child, KroneckerLinear | Conv1D | nn.Linear):
            linear.append(name)
        elif (kind := kind_of(child)) is not None:
            found.append((name, kind))
        elif not isinstance(child, nn.Dropout):
            return None
    if len(linear) not in (2, 3) or len(found) != 1:
        return None
    (activation, kind), (*ups, down) = found[0], linear
    return Parts(tuple(ups), activation, down, kind)


def _composed(mlp: nn.Module, parts: Parts, x: Tensor) -> Tensor:
    """What the parts make of x if the MLP is what it is taken for."""
    first, *others = (mlp.get_submodule(name)(x) for name in parts.ups)
    down, activation = mlp.get_submodule(parts.down), mlp.get_submodule(parts.activation)
    if not others and first.shape[-1] == 2 * _inputs(down):
        first, *others = first.chunk(2, -1)
    hidden = activation(first)
    for other in others:
        hidden = hidden * other
    made: Tensor = down(hidden)
    return made


def _inputs(layer: Any) -> int:
    """Features that a layer reads."""
    return int(layer.nx if isinstance(layer, Conv1D) else layer.in_features)
