"""Activations in one kernel where transformers has a chain of them."""

from torch import Tensor, nn
from transformers import activations

from krony import cpu_kernels

_CHAINS = (activations.NewGELUActivation, activations.FastGELUActivation)


class TanhGELU(nn.GELU):
    """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) in one kernel, ours on a CPU, else torch's.

    Args:
        original: the class that it stands for.
    """

    def __init__(self, original: type[nn.Module]) -> None:
        super().__init__(approximate="tanh")
        self.original = original

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape."""
        found = cpu_kernels.gelu(input)
        return super().forward(input) if found is None else found


def fuse(model: nn.Module) -> None:
    """Replace the activations of GPT-2 and its like by torch's, which are equal but for rounding.

    In transformers these are eight passes over the hidden axis: they take longer than the factored
    matrix before them, and training keeps four tensors of its size where torch's keeps one.
    """
    for name, module in list(model.named_modules()):
        if type(module) in _CHAINS:
            model.set_submodule(name, TanhGELU(type(module)))


def restore(model: nn.Module) -> None:
    """The inverse of `fuse`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, TanhGELU):
            model.set_submodule(name, module.original())
