"""A whole compressed MLP on a GPU in two launches, or four where a matrix is of low rank.

Between them only what the next matrix reads is written: see triton_kernels.py. Few tokens, in any
dtype of the kernels, and many in half precision.
"""

from typing import Any

import torch
from torch import Tensor, nn

from krony.maths.shapes import Layout
from krony.nn import kernels, products
from krony.nn.gpu.step import Step
from krony.nn.layers import KroneckerLinear
from krony.nn.watched import WatchedLayers
from krony.runtime.layers import is_hooked, is_plain_linear


class Steps(WatchedLayers):
    """The launches of an MLP, until a factor or a bias changes.

    Args:
        mlp: the module. layers: those that write the hidden axis, then the one that reads it.
        kind: of the activation, as cpu_kernels numbers them.
    """

    def __init__(self, mlp: nn.Module, layers: list[Any], kind: int) -> None:
        super().__init__(mlp, layers)
        self.steps = None if any(self._hooks) else steps(layers, kind)

    def unchanged(self) -> bool:
        """Whether factors and biases have the numbers that they had, as far as can be told."""
        return self.counted and super().unchanged()


def run(mlp: Any, x: Tensor) -> Tensor | None:
    """A `FusedMLP` of x (..., n), or None where something else is to be done."""
    tokens = x.numel() // x.shape[-1]
    many = tokens > kernels.MAX_TOKENS
    if many and x.dtype.itemsize != 2:
        return None
    parts = mlp.parts
    layers = [mlp._modules[name] for name in (*parts.ups, parts.down)]
    if torch.compiler.is_compiling():
        if is_hooked(mlp._modules[parts.activation]):
            return None
        made = steps(layers, parts.kind)
    else:
        kept: Steps | None = mlp.__dict__.get("_steps")
        if kept is None or not kept.unchanged():
            mlp.__dict__["_steps"] = None  # what it was goes first
            kept = mlp.__dict__["_steps"] = Steps(mlp, layers, parts.kind)
        made = kept.steps
    if made is None or not all(_is_for(step, x, many) for step in made):
        return None
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    for step in made:
        x = kernels.run_step(x, step, many) if _fuses(step) or not many else by_blas(x, step)
    return x.reshape(*lead, x.shape[-1])


def _is_for(step: Step, x: Tensor, many: bool) -> bool:
    weight = step.weights[0]
    if weight.dtype != x.dtype or weight.device != x.device:
        return False
    return not many or not _fuses(step) or step.takes_many


def _fuses(step: Step) -> bool:
    """Whether there is more than a bias to fuse with a product of many tokens."""
    return step.kind > 0 or step.terms > 1


def by_blas(x: Tensor, step: Step) -> Tensor:
    """What a step makes of many tokens (T, n) that is one large product, one term, and a bias:
    cuBLAS is the better one there."""
    (weight,), (m1, n1, m2, n2) = step.weights, step.sides
    layout: Layout = "small-outer" if step.small_outer else "large-outer"
    mixing = products.mixing(step.smalls[0], step.mix_first) if step.smalls else None
    inner, outer = (mixing, None) if step.mix_first else (None, mixing)
    route = products.Route((m2, m1, n2, n1), layout, weight, inner, outer)
    return route.apply(x, step.biases[0] if step.biases else None)


def steps(layers: list[Any], kind: int) -> list[Step] | None:
    """The launches of an MLP, or None where the kernels don't know one of its matrices.

    Args:
        layers: those that write the hidden axis, then the one that reads it.
        kind: of the activation, as cpu_kernels numbers them.
    """
    found = [products_of(layer) for layer in layers]
    if any(steps is None for steps in found):
        return None
    (*ups, down) = [steps for steps in found if steps is not None]
    *before, written = ups[0]
    # One launch writes a gated axis: its two matrices are alike, and read the same.
    if len(ups) > 1 and (before or len(ups[1]) > 1 or not _alike(written, ups[1][0])):
        return None
    read, *after = down
    (m1, _, m2, _), (rows, k1, q, k2) = written.sides, read.sides
    if m1 * m2 != k1 * k2:  # gate and other in one matrix
        return None
    biases, offset = _given(*(layer.bias for layer in layers[:-1])), _given(layers[-1].bias)
    if len(biases) not in (0, len(ups)):
        return None
    meets = (k2, k1, read.small_outer) == (m2, m1, written.small_outer)
    inner = None
    if len(read.smalls) == read.terms == 1 and q <= k2 and meets:  # mixed before it is written
        inner = read.smalls[0][0]
        read = Step(read.weights, (), (), (rows, k1, q, q), read.small_outer, read.mix_first)
    weights = tuple(up[-1].weights[0] for up in ups)
    smalls = tuple(small for up in ups for small in up[-1].smalls)
    order = written.small_outer, written.mix_first
    hidden = Step(weights, smalls, biases, written.sides, *order, kind, inner)
    *between, last = read, *after
    last = Step(last.weights, last.smalls, offset, last.sides, last.small_outer, last.mix_first)
    made = [*before, hidden, *between, last]
    given = [_given(*step.weights, *step.smalls, *step.biases, step.inner) for step in made]
    held = [tensor for tensors in given for tensor in tensors]
    return made if len({(tensor.dtype, tensor.device) for tensor in held}) == 1 else None


def _alike(one: Step, other: Step) -> bool:
    """Whether two matrices can be in one launch."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("sides", "terms", "small_outer", "mix_first")
    ) and len(one.smalls) == len(other.smalls)


def _given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors if tensor is not None)


def products_of(layer: Any) -> list[Step] | None:
    """The products of a layer one after the other, without its bias: one, or two of low rank."""
    if is_hooked(layer):
        return None
    if not isinstance(layer, KroneckerLinear):
        return [_dense(layer.weight)] if is_plain_linear(layer) else None
    if (formed := layer.formed()) is not None:
        return [_dense(formed)]
    group: Any = layer.groups[0]
    if len(layer.groups) > 1 or is_hooked(group) or not group.is_plain:
        return None
    weight, (m1, n1), (m2, n2) = group.large.weight, group.large_shape, group.small_shape
    if n1 == m2 == 1 and group.mix_first:
        return [_dense(group.scaled_small.flatten(1)), _dense(weight)]
    if not kernels.fits((group.terms, m2, n2)):
        return None
    smalls, small_outer = _given(group.scaled_small), group.layout == "small-outer"
    return [Step((weight,), smalls, (), (m1, n1, m2, n2), small_outer, group.mix_first)]


def _dense(weight: Tensor) -> Step:
    m, n = weight.shape
    return Step(_given(weight), (), (), (m, n, 1, 1))
