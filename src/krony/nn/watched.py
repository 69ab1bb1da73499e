"""What was made of modules, kept with them for as long as they are what they were."""

from typing import Any

from torch import Tensor, nn

from krony.runtime.layers import is_hooked


class Watched:
    """Something that depends on modules and their tensors, all of which are kept in flat lists.

    The one rule by which anything made of factors is kept: between two calls anything may have
    happened to the modules, and what was made is good as long as `unchanged` says so. It is checked
    in microseconds: a token has no more than that for a layer.
    """

    def __init__(self) -> None:
        self._tensors: list[tuple[dict[str, Any], str, Tensor, int, int]] = []
        self._uncounted: list[tuple[dict[str, Any], str, Tensor, int]] = []
        self._children: list[tuple[dict[str, Any], str, Any]] = []
        self._hooks: list[dict[int, Any]] = []

    @property
    def tensors(self) -> list[Tensor]:
        """All that it depends on."""
        return [entry[2] for entry in self._tensors] + [entry[2] for entry in self._uncounted]

    @property
    def counted(self) -> bool:
        """Whether all of the tensors count the changes of their numbers, as those that were made in
        inference mode do not: of these it is seen only that they are where they were."""
        return not self._uncounted

    @property
    def hooked(self) -> bool:
        """Whether something is to happen when one of the children is called."""
        modules = (child for _, _, child in self._children if isinstance(child, nn.Module))
        return any(map(is_hooked, modules))

    def child(self, module: nn.Module, name: str) -> Any:
        """The child of that name, which is to stay there, and nothing is to hook into it."""
        child = module._modules[name]
        self._children.append((module._modules, name, child))
        if child is not None:
            self._hooks += [child._forward_hooks, child._forward_pre_hooks]
        return child

    def tensor(self, module: nn.Module, name: str) -> Tensor | None:
        """The parameter or buffer of that name, which is to stay in its memory, and its numbers
        are to be what they are."""
        held: Any = module._buffers if name in module._buffers else module._parameters
        tensor: Tensor | None = held.get(name)
        if tensor is None:
            self._children.append((held, name, None))
        else:
            self.hold(held, name, tensor)
        return tensor

    def weight(self, module: nn.Module) -> Tensor | None:
        """Its weight, whatever kind of tensor that is."""
        weight = module._parameters.get("weight")
        if type(weight) is nn.Parameter:
            return self.tensor(module, "weight")
        self._children.append((module._parameters, "weight", weight))
        return weight

    def hold(self, held: dict[str, Any], name: str, tensor: Tensor) -> None:
        """The same for a tensor of any dictionary."""
        if tensor.is_inference():
            self._uncounted.append((held, name, tensor, tensor.data_ptr()))
        else:
            self._tensors.append((held, name, tensor, tensor.data_ptr(), tensor._version))

    def include(self, other: "Watched") -> None:
        """All that another one depends on."""
        self._tensors += other._tensors
        self._uncounted += other._uncounted
        self._children += other._children
        self._hooks += other._hooks

    def unchanged(self) -> bool:
        """Whether all is where it was, has the numbers that it had, and is watched by nobody."""
        for held, name, tensor, address, version in self._tensors:
            if (
                held.get(name) is not tensor
                or tensor.data_ptr() != address
                or tensor._version != version
            ):
                return False
        for children, name, child in self._children:
            if children.get(name) is not child:
                return False
        if any(self._hooks):
            return False
        for held, name, tensor, address in self._uncounted:
            if held.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        return True

    def __reduce__(self) -> Any:  # a copy of the modules has tensors of its own
        return type(None), ()
