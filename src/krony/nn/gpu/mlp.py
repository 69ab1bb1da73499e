"""A whole compressed MLP on a GPU in two launches, or four where a matrix is of low rank.

Between them only what the next matrix reads is written: see triton_kernels.py. Few tokens, in any
dtype of the kernels, and many in half precision.
"""

from typing import Any

from torch import Tensor

from krony.nn import products
from krony.nn.gpu import operators
from krony.nn.gpu.step import Step
from krony.nn.lower import Lowered, LoweredMLP, once, stray
from krony.runtime.products import Layout


def can_take(mlp: LoweredMLP, request: Any) -> str | None:
    """Why it does not take an MLP, or None: matrices that the kernels know, few tokens or, in half
    precision, many; no gradients."""
    if (reason := operators.unusable(request)) is not None:
        return reason
    many = request.tokens > operators.MAX_TOKENS
    if many and request.dtype.itemsize != 2:
        return f"more than {operators.MAX_TOKENS} tokens in float32"
    if (strays := stray(mlp, request.dtype, request.device)) is not None:
        return strays
    made = once(mlp, "triton", steps)
    if made is None:
        return "a matrix that its kernels don't know, or gate and up that are not alike"
    if many and any(_fuses(step) and not step.takes_many for step in made):
        return "too many slices or terms for many tokens"
    return None


def run(made: list[Step], x: Tensor) -> Tensor:
    """x (..., n) through the launches of an MLP: (..., m)."""
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    many = len(x) > operators.MAX_TOKENS
    for step in made:
        by_kernel = _fuses(step) or not many
        x = operators.run_step(x, step, many) if by_kernel else by_blas(x, step)
    return x.reshape(*lead, x.shape[-1])


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


def steps(mlp: LoweredMLP) -> list[Step] | None:
    """The launches of an MLP, or None where the kernels don't know one of its matrices."""
    found = [products_of(matrix) for matrix in mlp.matrices]
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
    biases, offset = _given(*(up.bias for up in mlp.ups)), _given(mlp.down.bias)
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
    hidden = Step(weights, smalls, biases, written.sides, *order, mlp.kind, inner)
    *between, last = read, *after
    last = Step(last.weights, last.smalls, offset, last.sides, last.small_outer, last.mix_first)
    return [*before, hidden, *between, last]


def _alike(one: Step, other: Step) -> bool:
    """Whether two matrices can be in one launch."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("sides", "terms", "small_outer", "mix_first")
    ) and len(one.smalls) == len(other.smalls)


def _given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors if tensor is not None)


def products_of(matrix: Lowered) -> list[Step] | None:
    """The products of a matrix one after the other, without its bias: one, or two of low rank."""
    (group, *others) = matrix.groups
    if others or group.by_columns:
        return None
    if group.small is None:
        return [_dense(group.weight)]
    (m1, n1), (m2, n2) = group.large_shape, group.small_shape
    if group.is_low_rank:
        return [_dense(group.full_small().flatten(1)), _dense(group.weight)]
    if not operators.fits((group.terms, m2, n2)):
        return None
    smalls, small_outer = _given(group.full_small()), group.layout == "small-outer"
    return [Step((group.weight,), smalls, (), (m1, n1, m2, n2), small_outer, group.mix_first)]


def _dense(weight: Tensor) -> Step:
    m, n = weight.shape
    return Step(_given(weight), (), (), (m, n, 1, 1))
