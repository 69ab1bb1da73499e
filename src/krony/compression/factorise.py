"""Initialization: from a dense matrix to factors, and the in-place compression of a model."""

import copy
import difflib
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression import calibrate, embedding, streaming, width
from krony.compression.calibrate import Moments
from krony.compression.embedding import RowMetric
from krony.compression.inits import INITS, Terms, check_prune
from krony.compression.sequential import DataOptions, Fitted, fit_plan
from krony.compression.work import Work
from krony.errors import KronyError
from krony.hf import families, ties
from krony.hf.families import Target, dense_weight, find_targets
from krony.hf.modeling import (
    Factored,
    KroneckerConfig,
    Plain,
    attach,
    build_layer,
    config_of,
    install,
    plain_layer,
    quantized_of,
)
from krony.hf.offload import check_present
from krony.hf.plan import MatrixPlan, Plan
from krony.nn.layers import KroneckerLinear
from krony.words import DATA as DATA

Model = TypeVar("Model", bound=PreTrainedModel)
Known = Moments | RowMetric  # what calibration found out about one matrix


def compress(
    model: Model,
    plan: Plan,
    *,
    init: str = DATA,
    seed: int = 0,
    calibration: Tensor | None = None,
    moments: Mapping[str, Known] | None = None,
    options: DataOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    work: Work | None = None,
    memory: int | None = None,
) -> Model:
    """Replace the planned matrices by Kronecker factors, in place, and return the model.

    All factors are found and checked before the first module is replaced, so a model that can't be
    compressed is left as it was. Equal input gives equal bytes. Initializations by weights and low
    rank by data are closed forms in float64; Kronecker sums by data are iterated in float32 from
    there (L-BFGS), and a step is kept only if it is better in float64. Factors are rounded once, to
    the dtype of the weights.

    Args:
        init: "data", factors of least harm on a calibration text, or a key of `INITS`.
        seed: for "random", for Van Loan of matrices too large for the exact method, and for the
            labels that "data" samples.
        calibration: token ids (windows, window), needed by "data"; see
            `calibrate.calibration_windows`.
        moments: what `calibrate.calibrate` found on them, if that was done already.
        options: the ingredients of "data"; default: all.
        progress: called with (name of the matrix, its number from 1, how many); while "data" reads
            the text, with ("Calibrating", steps done, steps in all).
        work: where "data" keeps finished stages and looks for them; default: in memory.
        memory: bytes that "data" may take in all; default: 60 % of what is free.
    Raises:
        KronyError: a planned matrix that the model does not have, has in another shape, or with
            NaN or Inf in it; an unknown `init`, or one that the plan's shapes rule out.
    """
    plan, modules = checked(model, plan, init)
    before = config_of(model)
    if init == DATA:
        if calibration is None:
            raise KronyError("the data initialization needs calibration windows; none were given")
        options = options or DataOptions()
        work = work or Work()
        if moments is None:
            told = progress and partial(progress, "Calibrating")
            moments = moments_of(
                model, plan, calibration, options.gradients, seed, work, memory, told
            )
        layers, errors = _by_data(model, plan, calibration, moments, options, work, progress)
    else:
        layers, errors = _by_weights(modules, plan, init, seed, progress)
    provenance: dict[str, Any] = {"init": init, "seed": seed, "matrices": errors}
    text = None if calibration is None else vars(calibration).get("text")
    texts = [] if before is None else list(before.provenance.get("texts", []))
    if text is not None:
        texts.append({**text, "use": "calibration"})
    if texts:
        provenance["texts"] = texts
    if before is not None:  # a second pass over other matrices adds to the first
        provenance["matrices"] = {**before.provenance.get("matrices", {}), **errors}
        plan = Plan(Plan.from_dict(before.plan).matrices + plan.matrices)
    for matrix in plan.matrices:
        if matrix.name in layers:
            install(model, matrix, layers[matrix.name])
    attach(model, KroneckerConfig(plan.to_dict(), provenance))
    return model


def checked(model: PreTrainedModel, plan: Plan, init: str) -> tuple[Plan, dict[str, nn.Module]]:
    """The plan as this model has to take it, and the dense layers that it names.

    Raises:
        KronyError: what `compress` raises for a model, a plan and an initialization that don't go
            together.
    """
    if init not in (*INITS, DATA):
        raise KronyError(f"no initialization {init!r}; there are {', '.join((*INITS, DATA))}")
    check_present(model, "compress the model")
    ties.settle(model)
    # One made on another model, or by hand, may take the embedding for tied or for untied.
    plan = Plan(
        tuple(
            replace(m, tied=ties.is_output(model, m.name)) if m.embedding else m
            for m in plan.matrices
        )
    )
    if (before := config_of(model)) is not None:
        _check_new(plan, Plan.from_dict(before.plan))
    if init != DATA and any(matrix.narrowed for matrix in plan.matrices):
        raise KronyError(
            f"the plan takes hidden units out, and --init {init} does not say which; use --init "
            f"{DATA}, or a plan with all of them"
        )
    if (quantized := quantized_of(model)) is not None:
        raise KronyError(
            f"the model is quantized to {quantized.to}; compress it first, then quantize"
        )
    everything = dict(model.named_modules())
    modules = {
        matrix.name: _dense_module(everything, matrix, type(model).__name__)
        for matrix in plan.matrices
    }
    if init == "prune":
        for matrix in plan.matrices:
            check_prune(matrix)
    return plan, modules


def _check_new(plan: Plan, before: Plan) -> None:
    """Raise `KronyError` if a matrix that only lost hidden units, and looks dense, is planned."""
    done = {matrix.name for matrix in before.matrices if matrix.narrowed}
    again = next((matrix.name for matrix in plan.matrices if matrix.name in done), None)
    if again is not None:
        raise KronyError(
            f"{again} has lost hidden units already; fold the model to dense first "
            "(krony export --to dense)"
        )


Layers = dict[str, Factored | Plain]
Errors = dict[str, dict[str, float]]


@torch.no_grad()
def _by_weights(
    modules: dict[str, nn.Module],
    plan: Plan,
    init: str,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[Layers, Errors]:
    layers: Layers = {}
    errors: Errors = {}
    for number, matrix in enumerate(plan.matrices, 1):
        module = modules[matrix.name]
        weight = dense_weight(module).detach().double()
        terms = INITS[init](weight, matrix, seed + number)
        layers[matrix.name] = _layer(module, matrix, terms)
        errors[matrix.name] = _measure(weight, layers[matrix.name])
        if progress is not None:
            progress(matrix.name, number, len(plan.matrices))
    return layers, errors


def _by_data(
    model: PreTrainedModel,
    plan: Plan,
    calibration: Tensor,
    moments: Mapping[str, Known],
    options: DataOptions,
    work: Work,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[Layers, Errors]:
    exact = calibrate.full_precision(model)
    ends = _ends(exact, plan)
    inner = Plan(tuple(m for m in plan.matrices if m.name not in ends))
    fitted: dict[str, tuple[Any, float]] = {}
    embedded = None
    start = exact
    for matrix in plan.matrices:
        if matrix.name in ends and isinstance(metric := moments[matrix.name], RowMetric):
            module = exact.get_submodule(matrix.name)
            weight = dense_weight(module).detach().double().cpu()
            pairs, harm = embedding.factors(weight, metric, matrix.groups)
            layer = _install(module, matrix, Fitted(pairs, None, harm))
            fitted[matrix.name] = layer, harm
            if matrix.embedding and options.sequential:
                embedded = copy.deepcopy(exact)
                install(embedded, matrix, copy.deepcopy(layer))
            if progress is not None:
                progress(matrix.name, len(fitted), len(plan.matrices))
    if inner.matrices:
        widest = max((m.dense_shape or m.shape)[1] for m in inner.matrices)
        calibrate.check_tokens(calibration.numel(), widest)
        within = cast(Mapping[str, Moments], moments)  # of matrices in blocks
        narrow = width.narrowed(exact, inner, within, options.bias, options.centered, work)
        found = fit_plan(
            exact, inner, calibration, narrow, _install, options,
            progress=progress, embedded=embedded, work=work,
        )  # fmt: skip
        start = narrow.model
        fitted |= {name: (layer, fit.harm) for name, (layer, fit) in found.items()}
    layers: Layers = {}
    errors: Errors = {}
    with torch.no_grad():
        for matrix in plan.matrices:
            layer, harm = fitted[matrix.name]
            module = model.get_submodule(matrix.name)
            weight = dense_weight(module)
            layers[matrix.name] = layer.to(weight.device, weight.dtype).train(module.training)
            dense = dense_weight(start.get_submodule(matrix.name)).detach().double()
            errors[matrix.name] = {
                **_measure(dense, layers[matrix.name]),
                "harm": round(harm, 8),
            }
    return layers, errors


def moments_of(
    model: PreTrainedModel,
    plan: Plan,
    windows: Tensor,
    gradients: bool = True,
    seed: int = 0,
    work: Work | None = None,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[str, Known]:
    """What the data initialization needs to know of all that a plan names."""
    exact = calibrate.full_precision(model)
    ends = _ends(exact, plan)
    names = [matrix.name for matrix in plan.matrices if matrix.name not in ends]
    return collect(
        exact,
        windows,
        names,
        list(ends.values()),
        gradients,
        seed,
        progress,
        work=work,
        memory=memory,
    )


def collect(
    model: PreTrainedModel,
    windows: Tensor,
    names: list[str],
    ends: list[Target],
    gradients: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    work: Work | None = None,
    memory: int | None = None,
) -> Mapping[str, Known]:
    """What the data initialization needs to know: of matrices in blocks, and of the ends.

    Args:
        work: where it is kept; default: in memory.
        memory: bytes that may be held in all; default: 60 % of what is free.
    """
    work = work or Work()
    found: dict[str, Known] = {}
    if ends:
        found |= embedding.once(model, windows, ends, work, seed=seed, progress=progress)
    if not names:
        return found
    if gradients:
        room = streaming.room(model, windows, names, memory)
        inner = streaming.collect(
            model, windows, names, work, room=room, seed=seed, progress=progress
        )
    else:
        inner = calibrate.calibrate(
            model, windows, names, gradients=False, seed=seed, progress=progress
        )
    return ChainMap(found, cast(dict[str, Known], inner))


def _ends(model: PreTrainedModel, plan: Plan) -> dict[str, Target]:
    """The embedding and the untied output matrix, if they are planned: what no block holds."""
    names, head = {m.name for m in plan.matrices}, model.get_output_embeddings()
    modules = [model.get_submodule(name) for name in names]
    if not any(m.embedding for m in plan.matrices) and not any(m is head for m in modules):
        return {}
    return {t.name: t for t in find_targets(model, "embedding") if t.name in names}


def _install(module: nn.Module, matrix: MatrixPlan, fitted: Fitted) -> Factored | Plain:
    """The factored layer with the fitted factors and bias, or the ordinary one with the weight."""
    if fitted.weight is not None:
        weight, bias = dense_weight(module), fitted.bias
        bias = None if bias is None else bias.to(weight)
        made = plain_layer(fitted.weight.to(weight), bias, matrix.conv1d)
        return made.train(module.training)
    terms = [
        Terms.from_layout(factors, *pair)
        for factors, pair in zip(matrix.groups, fitted.pairs, strict=True)
    ]
    with torch.no_grad():
        layer = _layer(module, matrix, terms)
        if fitted.bias is not None and isinstance(layer, KroneckerLinear):
            layer.bias.copy_(fitted.bias)
    return layer


def _dense_module(modules: dict[str, nn.Module], matrix: MatrixPlan, owner: str) -> nn.Module:
    """The layer that a plan names, checked against the plan; `owner` is the model's class."""
    module = modules.get(matrix.name)
    if module is None:
        near = difflib.get_close_matches(matrix.name, modules, n=3)
        raise KronyError(
            f"the plan names {matrix.name}, which {owner} does not have; near "
            f"names: {', '.join(near) or 'none'}"
        )
    if isinstance(module, Factored):
        raise KronyError(
            f"{matrix.name} is factored already; fold the model to dense first "
            "(krony export --to dense)"
        )
    scale = families.embedding_scale(module) if matrix.embedding else None
    if not (scale == matrix.scale if matrix.embedding else families.is_linear(module)):
        kind = "embedding" if matrix.embedding else "linear layer"
        raise KronyError(
            f"{matrix.name} is a {type(module).__name__}, not a dense {kind}; compress the "
            "model before it is quantized or adapted"
        )
    matrix.check()
    weight, planned = dense_weight(module), matrix.dense_shape or matrix.shape
    if tuple(weight.shape) != tuple(planned):
        raise KronyError(
            f"{matrix.name} is {weight.shape[0]}x{weight.shape[1]} in the model and "
            f"{planned[0]}x{planned[1]} in the plan; make the plan from this model"
        )
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise KronyError(
            f"{matrix.name} has {bad} NaN or Inf among its {weight.numel()} weights; "
            "repair the checkpoint, it can't be factored"
        )
    return module


def _layer(module: nn.Module, matrix: MatrixPlan, found: list[Terms]) -> Factored:
    weight = dense_weight(module)
    layer = build_layer(matrix, weight.device, weight.dtype)
    assert isinstance(layer, Factored)
    for group, terms in zip(layer.groups, found, strict=True):
        group.set_factors(terms.large, terms.small, terms.scalars)  # type: ignore[operator]
    if isinstance(layer, KroneckerLinear) and layer.bias is not None:
        layer.bias.copy_(module.bias)  # type: ignore[arg-type]
    return layer.train(module.training)


def _measure(weight: Tensor, layer: Factored | Plain) -> dict[str, float]:
    """Relative Frobenius error and share of the norm kept, of the factors as they are stored.

    Where hidden units are gone, of what is left of the dense matrix.
    """
    kept = layer.to_dense(torch.float64) if isinstance(layer, Factored) else dense_weight(layer)
    dense, size = kept.double(), float(weight.norm()) or 1.0
    return {
        "relative_error": round(float((weight - dense).norm()) / size, 6),
        "norm_kept": round(float(dense.norm()) / size, 6),
    }
