"""Activations in one kernel where transformers has a chain of them."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import activations

from krony.nn.cpu import kernels as cpu_kernels

_CHAINS = (activations.NewGELUActivation, activations.FastGELUActivation)


def kind_of(module: nn.Module | None) -> int | None:
    """Which activation of hidden.c a module is."""
    if isinstance(module, TanhGELU | activations.GELUTanh):
        return cpu_kernels.TANH_GELU
    if type(module) is nn.GELU and module.approximate == "tanh":
        return cpu_kernels.TANH_GELU
    return cpu_kernels.SILU if isinstance(module, nn.SiLU | activations.SiLUActivation) else None


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
        if not cpu_kernels.has_gelu(input):
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            made: Tensor = cast(Any, _Differentiable).apply(input)
            return made
        return cpu_kernels.gelu(input)


class _Differentiable(torch.autograd.Function):
    """`cpu_kernels.gelu` both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return cpu_kernels.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            again: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
            return again
        return cpu_kernels.gelu(x, gradient)


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
