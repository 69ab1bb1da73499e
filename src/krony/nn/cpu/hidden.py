"""An MLP of many tokens on a CPU: what lies between its large products in one loop of hidden.c.

Called one after the other, bias, activation, product of gate and other and the mixing of slices
write the hidden axis three to five times and read it as often.
"""

from typing import Any

import torch
from torch import Tensor

from krony.nn import products
from krony.nn.cpu import fewer
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.lower import LoweredMLP, stray

LEAST = 32  # tokens from which one loop takes less than the calls that it saves


def can_take(mlp: LoweredMLP, request: Any) -> str | None:
    """Why it does not take an MLP, or None: factors or their W, which write the hidden axis in the
    same slices, for many tokens."""
    if request.device.type != "cpu":
        return "only on a CPU"
    if request.special is not None:
        return str(request.special)
    if request.dtype not in cpu_kernels.NAMES:
        return "only float32 and bfloat16"
    if request.tokens < LEAST:
        return f"fewer than {LEAST} tokens"
    if all(matrix.is_dense for matrix in mlp.matrices):
        return "no matrix is factored, and BLAS adds biases as it goes"
    if any(len(matrix.groups) > 1 for matrix in mlp.matrices):
        return "a matrix is a sum of several groups"
    if (strays := stray(mlp, request.dtype, request.device)) is not None:
        return strays
    return _unlike(mlp, request) or (None if cpu_kernels.library() is not None else "no C compiler")


def _unlike(mlp: LoweredMLP, request: Any) -> str | None:
    """Why the hidden axis is not written in the same slices, few enough, or None."""
    ups = [up.groups[0] for up in mlp.ups]
    ways = [fewer.way(up, request.tokens, request.dtype) for up in ups]
    found = [fewer.written(up, by) for up, by in zip(ups, ways, strict=True)]
    sides = {(large[0], layout, slices) for large, layout, slices in found}
    if len(sides) > 1:
        return "gate and up write the hidden axis in other slices"
    ((_, _, slices),) = sides
    if mlp.ups[0].shape[0] != mlp.down.shape[1]:
        return "gate and up are one matrix"
    if slices > cpu_kernels.MOST_MIXED:
        return f"more than {cpu_kernels.MOST_MIXED} slices"
    return None


def run(mlp: LoweredMLP, x: Tensor) -> Tensor:
    """Tokens x (..., n) through an MLP: (..., m)."""
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    routes = [fewer.route_for(matrix.groups[0], len(x), x.dtype) for matrix in mlp.matrices]
    (*written, read), (*_, down) = routes, mlp.matrices
    (m2, m1, *_), layout = written[0].shape, written[0].layout
    parts = []
    for route, up in zip(written, mlp.ups, strict=True):
        bias, outer = route.slices_of(up.bias), route.outer
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
    y = cpu_kernels.hidden(parts, mlp.kind, inner, room)
    if inner is None:
        y = read.enter(products.from_slices(y, torch.Size([len(x)]), layout))
    return read.leave(y, down.bias, lead)
