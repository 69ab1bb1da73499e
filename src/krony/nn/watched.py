"""What was made of modules, kept with them for as long as they are what they were."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Watched:
    """Something that depends on modules and their tensors, all of which are kept in flat lists.

    Between two calls anything may have happened to the modules. These lists are checked in
    microseconds: a token has no more than that for a layer.
    """

    def __init__(self) -> None:
        self._tensors: list[tuple[dict[str, Any], str, Tensor, int]] = []
        self._children: list[tuple[dict[str, Any], str, Any]] = []
        self._hooks: list[Any] = []
        self._versions: list[tuple[Tensor, int]] = []

    @property
    def tensors(self) -> list[Tensor]:
        """All that it depends on."""
        return [tensor for _, _, tensor, _ in self._tensors]

    def child(self, module: nn.Module, name: str) -> Any:
        """The child of that name, which is to stay there, and nothing is to hook into it."""
        child = module._modules[name]
        self._children.append((module._modules, name, child))
        if child is not None:
            self._hooks += [child._forward_hooks, child._forward_pre_hooks]
        return child

    def tensor(self, module: nn.Module, name: str) -> Tensor | None:
        """The parameter or buffer of that name, which is to stay in its memory."""
        held: Any = module._buffers if name in module._buffers else module._parameters
        tensor = held.get(name)
        if tensor is not None:
            self._tensors.append((held, name, tensor, tensor.data_ptr()))
        found: Tensor | None = tensor
        return found

    def factors(self, layer: nn.Module) -> None:
        """All tensors of a `KroneckerLinear`'s factors, or the weight of another layer."""
        if "groups" not in layer._modules:
            self.tensor(layer, "weight")
            return
        groups = self.child(layer, "groups")
        for name in groups._modules:
            group = self.child(groups, name)
            self.tensor(self.child(group, "large"), "weight")
            for held in ("small", "scalars", "order"):
                self.tensor(group, held)

    def numbers(self) -> None:
        """Not only are the tensors to be the same, but the numbers in them."""
        self._versions = [(tensor, tensor._version) for tensor in self.tensors]

    def unchanged(self) -> bool:
        """Whether all is where it was, and watched by nobody else."""
        for tensor, version in self._versions:
            if tensor._version != version:
                return False
        if any(self._hooks):
            return False
        for children, name, child in self._children:
            if children.get(name) is not child:
                return False
        for held, name, tensor, address in self._tensors:
            if held.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        return True

    def __reduce__(self) -> Any:  # a copy of the modules has tensors of its own
        return type(None), ()


class WatchedLayers(Watched):
    """Something that depends on a module's children and on all numbers of its layers.

    Args:
        owner: the module. layers: `KroneckerLinear` or others, some of its children.
    Attributes:
        counted: whether the numbers count their changes.
        formed: the layers with factors, and the W that each keeps, or None.
    """

    def __init__(self, owner: nn.Module, layers: list[Any]) -> None:
        super().__init__()
        for name in owner._modules:
            self.child(owner, name)
        for layer in layers:
            self.tensor(layer, "bias")
            self.factors(layer)
        self.counted = not any(tensor.is_inference() for tensor in self.tensors)
        if self.counted:
            self.numbers()
        self.formed = [(x, x.formed()) for x in layers if "groups" in x._modules]

    def unchanged(self) -> bool:
        """Whether factors and biases have the numbers that they had."""
        return super().unchanged() and all(layer.formed() is w for layer, w in self.formed)


class Formed(Watched):
    """W of a `KroneckerLinear`, until one of its factors is another or has other numbers.

    Args:
        layer: one that `can_keep` holds for.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._owner = layer._modules
        self.factors(layer)
        self.numbers()
        dtype = self.tensors[0].dtype
        with torch.autocast(self.tensors[0].device.type, enabled=False):
            exact = layer.to_dense(torch.promote_types(dtype, torch.float32))  # rounded once
            self.weight: Tensor = exact.to(dtype).contiguous()

    def is_of(self, layer: nn.Module) -> bool:
        """Whether it is of that layer: a replica on another device starts with its attributes."""
        return self._owner is layer._modules


def can_keep(layer: Any) -> bool:
    """Whether a layer is to keep W, and what is formed of its factors now will be right until one
    of them changes.

    Not where something else than their own numbers makes the product (hooks, adapters, quantised
    inputs, offloading), nor where they are not real or don't count their changes.
    """
    if not layer.keeps_formed:
        return False
    if _get_current_dispatch_mode_stack():  # tensors without numbers, or operations are counted
        return False
    return all(group.is_plain or group.is_weight_only for group in layer.groups) and not any(
        p.is_meta or p.is_inference() for p in layer.groups.parameters()
    )
