"""How a group of factors meets many tokens on a CPU: by its terms, as W, or by fewer products.

Several terms with a tiny small factor can be fewer large products than terms times slices
(`tensor_rank.py`), from so many tokens on that the sums of large factors that this takes are paid.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from krony.nn import switches, tensor_rank
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.lower import Lowered, LoweredGroup, stray
from krony.nn.products import Route
from krony.runtime.products import FORMING, multiply_adds

MOST_ENTRIES = 9  # of a small factor: larger ones take too long to decompose
# Multiply-adds that a product could do for each entry of a sum of large factors while that is made,
# in float32 and in 16 bits: in hidden.c, and by torch. Of bfloat16 a tile unit does many more.
SUMMING = {True: (30, 50), False: (80, 320)}
SUMMING_WITH_TILES = 450
Way = Literal["terms", "fewer", "formed"]


def can_take(lowered: Lowered, request: Any) -> str | None:
    """Why it does not take a layer, or None: one group of plain factors, outside of autograd, of
    which for so many tokens fewer products are less work."""
    if request.device.type != "cpu":
        return "only on a CPU"
    if request.special is not None:
        return str(request.special)
    if len(lowered.groups) > 1:
        return "a sum of several groups"
    if (strays := stray(lowered, request.dtype, request.device)) is not None:
        return strays
    (group,) = lowered.groups
    if group.terms == 1:
        return "one term"
    if way(group, request.tokens, request.dtype) != "fewer":
        return "the terms are no fewer products, or the tokens too few to pay for finding them"
    return None


def run(lowered: Lowered, x: Tensor) -> Tensor:
    """x (..., n) by fewer products: (..., m)."""
    (group,) = lowered.groups
    assert group.decomposition is not None
    shapes = group.large_shape, group.layout, group.mix_first
    return tensor_rank.route(group.decomposition, group.weight, *shapes).apply(x, lowered.bias)


def route_for(group: LoweredGroup, tokens: int, dtype: torch.dtype) -> Route:
    """The way through a group for so many tokens."""
    if (by := way(group, tokens, dtype)) == "fewer":
        assert group.decomposition is not None
        shapes = group.large_shape, group.layout, group.mix_first
        return tensor_rank.route(group.decomposition, group.weight, *shapes)
    if by == "formed":
        return route_of(LoweredGroup(group.to_dense(), written(group, by)[0]))
    return route_of(group)


def route_of(group: LoweredGroup) -> Route:
    """The way through a group by its terms, or through a matrix that is not factored."""
    (m1, n1), (m2, n2) = group.large_shape, group.small_shape
    shape = (m2, m1, n2, n1)
    if group.small is None:
        return Route(shape, group.layout, group.to_dense())
    inner, outer = (group.mixing(), None) if group.mix_first else (None, group.mixing())
    return Route(shape, group.layout, group.weight, inner, outer)


def way(group: LoweredGroup, tokens: int, dtype: torch.dtype) -> Way:
    """The one that takes the least for so many tokens on a CPU, outside of autograd."""
    if _saves(group, tokens, dtype):
        return "fewer"
    return "formed" if tokens > group.dense_from else "terms"


def _products(group: LoweredGroup) -> float:
    """Products of the large factor's size that a token takes by the terms."""
    (m1, n1), small = group.large_shape, group.small_shape
    return multiply_adds((m1, n1), small, group.terms, group.mix_first) / (m1 * n1)


def _saves(group: LoweredGroup, tokens: int, dtype: torch.dtype) -> bool:
    (m2, n2), by_terms = group.small_shape, _products(group) * tokens
    if group.terms == 1 or min(m2, n2) < 2 or m2 * n2 > MOST_ENTRIES:
        return False
    if not switches.allows("fewer") or by_terms < SUMMING[True][dtype.itemsize == 2]:
        return False
    # By the terms, or formed; each in products of the large factor's size.
    now = min(by_terms, m2 * n2 * (tokens + group.terms + FORMING))
    if now < (summing := _summing(dtype)):  # asked last, since it compiles
        return False
    found = group.decomposition
    return found is not None and now >= found.products * (tokens + summing)


def _summing(dtype: torch.dtype) -> float:
    """`SUMMING` here, for a dtype; the first call compiles."""
    in_c = dtype in cpu_kernels.NAMES and cpu_kernels.library() is not None
    if dtype == torch.bfloat16 and "amx_bf16" in cpu_kernels.processor():
        return SUMMING_WITH_TILES if in_c else math.inf
    return SUMMING[in_c][dtype.itemsize == 2]


def written(group: LoweredGroup, by: Way) -> tuple[tuple[int, int], str, int]:
    """How that way writes the outputs: sides of the large factor, layout, slices."""
    (m1, n1), (m2, n2) = group.large_shape, group.small_shape
    return (
        ((m1 * m2, n1 * n2), "small-outer", 1) if by == "formed" else ((m1, n1), group.layout, m2)
    )
