"""A whole factored MLP at once on a CPU: its hidden axis is never written, or written once.

An MLP is up, activation, down, or gate, activation, times up, down. Called one after the other they
write the hidden axis three to five times and read it as often, and for one token the calls take
longer than reading the factors. So for a few tokens all of it is one call of decode.c, and for many
what lies between the two large products is one loop of hidden.c.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.pytorch_utils import Conv1D

from krony import cpu_decode, cpu_kernels, kron, tensor_rank
from krony.activations import TanhGELU
from krony.cpu_decode import Parts
from krony.layers import KroneckerLinear, is_hooked

_PROBE = 2  # tokens on which the parts are checked against the module's own forward
_LEAST = 32  # tokens from which one loop takes less than the calls that it saves


class FusedMLP(nn.Module):
    """What an MLP's class becomes: the same module, with another way for where it is faster."""

    original: type[nn.Module]
    parts: Parts
    # Whether the parts make up what the class computes: found out at the first call.
    right: bool | None = None

    def forward(self, x: Tensor, *more: Any, **options: Any) -> Any:
        """As the original's."""
        if not more and not options and (made := _run(self, x)) is not None:
            return made
        return super().forward(x, *more, **options)


_CLASSES: dict[tuple[type[nn.Module], Parts], type[FusedMLP]] = {}


def install(model: nn.Module) -> None:
    """Give the factored MLPs of a model their faster way, by class; `restore` is the inverse."""
    for module in list(model.modules()):
        parts = None if isinstance(module, FusedMLP) else _parts(module)
        if parts is not None:
            module.__class__ = _fused(type(module), parts)


def restore(model: nn.Module) -> None:
    """The inverse of `install`."""
    for module in model.modules():
        if isinstance(module, FusedMLP):
            module.__class__ = cast(Any, module.original)


def _fused(original: type[nn.Module], parts: Parts) -> type[FusedMLP]:
    if (original, parts) not in _CLASSES:
        own = {"original": original, "parts": parts, "__module__": original.__module__}
        made: Any = type(original.__name__, (FusedMLP, original), own)
        _CLASSES[original, parts] = made
    return _CLASSES[original, parts]


def _kind(module: nn.Module) -> int | None:
    """Which activation of hidden.c a module is."""
    if isinstance(module, TanhGELU | activations.GELUTanh):
        return cpu_kernels.TANH_GELU
    if type(module) is nn.GELU and module.approximate == "tanh":
        return cpu_kernels.TANH_GELU
    return cpu_kernels.SILU if isinstance(module, nn.SiLU | activations.SiLUActivation) else None


def _parts(module: nn.Module) -> Parts | None:
    """The parts of a module that consists of an MLP's and nothing else, one of them factored."""
    linear, found = [], []
    for name, child in module.named_children():
        if isinstance(child, KroneckerLinear | Conv1D | nn.Linear):
            linear.append(name)
        elif (kind := _kind(child)) is not None:
            found.append((name, kind))
        elif not isinstance(child, nn.Dropout):
            return None
    factored = any(isinstance(module.get_submodule(n), KroneckerLinear) for n in linear)
    if len(linear) not in (2, 3) or len(found) != 1 or not factored:
        return None
    (activation, kind), (*ups, down) = found[0], linear
    return Parts(tuple(ups), activation, down, kind)


def _composed(mlp: FusedMLP, x: Tensor) -> Tensor:
    """What the parts make of x if the MLP is what it is taken for."""
    first, *others = (mlp.get_submodule(name)(x) for name in mlp.parts.ups)
    down, activation = (mlp.get_submodule(n) for n in (mlp.parts.down, mlp.parts.activation))
    if not others and first.shape[-1] == 2 * _features(down)[0]:
        first, *others = first.chunk(2, -1)
    hidden = activation(first)
    for other in others:
        hidden = hidden * other
    made: Tensor = down(hidden)
    return made


def _features(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def _is_right(mlp: FusedMLP, x: Tensor) -> bool:
    """Whether the class computes what its parts make up, found out once for all of its modules."""
    kind = type(mlp)
    if kind.right is None:
        kind.right = False  # so that this call goes by the original
        some = x.reshape(-1, x.shape[-1])[:_PROBE]
        # Shapes that don't fit, other arguments: something else than an MLP.
        with contextlib.suppress(RuntimeError, TypeError):
            kind.right = torch.equal(_composed(mlp, some), kind.original.forward(mlp, some))
    return kind.right


def _run(mlp: FusedMLP, x: Any) -> Tensor | None:
    """The MLP of x (..., n), or None where its own forward is to be taken."""
    if mlp.training or torch.is_grad_enabled() or not isinstance(x, Tensor) or not x.numel():
        return None
    if not cpu_kernels.can_take(x) or not _is_right(mlp, x):
        return None
    parts = mlp.parts
    made = cpu_decode.run(mlp, x, parts)
    if made is not None or x.numel() < _LEAST * x.shape[-1]:
        return made
    if not cpu_kernels.unwatched(x) or cpu_kernels.library() is None:
        return None
    modules = cast(dict[str, nn.Module], mlp._modules)
    layers = [modules[name] for name in (*parts.ups, parts.down)]
    if any(map(is_hooked, (*layers, modules[parts.activation]))):
        return None
    return _many(layers, parts.kind, x)


@dataclass(frozen=True)
class _Route:
    """How a matrix is applied to many tokens: its inputs' slices mixed, or not; products with the
    large factor; the results' slices mixed, or not.

    Attributes:
        shape: (m2, m1, n2, n1), of the slices of outputs and inputs.
        weight: (m1, terms·n1) or (terms·m1, n1) as a layer has it; with `apart` (K, n1, m1), each
            for a slice of its own.
        inner: (p, n2), outer: (m2, q), or None.
    """

    shape: tuple[int, int, int, int]
    layout: kron.Layout
    weight: Tensor
    inner: Tensor | None = None
    outer: Tensor | None = None
    apart: bool = False

    def enter(self, x: Tensor) -> Tensor:
        """(T, n) to the slices (T, p, n1) that meet the large factor."""
        _, _, n2, n1 = self.shape
        x = kron.to_slices(x, (-1, n2, n1), self.layout)
        return x if self.inner is None else kron.mix(self.inner, x, apart=self.apart)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Slices (T, p, n1) to (T, q, m1); a bias (m1,) is that of each of them."""
        if self.apart:
            return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)
        rows = kron.project(x.reshape(-1, self.weight.shape[1]), self.weight, bias)
        return rows.reshape(len(x), -1, self.shape[1])

    def leave(self, x: Tensor, bias: Tensor | None, lead: torch.Size) -> Tensor:
        """Slices (T, p, n1) to the outputs (*lead, m)."""
        m2, m1, _, _ = self.shape
        bias = None if bias is None else kron.to_slices(bias, (m2, m1), self.layout)
        if self.outer is not None:
            x = kron.mix(self.outer, self.product(x), bias)
        elif m2 == 1:
            x = self.product(x, None if bias is None else bias[0])
        else:
            x = self.product(x) if bias is None else kron.add(self.product(x), bias)
        return kron.from_slices(x, lead, self.layout)


def _route(layer: Any, x: Tensor) -> _Route | None:
    """For a layer of one group of factors, or of none; None for others."""
    if not isinstance(layer, KroneckerLinear):
        weight = layer.weight
        if type(layer) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter:
            return None
        return _dense(weight.T if isinstance(layer, Conv1D) else weight)
    group: Any = layer.groups[0]
    if len(layer.groups) > 1 or is_hooked(group) or not group.is_plain:
        return None
    weight, tokens = group.large.weight, x.numel() // x.shape[-1]
    (m1, n1), (m2, n2) = group.large_shape, group.small_shape
    shape, layout = (m2, m1, n2, n1), group.layout
    found = tensor_rank.decomposition(group, tokens, x.dtype)
    if found is not None:
        summed = tensor_rank.summed(found, weight, (m1, n1), group.mix_first)
        return _Route(shape, layout, summed, found.v.T, found.u, apart=True)
    if group.dense_from < math.inf and group.forms_dense(tokens):
        return _dense(group.to_dense())
    mixing = kron.mixing(group.scaled_small, group.mix_first)
    inner, outer = (mixing, None) if group.mix_first else (None, mixing)
    return _Route(shape, layout, weight, inner, outer)


def _dense(weight: Tensor) -> _Route:
    m, n = weight.shape
    return _Route((1, m, 1, n), "small-outer", weight)


def _many(layers: list[Any], kind: int, x: Tensor) -> Tensor | None:
    """An MLP for many tokens; None for matrices of which no `_Route` is known."""
    routes = [route for layer in layers if (route := _route(layer, x)) is not None]
    if len(routes) < len(layers) or any(route.weight.dtype != x.dtype for route in routes):
        return None
    (*written, read), (*ups, down) = routes, layers
    (m2, m1, *_), layout = written[0].shape, written[0].layout
    if any(route.shape[:2] != (m2, m1) or route.layout != layout for route in written):
        return None
    if m2 * m1 != _features(down)[0] or m2 > cpu_kernels.MOST_MIXED:
        return None
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    parts = []
    for route, layer in zip(written, ups, strict=True):
        slices, bias, outer = route.product(route.enter(x)), layer.bias, route.outer
        bias = None if bias is None else kron.to_slices(bias, (m2, m1), layout)
        if outer is not None and outer.numel() > cpu_kernels.MOST_MIXED:
            slices, bias, outer = kron.mix(outer, slices, bias), None, None
        parts.append((slices, outer, bias))
    inner = read.inner if read.shape[2:] == (m2, m1) and read.layout == layout else None
    if inner is not None and inner.numel() > cpu_kernels.MOST_MIXED:
        inner = None
    slices, outer, _ = parts[0]
    if inner is not None:
        room = cpu_kernels.room(slices, len(inner), read.apart)
    else:
        room = slices if outer is None else cpu_kernels.room(slices, m2, apart=False)
    y = cpu_kernels.hidden(parts, kind, inner, room)
    if inner is None:
        y = read.enter(kron.from_slices(y, torch.Size([len(x)]), layout))
    return read.leave(y, down.bias, lead)
