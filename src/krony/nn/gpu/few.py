"""A few tokens through a factored layer on a GPU, in one launch."""

from typing import Any

from torch import Tensor

from krony.nn.gpu import operators
from krony.nn.lower import Lowered, stray
from krony.nn.products import add


def can_take(lowered: Lowered, request: Any) -> str | None:
    """Why it does not take a layer, or None: one group with a small factor that every program can
    mix with anew, a few tokens; also with gradients."""
    if (reason := operators.unusable(request)) is not None:
        return reason
    if request.tokens > operators.MAX_TOKENS:
        return f"more than {operators.MAX_TOKENS} tokens"
    (group, *others) = lowered.groups
    if others:
        return "a sum of several groups"
    if group.small is None or not operators.fits((group.terms, *group.small_shape)):
        return "no small factor, or too large a one"
    if request.tokens > group.dense_from:
        return "W costs less to form for so many tokens"
    return stray(lowered, request.dtype, request.device)


def run(lowered: Lowered, x: Tensor) -> Tensor:
    """x (..., n) to (..., m); differentiable."""
    (group,), small = lowered.groups, lowered.groups[0].full_small()
    shapes = group.large_shape, group.layout, group.mix_first
    made = operators.decode(x, small, group.weight, *shapes)
    return made if lowered.bias is None else add(made, lowered.bias)
