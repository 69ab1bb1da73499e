"""W in the place of the factors, kept for inference by layers whose factors cost more."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from krony.nn.watched import Watched


class Formed(Watched):
    """W of a `KroneckerLinear`, until one of its factors is another or has other numbers.

    Args:
        layer: one that `can_keep` holds for.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.owner = layer._modules
        groups = self.child(layer, "groups")
        for name in groups._modules:
            group = self.child(groups, name)
            self.tensor(self.child(group, "large"), "weight")
            for held in ("small", "scalars", "order"):
                self.tensor(group, held)
        dtype = self.tensors[0].dtype
        with torch.autocast(self.tensors[0].device.type, enabled=False):
            exact = layer.to_dense(torch.promote_types(dtype, torch.float32))  # rounded once
            self.matrix: Tensor = exact.to(dtype).contiguous()


def formed(layer: Any) -> Tensor | None:
    """W (m, n) of a `KroneckerLinear` that keeps it, from call to call, or None where the factors
    are to be used: in training, under autograd, tracing or hooks.

    For inference: a sum of many terms takes several times the multiply-adds of W, for every token.
    """
    if not layer.keeps_formed or layer.training:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    kept: Formed | None = layer.__dict__.get("_formed")
    if kept is None or kept.owner is not layer._modules or not kept.unchanged():
        layer.__dict__["_formed"] = None  # what it was goes first
        if not can_keep(layer):
            return None
        kept = layer.__dict__["_formed"] = Formed(layer)
    return kept.matrix


def can_keep(layer: Any) -> bool:
    """Whether a layer is to keep W, and what is formed of its factors now will be right until one
    of them changes.

    Not where something else than their own numbers makes the product (hooks, adapters, quantized
    inputs, offloading), nor where they are not real or don't count their changes.
    """
    if not layer.keeps_formed:
        return False
    if _get_current_dispatch_mode_stack():  # tensors without numbers, or operations are counted
        return False
    return all(group.is_plain or group.is_weight_only for group in layer.groups) and not any(
        p.is_meta or p.is_inference() for p in layer.groups.parameters()
    )
