"""A layer in torch: the last row of the table of layers."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from krony.nn import products
from krony.nn.lower import Lowered


def can_take(lowered: Lowered, request: Any) -> str | None:
    """Why it is left to the layer's own forward, which asks for each of its groups, or None."""
    return None if len(lowered.groups) == 1 else "a sum of several groups"


def run(lowered: Lowered, x: Tensor) -> Tensor:
    """x (..., n) by W where it is kept, formed for so many tokens, or by the factors: (..., m)."""
    (group,), bias, tokens = lowered.groups, lowered.bias, x.numel() // x.shape[-1]
    if group.small is None:
        y = products.project(x.reshape(-1, x.shape[-1]), group.weight, bias)
        return y.reshape(*x.shape[:-1], lowered.shape[0])
    if tokens > group.dense_from:
        return F.linear(x, group.to_dense(), bias)
    shapes = group.large_shape, group.layout, group.mix_first
    return products.apply(x, group.full_small(), group.weight, *shapes, bias)
