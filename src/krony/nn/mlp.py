"""A whole compressed MLP at once on a CPU: its hidden axis is never written, or written once.

An MLP is up, activation, down, or gate, activation, times up, down. Called one after the other they
write the hidden axis three to five times and read it as often, and for one token the calls take
longer than reading the factors. So for a few tokens all of it is one call of decode.c, and for many
what lies between the two large products is one loop of hidden.c.
"""

import contextlib
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.pytorch_utils import Conv1D

from krony.nn import kernels, products, tensor_rank
from krony.nn.activations import TanhGELU
from krony.nn.cpu import decode as cpu_decode
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.cpu import tiles as cpu_tiles
from krony.nn.cpu.decode import Parts
from krony.nn.gpu import mlp as gpu_mlp
from krony.nn.layers import KroneckerLinear
from krony.nn.products import Route
from krony.nn.watched import WatchedLayers
from krony.runtime.layers import is_hooked, is_plain_linear

_PROBE = 2  # tokens on which the parts are checked against the module's own forward
_LEAST = 32  # tokens from which one loop takes less than the calls that it saves


class FusedMLP(nn.Module):
    """What an MLP's class becomes: the same module, with another way for where it is faster."""

    original: type[nn.Module]
    parts: Parts
    # Whether the parts make up what this module computes: found out at its first call.
    right: bool | None = None

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the original's."""
        if len(inputs) == 1 and not options and (made := _run(self, *inputs)) is not None:
            return made
        return super().forward(*inputs, **options)

    def train(self, mode: bool = True) -> "FusedMLP":
        if mode:  # these may hold a W of its layers
            _forget(self)
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        _forget(self)  # these are of the dtype and the device that were
        return super()._apply(*arguments, **options)


_CLASSES: dict[tuple[type[nn.Module], Parts], type[FusedMLP]] = {}


def install(model: nn.Module, narrowed: Collection[str] = ()) -> None:
    """Give the MLPs of a model their faster way, by class; `restore` is the inverse.

    Args:
        narrowed: names of layers that are not factored but only lost hidden units. An MLP without
            any of these, and without a factored layer, stays as it is.
    """
    smaller = {id(model.get_submodule(name)) for name in narrowed}
    for module in list(model.modules()):
        parts = None if isinstance(module, FusedMLP) else _parts(module)
        if parts is not None and any(
            isinstance(child, KroneckerLinear) or id(child) in smaller
            for child in module.children()
        ):
            module.__class__ = _fused(type(module), parts)


def restore(model: nn.Module) -> None:
    """The inverse of `install`."""
    for module in model.modules():
        if isinstance(module, FusedMLP):
            module.__class__ = cast(Any, module.original)
            _forget(module)
            for kept in ("right", "_prepared"):
                module.__dict__.pop(kept, None)


def _forget(mlp: FusedMLP) -> None:
    """Drop what was made of its factors."""
    for kept in ("_tiled", "_steps"):
        mlp.__dict__.pop(kept, None)


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
    """The parts of a module that consists of an MLP's and nothing else."""
    linear, found = [], []
    for name, child in module.named_children():
        if isinstance(child, KroneckerLinear | Conv1D | nn.Linear):
            linear.append(name)
        elif (kind := _kind(child)) is not None:
            found.append((name, kind))
        elif not isinstance(child, nn.Dropout):
            return None
    if len(linear) not in (2, 3) or len(found) != 1:
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
    """Whether the module computes what its parts make up.

    Not by class: in some models a layer's MLP does more than another's.
    """
    if mlp.right is None:
        if torch.compiler.is_compiling() or not cpu_kernels.undisturbed(x):
            return False  # for now
        mlp.right = False  # whatever happens below
        some = x.reshape(-1, x.shape[-1])[:_PROBE]
        # Shapes that don't fit, other arguments: something else than an MLP.
        with contextlib.suppress(RuntimeError, TypeError):
            found, wanted = _composed(mlp, some), mlp.original.forward(mlp, some)
            mlp.right = torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True)
    return mlp.right


def _run(mlp: FusedMLP, x: Any) -> Tensor | None:
    """The MLP of x (..., n), or None where its own forward is to be taken."""
    if mlp.training or torch.is_grad_enabled() or not isinstance(x, Tensor):
        return None
    if not x.numel():
        return None
    launched = kernels.can_take(x)
    if not launched and not (x.is_cpu and cpu_kernels.can_take(x)):
        return None
    parts, modules = mlp.parts, cast(dict[str, nn.Module], mlp._modules)
    if not _is_right(mlp, x) or _kind(modules[parts.activation]) != parts.kind:
        return None  # something else than an MLP, or with another activation since then
    if launched:
        return gpu_mlp.run(mlp, x)
    made = cpu_decode.run(mlp, x, parts)
    if made is not None:
        return made
    layers = [modules[name] for name in (*parts.ups, parts.down)]
    in_tiles = cpu_tiles.can_take(x) and all(map(_may_be_in_tiles, layers))
    if not in_tiles and x.numel() < _LEAST * x.shape[-1]:
        return None
    if not cpu_kernels.unwatched(x) or cpu_kernels.library() is None:
        return None
    if any(map(is_hooked, (*layers, modules[parts.activation]))):
        return None
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    made = _in_tiles(mlp, layers, x, lead) if in_tiles else None
    if made is not None or len(x) < _LEAST:
        return made
    return _many(layers, parts.kind, x, lead)


def _may_be_in_tiles(layer: Any) -> bool:
    """Whether cpu_tiles.py may take a layer, without looking at its tensors: for a few tokens that
    takes as long as the layer does."""
    if not isinstance(layer, KroneckerLinear):
        return isinstance(layer, nn.Linear)  # a Conv1D's inputs do not lie side by side
    if layer.keeps_formed:
        return True
    if len(layer.groups) > 1:
        return False
    group: Any = layer.groups[0]
    return bool(group.small.numel() <= cpu_kernels.MOST_MIXED or group.large_shape[1] == 1)


def _route(layer: Any, x: Tensor | None = None) -> Route | None:
    """For a layer of one group of factors, or with its W, or of none; None for others.

    Args:
        x: the tokens, where several terms may be fewer products for so many, or W be formed.
    """
    if not isinstance(layer, KroneckerLinear):
        if not is_plain_linear(layer, (nn.Linear, Conv1D)):
            return None
        return _dense(layer.weight.T if isinstance(layer, Conv1D) else layer.weight)
    if (formed := layer.formed()) is not None:
        return _dense(formed)
    group: Any = layer.groups[0]
    if len(layer.groups) > 1 or is_hooked(group) or not group.is_plain:
        return None
    weight, (m1, n1), (m2, n2) = group.large.weight, group.large_shape, group.small_shape
    shape, layout = (m2, m1, n2, n1), group.layout
    if x is not None:
        found = tensor_rank.decomposition(group, len(x), x.dtype)
        if found is not None:
            return tensor_rank.route(found, weight, (m1, n1), layout, group.mix_first)
        if group.forms_dense(len(x)):
            return _dense(group.to_dense())
    mixing = products.mixing(group.scaled_small, group.mix_first)
    inner, outer = (mixing, None) if group.mix_first else (None, mixing)
    return Route(shape, layout, weight, inner, outer)


def _dense(weight: Tensor) -> Route:
    m, n = weight.shape
    return Route((1, m, 1, n), "small-outer", weight)


def _meet(routes: list[Route], layers: list[Any], x: Tensor) -> bool:
    """Whether all of an MLP's matrices have a route, in the dtype of x, and those that write the
    hidden axis write it in the same slices."""
    held = [*(route.weight for route in routes), *(x.bias for x in layers if x.bias is not None)]
    if len(routes) < len(layers) or not all(h.dtype == x.dtype and h.is_cpu for h in held):
        return False
    (*written, _), down = routes, layers[-1]
    (m2, m1, *_), layout = written[0].shape, written[0].layout
    if any(route.shape[:2] != (m2, m1) or route.layout != layout for route in written):
        return False
    return m2 * m1 == _features(down)[0] and m2 <= cpu_kernels.MOST_MIXED


def _many(layers: list[Any], kind: int, x: Tensor, lead: torch.Size) -> Tensor | None:
    """An MLP for many tokens (T, n); None for matrices of which no `Route` is known."""
    if not any(isinstance(x, KroneckerLinear) and x.formed() is None for x in layers):
        return None  # BLAS adds biases as it goes
    routes = [route for layer in layers if (route := _route(layer, x)) is not None]
    if not _meet(routes, layers, x):
        return None
    (*written, read), (*ups, down) = routes, layers
    (m2, m1, *_), layout = written[0].shape, written[0].layout
    parts = []
    for route, layer in zip(written, ups, strict=True):
        bias, outer = route.slices_of(layer.bias), route.outer
        slices = route.product(route.enter(x))
        if outer is not None and outer.numel() > cpu_kernels.MOST_MIXED:
            slices, bias, outer = products.mix(outer, slices, bias), None, None
        slices = slices if slices.stride(2) == 1 else slices.contiguous()
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
        y = read.enter(products.from_slices(y, torch.Size([len(x)]), layout))
    return read.leave(y, down.bias, lead)


def _in_tiles(mlp: FusedMLP, layers: list[Any], x: Tensor, lead: torch.Size) -> Tensor | None:
    """An MLP of tokens (T, n) by cpu_tiles.py, or None where that does not take it."""
    kept: _Tiled | None = mlp.__dict__.get("_tiled")
    if kept is None or not kept.unchanged():
        mlp.__dict__["_tiled"] = None  # what it was goes first
        kept = mlp.__dict__["_tiled"] = _Tiled(mlp, layers, x)
    return kept.run(x, lead)


class _Tiled(WatchedLayers):
    """An MLP as the tile unit's kernel wants it, until a factor or a bias changes."""

    def __init__(self, mlp: FusedMLP, layers: list[Any], x: Tensor) -> None:
        super().__init__(mlp, layers)
        # For some numbers of tokens these are fewer products, which are not for the tile unit.
        groups: list[Any] = [g for x, w in self.formed if w is None for g in x.groups]
        self._several = [group for group in groups if group.terms > 1]
        routes = [route for layer in layers if (route := _route(layer)) is not None]
        self._tiles: cpu_tiles.Tiles | None = None
        if self.counted and _meet(routes, layers, x) and _follows(routes[-1], routes[0]):
            self._plan(routes, [layer.bias for layer in layers], mlp.parts.kind)

    def _plan(self, routes: list[Route], biases: list[Tensor | None], kind: int) -> None:
        (*written, read), (*offsets, bias) = routes, biases
        self._layouts = [route.layout for route in written]
        self._layout = read.layout
        halves = [_half(route) for route in written]
        enters = [half for half in halves if half is not None]
        if enters and len(enters) < len(written):
            return
        inputs = [_input(route) for route in written]
        ups = []
        for route, of, half, offset in zip(written, inputs, halves, offsets, strict=True):
            features = of.features if half is None else half.product.m
            product = cpu_tiles.Product(_weights(route), features)
            ups.append(cpu_tiles.Matrix(product, route.outer, route.slices_of(offset)))
        if all(of.mixing is None for of in inputs):
            del inputs[1:]  # all read the same
        (*_, n2, n1) = read.shape
        inner, outer, weight, features = read.inner, read.outer, _weights(read), n2 * n1
        between = _half(read)
        if between is not None:
            inner, features = None, between.product.m
        elif inner is not None and len(inner) > n2:  # the results are mixed, which are fewer
            terms = weight.shape[2] // n1
            outer = inner.unflatten(0, (-1, terms)).mT.flatten(1)
            inner, weight = None, weight[0].unflatten(1, (terms, n1)).transpose(0, 1)
        elif inner is not None:
            features = len(inner) * n1
        down = cpu_tiles.Matrix(cpu_tiles.Product(weight, features), outer, read.slices_of(bias))
        tiles = cpu_tiles.Tiles(inputs, ups, kind, inner, down, enters, between)
        self._tiles, self._inputs = (tiles if tiles.fits else None), inputs

    def run(self, x: Tensor, lead: torch.Size) -> Tensor | None:
        """Tokens (T, n) to (*lead, m), or None where something else is to be done."""
        if self._tiles is None:
            return None
        for group in self._several:
            if tensor_rank.decomposition(group, len(x), x.dtype) is not None:
                return None
        xs = [
            products.to_slices(x, (-1, of.slices, of.k), layout).contiguous()
            for layout, of in zip(self._layouts, self._inputs, strict=False)
        ]
        y = self._tiles.run(xs)
        return None if y is None else products.from_slices(y, lead, self._layout)


def _follows(read: Route, written: Route) -> bool:
    """Whether one matrix reads the hidden features in the order in which another writes them."""
    (m2, m1, *_), (*_, n2, n1) = written.shape, read.shape
    alike = (n2, n1, read.layout) == (m2, m1, written.layout)
    if read.inner is not None and n1 > 1:
        return alike
    # Slices that are features one after the other are as good as one.
    return alike or all(
        layout == "small-outer" or 1 in sides
        for layout, sides in ((written.layout, (m2, m1)), (read.layout, (n2, n1)))
    )


def _input(route: Route) -> cpu_tiles.Input:
    """What the tile unit's product reads."""
    _, _, n2, n1 = route.shape
    return cpu_tiles.Input(n2, n1, None if n1 == 1 else route.inner)


def _half(route: Route) -> cpu_tiles.Matrix | None:
    """Of low rank the half that reads, which is a product of its own; else None."""
    (*_, n2, n1), inner = route.shape, route.inner
    if inner is None or n1 > 1:
        return None
    return cpu_tiles.Matrix(cpu_tiles.Product(inner[None], n2))


def _weights(route: Route) -> Tensor:
    """Of its products, each for all slices: (·, m1, ·)."""
    return route.weight.unflatten(0, (-1, route.shape[1]))
