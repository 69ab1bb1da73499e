"""Which kernel makes a product: an ordered table for layers and one for MLPs; the first that can.

A kernel is a file and a row here. A row looks at what is to be multiplied by (`lower.Lowered`, or
`LoweredMLP`) and at what is asked for (`Request`), and says why not, or nothing: then it takes it.
Where none does, it is the module's own forward. What was chosen is kept with the
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
from krony.nn import plain, switches
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
        with_grad: tokens up to which it is asked at all where gradients are on.
        traces: whether torch.compile may trace it, where `prepare` is done for every call.
    """

    name: str
    can_take: Callable[[Any, Any], str | None]
    run: Callable[[Any, Tensor], Tensor | None]
    prepare: Callable[[Any], Any] = lambda lowered: lowered
    copies: bool = True
    with_grad: float = 0
    traces: bool = False


_few = operators.MAX_TOKENS
_tables: dict[str, list[Backend]] = {
    "layer": [
        Backend("decode", decode.can_take, decode.run, decode.Prepared, False, with_grad=_few),
        Backend("fewer", fewer.can_take, fewer.run),
        Backend("triton", few.can_take, few.run, with_grad=_few, traces=True),
        Backend("torch", plain.can_take, plain.run),
    ],
    "mlp": [
        Backend("triton", mlp.can_take, mlp.run, mlp.steps, traces=True),
        Backend("decode", decode.can_take, decode.run, decode.Prepared, False),
        Backend("tiles", tiles.can_take, tiles.run, tiles.plan),
        Backend("hidden", hidden.can_take, hidden.run),
    ],
}
# Tokens up to which any of them is to be asked where gradients are on.
_asked = {unit: max(row.with_grad for row in rows) for unit, rows in _tables.items()}


def table(unit: Unit) -> list[Backend]:
    """The rows that may be used now: the first that can is taken, or the module's own forward.

    Raises:
        KronyError: `KRONY_KERNELS` names a kernel that there is none of.
    """
    switches.check()
    return [row for row in _tables[unit] if row.name == "torch" or switches.allows(row.name)]


def register(backend: Backend, unit: Unit = "layer", before: str | None = None) -> None:
    """Add a row.

    Args:
        unit: what it takes: a `Lowered` layer, or a `LoweredMLP`.
        before: the name of the row that it comes before; default: the first.
    Raises:
        KronyError: there is a row of its name, or none of the name `before`.
    """
    names = [row.name for row in _tables[unit]]
    if backend.name in names:
        raise KronyError(f"there is a kernel {backend.name!r} for a {unit}; choose another name")
    if before is not None and before not in names:
        raise KronyError(f"no kernel {before!r} for a {unit}; there are {', '.join(names)}")
    _tables[unit].insert(0 if before is None else names.index(before), backend)
    switches.known.setdefault(backend.name, "registered from outside")
    _changed(unit)


def unregister(name: str, unit: Unit = "layer") -> None:
    """Take a row out again. Raises `KronyError` where there is none of that name."""
    rows = [row for row in _tables[unit] if row.name != name or name == "torch"]
    if len(rows) == len(_tables[unit]):
        raise KronyError(f"no kernel {name!r} for a {unit} that could be taken out")
    _tables[unit] = rows
    _changed(unit)


def _changed(unit: Unit) -> None:
    _asked[unit] = max(row.with_grad for row in _tables[unit])
    switches.changed()


def refusals(
    unit: Unit, lowered: Any, request: Request
) -> tuple[Backend | None, list[tuple[str, str]]]:
    """The row that takes it, or None for the module's own forward, and why others do not."""
    why: list[tuple[str, str]] = []
    for backend in table(unit):
        reason: str | None = "gradients are on"
        if not request.grad or request.tokens <= backend.with_grad:
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
    if torch.is_grad_enabled() and x.numel() > _asked["layer"] * x.shape[-1]:
        return None
    made = _by_choice("layer", keep(layer), x)
    return made if made is None or bias is None else add(made, bias)


def run_mlp(mlp: nn.Module, x: Tensor, parts: Parts) -> Tensor | None:
    """The same of an MLP."""
    if torch.compiler.is_compiling():
        return _traced("mlp", mlp, x, None, parts)
    if torch.is_grad_enabled() and x.numel() > _asked["mlp"] * x.shape[-1]:
        return None
    return _by_choice("mlp", keep_mlp(mlp, parts), x)


def which(layer: nn.Module, x: Tensor) -> str:
    """The name of the kernel that takes x (..., n) to a `KroneckerLinear` or a `KroneckerGroup`
    now; "torch" as well for its own forward."""
    kept = keep(layer)
    request = _request(kept, x)
    if request is None or kept.lowered is None:
        return "torch"
    backend, _ = refusals("layer", kept.lowered, request)
    return "torch" if backend is None else backend.name


def _request(kept: Kept, x: Tensor) -> Request | None:
    request = request_of(x)
    if request is not None and request.grad:
        wanted = x.requires_grad or any(tensor.requires_grad for tensor in kept.tensors)
        return request._replace(learns=wanted)
    return request


def _by_choice(unit: Unit, kept: Kept, x: Tensor) -> Tensor | None:
    if kept.lowered is None or (request := _request(kept, x)) is None:
        return None
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
        if not backend.traces or not switches.allows(backend.name):
            continue
        if backend.can_take(lowered, request) is None:
            made = backend.run(backend.prepare(lowered), x)
            return made if made is None or bias is None else add(made, bias)
    return None
