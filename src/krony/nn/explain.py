"""Which kernel takes each factored layer and MLP of a model, and why those before it do not."""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from krony.errors import KronyError
from krony.nn import dispatch, mlp, switches
from krony.nn.lower import keep, keep_mlp
from krony.runtime.layers import KroneckerLinear


@dataclass(frozen=True)
class Row:
    """A layer, an MLP, or a group of factors, and what makes its product.

    Attributes:
        name: the module's. kind: what it is.
        backend: the kernel's name (`dispatch`), or "torch".
        how: of torch, what is multiplied by.
        why_not: names of the kernels before it, each with the reason.
        count: modules that all of this is so for, numbers in `name` being "*" then (`summary`).
    """

    name: str
    kind: Literal["mlp", "layer", "group"]
    backend: str
    how: str
    why_not: tuple[tuple[str, str], ...]
    count: int = 1


@torch.no_grad()
def explain(model: nn.Module, tokens: int = 1) -> list[Row]:
    """Which kernel takes each factored layer and MLP, for so many tokens at once, and why those
    before it do not: in the model's dtype, on its device, without gradients and outside of autocast
    and torch.compile.

    An MLP that one kernel takes as a whole is one row; of others each factored layer has one, and
    of a layer that torch adds up of several groups each group.

    Args:
        tokens: of all rows of a batch together.
    Raises:
        KronyError: fewer than one token, or `KRONY_KERNELS` names a kernel that there is none of.
    """
    if tokens < 1:
        raise KronyError(f"a layer takes at least one token, not {tokens}")
    switches.check()
    rows: list[Row] = []
    whole = "\0"  # the MLP that the last row takes as a whole
    for name, module in model.named_modules():
        if name.startswith(whole):
            continue
        if mlp.record_of(module) is not None:
            rows.append(_of_mlp(name, module, tokens))
            if rows[-1].backend != "torch":
                whole = f"{name}." if name else ""
        elif isinstance(module, KroneckerLinear):
            rows += _of_layer(name, module, tokens)
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """Rows that differ in nothing but the numbers in their names as one each, in order."""
    found: dict[Any, Row] = {}
    for row in rows:
        key = replace(row, name=re.sub(r"\d+", "*", row.name))
        before = found.get(key)
        found[key] = row if before is None else replace(key, count=before.count + 1)
    return list(found.values())


def _request(module: nn.Module, tokens: int) -> dispatch.Request:
    some = next(p for p in module.parameters() if p.is_floating_point())
    return dispatch.Request(tokens, some.dtype, some.device)


def _of_mlp(name: str, module: nn.Module, tokens: int) -> Row:
    record = mlp.record_of(module)
    assert record is not None
    request, kept = _request(module, tokens), keep_mlp(module, record.parts)
    right = mlp.is_right(module, mlp.example(module))
    why = kept.why
    if module.training:
        why = "training mode"
    elif not right:
        why = "it computes something else than its parts make up"
    backend, why_not = _chosen("mlp", kept.lowered, request, why)
    return Row(name, "mlp", backend, "" if backend != "torch" else "layer by layer", why_not)


def _of_layer(name: str, layer: Any, tokens: int) -> list[Row]:
    request = _request(layer, tokens)
    rows = [_of_factors(name, "layer", layer, request)]
    if rows[0].how == "group by group":
        for number, group in enumerate(layer.groups):
            rows.append(_of_factors(f"{name}.groups.{number}", "group", group, request))
    return rows


def _of_factors(
    name: str, kind: Literal["layer", "group"], module: Any, request: dispatch.Request
) -> Row:
    kept = keep(module)
    backend, why_not = _chosen("layer", kept.lowered, request, kept.why)
    groups = kept.lowered.groups if kept.lowered is not None else getattr(module, "groups", [0])
    how = ""
    if backend == "torch" and len(groups) > 1:
        how = "group by group"
    elif backend == "torch" and kept.lowered is None:
        how = "the factors"
    elif backend == "torch" and kept.lowered.formed:
        how = "W, kept"
    elif backend == "torch":
        how = "W, formed" if request.tokens > groups[0].dense_from else "the factors"
    return Row(name, kind, backend, how, why_not)


def _chosen(
    unit: dispatch.Unit, lowered: Any, request: dispatch.Request, why: str | None
) -> tuple[str, tuple[tuple[str, str], ...]]:
    if why is not None:
        rows = [backend.name for backend in dispatch.table(unit)]
        return "torch", tuple((row, why) for row in rows if row != "torch")
    backend, why_not = dispatch.refusals(unit, lowered, request)
    found = tuple((name, reason) for name, reason in why_not if name != "torch")
    return ("torch" if backend is None else backend.name), found
