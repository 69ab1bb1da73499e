"""Which kernel makes a product: an ordered table for layers and one for MLPs; the first that can.

A kernel is a file and a row here. A row looks at what is to be multiplied by (`lower.Lowered`, or
`LoweredMLP`) and at what is asked for (`Request`), and says why not, or nothing: then it takes it.
Behind the last row stands the module's own forward, in torch. What was chosen is kept with the
layer until a factor changes (`lower.keep`). Rows from outside come by `register`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)

from krony.errors import KronyError
from krony.nn import switches
from krony.nn.cpu import decode, fewer, hidden, tiles
from krony.nn.gpu import few, mlp, operators
from krony.nn.lower import Kept, NotPlainError, Once, Parts, keep, keep_mlp, of_layer, of_mlp, once
from krony.nn.products import add
from krony.nn.switches import restricted as restricted
from krony.runtime.layers import is_exporting

Unit = Literal["layer", "mlp"]
MOST_CHOICES = 64  # requests whose choices are kept with a layer


class Request(NamedTuple):
    """What is asked for.

    Attributes:
        tokens: of all inputs together, at least one.
        dtype, device: of the inputs.
        grad: gradients are on. learns: and the inputs or a factor want them.
        special: what else is done with the inputs' operations than what they say, or None.
    """

    tokens: int
    dtype: torch.dtype
    device: torch.device
    grad: bool = False
    learns: bool = False
    special: str | None = None


@dataclass(frozen=True)
class Backend:
    """A row.

    Attributes:
        name: for `KRONY_KERNELS` and `krony.explain`.
        can_take: why it does not take a matrix for a request, in a few words; None where it does.
        run: of what `prepare` made and inputs (..., n), the outputs (..., m), biases included; or
            None where it turns out that it can't.
        prepare: what it wants to have ready, made once and kept until a factor changes.
        copies: whether that has numbers, not only where they are. Of factors that were made in
            inference mode, which do not count their changes, such a thing is not kept.
        traces: whether torch.compile may trace it, where `prepare` is done for every call.
    """

    name: str
    can_take: Callable[[Any, Any], str | None]
    run: Callable[[Any, Tensor], Tensor | None]
    prepare: Callable[[Any], Any] = lambda lowered: lowered
    copies: bool = True
    traces: bool = False


_tables: dict[str, list[Backend]] = {
    "layer": [
        Backend("decode", decode.can_take, decode.run, decode.Prepared, copies=False),
        Backend("fewer", fewer.can_take, fewer.run),
        Backend("triton", few.can_take, few.run, traces=True),
    ],
    "mlp": [
        Backend("triton", mlp.can_take, mlp.run, mlp.steps, traces=True),
        Backend("decode", decode.can_take, decode.run, decode.Prepared, copies=False),
        Backend("tiles", tiles.can_take, tiles.run, tiles.plan),
        Backend("hidden", hidden.can_take, hidden.run),
    ],
}


def table(unit: Unit) -> list[Backend]:
    """The rows that may be used now, the first that can is taken; `torch` stands behind them.

    Raises:
        KronyError: `KRONY_KERNELS` names a kernel that there is none of.
    """
    switches.check()
    return [backend for backend in _tables[unit] if switches.allows(backend.name)]


def register(backend: Backend, unit: Unit = "layer", before: str | None = None) -> None:
    """Add a row.

    Args:
        unit: what it takes: a `Lowered` layer, or a `LoweredMLP`.
        before: the name of the row that it comes before; default: the first.
    Raises:
        KronyError: there is a row of its name, or none of the name `before`.
    """
    rows = _tables[unit]
    names = [row.name for row in rows]
    if backend.name in names or backend.name == "torch":
        raise KronyError(f"there is a kernel {backend.name!r} for a {unit}; choose another name")
    if before not in (None, "torch", *names):
        raise KronyError(
            f"there is no kernel {before!r} for a {unit}; there are {', '.join((*names, 'torch'))}"
        )
    at = 0 if before is None else len(names) if before == "torch" else names.index(before)
    rows.insert(at, backend)
    switches.known.setdefault(backend.name, "registered from outside")
    switches.changed()


def unregister(name: str, unit: Unit = "layer") -> None:
    """Take a row out again. Raises `KronyError` where there is none of that name."""
    rows = _tables[unit]
    if name not in [row.name for row in rows]:
        raise KronyError(f"there is no kernel {name!r} for a {unit}")
    rows[:] = [row for row in rows if row.name != name]
    switches.changed()


def refusals(
    unit: Unit, lowered: Any, request: Request
) -> tuple[Backend | None, list[tuple[str, str]]]:
    """The row that takes it, or None for torch, and why those before it do not."""
    why: list[tuple[str, str]] = []
    for backend in table(unit):
        reason = backend.can_take(lowered, request)
        if reason is None:
            return backend, why
        why.append((backend.name, reason))
    return None, why


def run(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The product of a `KroneckerLinear` or a `KroneckerGroup` with x (..., n): (..., m), or None
    where its own forward is to be taken.

    Args:
        bias: (m,), to be added, of the layer that a group belongs to.
    """
    if torch.compiler.is_compiling():
        return _traced("layer", layer, x, bias)
    kept = keep(layer)
    made = _by_choice("layer", kept, x)
    return made if made is None or bias is None else add(made, bias)


def run_mlp(mlp: nn.Module, x: Tensor, parts: Parts) -> Tensor | None:
    """The same of an MLP."""
    if torch.compiler.is_compiling():
        return _traced("mlp", mlp, x, None, parts)
    return _by_choice("mlp", keep_mlp(mlp, parts), x)


def _by_choice(unit: Unit, kept: Kept, x: Tensor) -> Tensor | None:
    if kept.lowered is None:
        return None
    request = request_of(x)
    if request is None:
        return None
    if request.grad and (x.requires_grad or any(t.requires_grad for t in kept.tensors)):
        request = request._replace(learns=True)
    if kept.version != switches.version or len(kept.choices) > MOST_CHOICES:
        kept.version, kept.choices = switches.version, {}
    try:
        backend, prepared = kept.choices[request]
    except KeyError:
        backend, _ = refusals(unit, kept.lowered, request)
        prepared = None
        if backend is not None:
            prepared = once(kept.lowered, backend.name, backend.prepare, backend.copies)
        if backend is None or kept.counted or not backend.copies:
            kept.choices[request] = backend, prepared
    return None if backend is None else backend.run(prepared, x)


def request_of(x: Tensor) -> Request | None:
    """What inputs (..., n) ask for; None for none, and while torch.jit.trace writes a graph that
    other kernels than torch's would be missing in."""
    if _get_tracing_state() is not None or not (numbers := x.numel()):
        return None
    device, special = x.device, None
    if type(x) is not Tensor:
        special = "the inputs are no plain tensor"
    elif _are_functorch_transforms_active():
        special = "operations are transformed (torch.func)"
    elif _len_torch_dispatch_stack():
        special = "operations are watched or counted"
    elif _is_any_autocast_enabled() and torch.is_autocast_enabled(device.type):
        special = "autocast"
    return Request(numbers // x.shape[-1], x.dtype, device, torch.is_grad_enabled(), False, special)


def _traced(
    unit: Unit, owner: nn.Module, x: Tensor, bias: Tensor | None, *parts: Any
) -> Tensor | None:
    """In a graph: nothing is kept, and only rows that can be traced are asked."""
    if is_exporting() or not (x.is_cuda or operators.INTERPRETED):
        return None
    try:
        lowered = of_mlp(Once(), owner, *parts) if unit == "mlp" else of_layer(Once(), owner)
    except NotPlainError:
        return None
    special = "autocast" if torch.is_autocast_enabled(x.device.type) else None
    tokens, grad = x.numel() // x.shape[-1], torch.is_grad_enabled()
    request = Request(tokens, x.dtype, x.device, grad, grad, special)
    for backend in _tables[unit]:
        if backend.traces and backend.can_take(lowered, request) is None:
            made = backend.run(backend.prepare(lowered), x)
            return made if made is None or bias is None else add(made, bias)
    return None
