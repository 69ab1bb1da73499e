"""Quantization on top: torchao's int8 and int4 on the large factors, or on a dense model's MLPs."""

from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from krony.errors import KronyError
from krony.hf.families import dense_weight, find_targets
from krony.hf.modeling import KroneckerConfig, attach, config_of, narrowed_layers, quantized_of
from krony.hf.offload import check_present
from krony.nn import packing
from krony.nn.layers import KroneckerGroup, KroneckerLinear
from krony.nn.packing import Packed, Quantized
from krony.runtime.quantized import quantize_weight, quantized_linear

Model = TypeVar("Model", bound=PreTrainedModel)


def quantize(model: Model, to: str = "int8") -> Model:
    """Quantize the weights that krony is about, in place, and return the model.

    Those are the large factors of every factored linear layer, and the MLP matrices that are still
    dense: all of them in a dense model, which can so be set beside a factored one. Small factors,
    biases, attention, embeddings and output matrices tied to them keep their dtype.

    Args:
        to: "int8", one scale a row; "int8-dynamic", inputs too, while the model runs, one scale a
            token; "int4", one scale and one zero point for about 32 numbers of a row
            (`packing.group_size`; what that does not divide is left, with the reason, in
            `config_of(model).quantized["kept"]`).
    Raises:
        KronyError: another form, no torchao, a model that is quantized already or has nothing to
            quantize, a weight with NaN or Inf.
    """
    packing.check_form(to)
    packing.torchao()
    check_present(model, "quantize the model")
    if (before := quantized_of(model)) is not None:
        raise KronyError(
            f"the model is quantized to {before.to} already; start from the one that "
            "it was made from"
        )
    found, kept = _chosen(model), {}
    layers: dict[str, nn.Linear] = {}
    packed = []
    for name, conv1d in found.items():
        module = model.get_submodule(name)
        weight = dense_weight(module).detach()
        shape = (weight.shape[0], weight.shape[1])
        group = packing.group_size(shape[1], to)
        if group is None:
            kept[name] = (
                f"no number from {packing.LEAST_GROUP} to {packing.MOST_GROUP} divides its "
                f"{shape[1]} columns"
            )
            continue
        if not torch.isfinite(weight).all():
            raise KronyError(f"{name} has NaN or Inf in it; a model like that can't be quantized")
        bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
        layers[name] = quantized_linear(quantize_weight(weight.contiguous(), to, group), bias)
        packed.append(Packed(name, shape, group, bias is not None, conv1d))
    if not packed:
        reasons = "; ".join(f"{name}: {why}" for name, why in kept.items())
        raise KronyError(f"nothing to quantize to {to} in this {type(model).__name__}: {reasons}")
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    quantized = Quantized(to, tuple(packed), kept).to_dict()
    config = config_of(model)
    known = ({"matrices": []}, {}) if config is None else (config.plan, config.provenance)
    attach(model, KroneckerConfig(*known, quantized=quantized))
    return model


def _chosen(model: PreTrainedModel) -> dict[str, bool]:
    """Names of the linear layers to quantize, and whether the architecture has a Conv1D there."""
    embedding = {id(p) for p in model.get_input_embeddings().parameters()}
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, KroneckerLinear):
            continue
        if any(id(p) in embedding for p in layer.parameters()):
            continue  # the tied output matrix: its factors are looked up row by row too
        for number, group in enumerate(layer.groups):
            assert isinstance(group, KroneckerGroup)
            found[f"{name}.groups.{number}.large"] = False
    try:
        targets = find_targets(model, "mlp")
    except KronyError:
        if not found:
            raise
        targets = []  # no MLP is dense as a whole
    for name in (*narrowed_layers(model), *(target.name for target in targets)):
        found[name] = isinstance(model.get_submodule(name), Conv1D)
    return found
