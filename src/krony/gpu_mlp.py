"""A whole compressed MLP on a GPU in two launches, or four where a matrix is of low rank.

Between them only what the next matrix reads is written: see triton_kernels.py. Few tokens, in any
dtype of the kernels, and many in half precision.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krony import kernels, kron, products
from krony.cpu_decode import Parts
from krony.kernels import Step
from krony.layers import KroneckerLinear, is_hooked, is_plain_linear
from krony.watched import Watched

# A dense matrix or a factored one, and the two halves of low rank: weight, small, sides.
_Stage = tuple[Tensor, Tensor | None, tuple[int, int, int, int], bool, bool]


class Steps(Watched):
    """The launches of an MLP, until a factor or a bias changes.

    Args:
        mlp: the module. layers: those that write the hidden axis, then the one that reads it.
        kind: of the activation, as cpu_kernels numbers them.
    """

    def __init__(self, mlp: nn.Module, layers: list[Any], kind: int) -> None:
        super().__init__()
        for name in mlp._modules:
            self.child(mlp, name)
        for layer in layers:
            self.tensor(layer, "bias")
            self.factors(layer)
        # These don't count their changes.
        self._lasting = not any(tensor.is_inference() for tensor in self.tensors)
        if self._lasting:
            self.numbers()
        self._formed = [(x, x.formed()) for x in layers if isinstance(x, KroneckerLinear)]
        self.steps = None if any(self._hooks) else steps(layers, kind)

    def unchanged(self) -> bool:
        """Whether factors and biases have the numbers that they had."""
        if not self._lasting or not super().unchanged():
            return False
        return all(layer.formed() is weight for layer, weight in self._formed)


def run(mlp: Any, layers: list[Any], parts: Parts, x: Tensor) -> Tensor | None:
    """The MLP of x (..., n), or None where something else is to be done.

    Args:
        layers: those that write the hidden axis, then the one that reads it.
    """
    tokens = x.numel() // x.shape[-1]
    many = tokens > kernels.MAX_TOKENS
    if many and x.dtype.itemsize != 2:
        return None
    if torch.compiler.is_compiling():
        if any(map(is_hooked, (*layers, mlp._modules[parts.activation]))):
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
    bias = step.biases[0] if step.biases else None
    if n2 == m2 == 1 and not step.smalls:
        return F.linear(x, weight, bias)
    layout: kron.Layout = "small-outer" if step.small_outer else "large-outer"
    if step.smalls:
        sides = (m1, n1), layout, step.mix_first
        return products.apply(x, step.smalls[0], weight, *sides, bias)
    rows = F.linear(products.to_slices(x, (-1, n2, n1), layout).reshape(-1, n1), weight)
    y = products.from_slices(rows.view(-1, n2, m1), x.shape[:-1], layout)
    return y if bias is None else products.add(y, bias)


def steps(layers: list[Any], kind: int) -> list[Step] | None:
    """The launches of an MLP, or None where the kernels don't know one of its matrices.

    Args:
        layers: those that write the hidden axis, then the one that reads it.
        kind: of the activation, as cpu_kernels numbers them.
    """
    found = [_stages(layer) for layer in layers]
    if any(stages is None for stages in found):
        return None
    (*ups, down) = [stages for stages in found if stages is not None]
    first, last = ups[0], ups[0][-1]
    # One launch writes a gated axis: its two matrices are alike, and read the same.
    if len(ups) > 1 and (len(first) > 1 or len(ups[1]) > 1 or _kind(last) != _kind(ups[1][-1])):
        return None
    m1, _, m2, _ = last[2]
    entering, leaving = down[0], down[-1]
    _, k1, q, k2 = entering[2]
    if m1 * m2 != k1 * k2:  # gate and other in one matrix
        return None
    inner, between = None, entering[1]
    alike = (k2, k1, entering[3]) == (m2, m1, last[3])
    if between is not None and len(between) == 1 and q <= k2 and alike:
        # Mixed before it is written.
        inner = between[0]
        sides = (entering[2][0], k1, q, q)
        entering = (entering[0], None, sides, entering[3], entering[4])
        if len(down) == 1:
            leaving = entering
    made = [Step((stage[0],), _given(stage[1]), (), *stage[2:]) for stage in first[:-1]]
    weights, smalls = tuple(up[-1][0] for up in ups), [up[-1][1] for up in ups]
    biases = _biases(layers[:-1])
    if biases is None:
        return None
    made.append(Step(weights, _given(*smalls), biases, *last[2:], kind, inner))
    if len(down) > 1:
        made.append(Step((entering[0],), _given(entering[1]), (), *entering[2:]))
    offset = _given(layers[-1].bias)
    made.append(Step((leaving[0],), _given(leaving[1]), offset, *leaving[2:]))
    held = [tensor for step in made for tensor in (*step.weights, *step.smalls, *step.biases)]
    alike = len({(tensor.dtype, tensor.device) for tensor in held}) == 1
    return made if alike else None


def _given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors if tensor is not None)


def _biases(layers: list[Any]) -> tuple[Tensor, ...] | None:
    """Those of all layers or none; None where only some have one."""
    found = _given(*(layer.bias for layer in layers))
    return found if len(found) in (0, len(layers)) else None


def _kind(stage: _Stage) -> tuple[Any, ...]:
    """What two matrices of one launch have in common."""
    _, small, *rest = stage
    return (None if small is None else len(small), *rest)


def _stages(layer: Any) -> list[_Stage] | None:
    """The products of a layer one after the other: one, or the two halves of low rank."""
    if not isinstance(layer, KroneckerLinear):
        if not is_plain_linear(layer):
            return None
        return [_dense(layer.weight)]
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
    small = group.scaled_small.contiguous()
    return [(weight, small, (m1, n1, m2, n2), group.layout == "small-outer", group.mix_first)]


def _dense(weight: Tensor) -> _Stage:
    m, n = weight.shape
    return weight.contiguous(), None, (m, n, 1, 1), True, True
