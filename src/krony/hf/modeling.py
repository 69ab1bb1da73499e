"""Factored models of transformers: krony's layers in place of the dense ones, marked, and formed.

Loading stands in `krony.runtime.loader`; here the package's own layers and its faster MLPs take the
place of those in plain torch. The factors are ordinary floating-point parameters, unless
`krony.quantize` made torchao's tensors of the large ones.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from krony.errors import KronyError
from krony.hf import patches, ties
from krony.hf.offload import check_present
from krony.hf.plan import MatrixPlan, Plan
from krony.hf.whole import check_factors, check_shape, left_over
from krony.nn import mlp, packing
from krony.nn.activations import fuse, restore
from krony.nn.formed import can_keep
from krony.nn.layers import KroneckerEmbedding, KroneckerGroup, KroneckerLinear, is_adapted
from krony.nn.packing import Quantized
from krony.runtime import loader
from krony.runtime.loader import KroneckerConfig as KroneckerConfig
from krony.runtime.loader import Plain as Plain
from krony.runtime.loader import dense_layer as dense_layer
from krony.runtime.loader import plain_layer as plain_layer

Factored = KroneckerLinear | KroneckerEmbedding


class KroneckerQuantizer(loader.KroneckerQuantizer):
    """The loader with krony's own layers."""

    # The whole weights of a model that is spread over processes, while it is being saved.
    gathered: dict[str, Tensor] | None = None

    def build(self, entry: loader.Entry, weight: Tensor) -> Factored | Plain:
        (matrix,) = Plan.from_dict({"matrices": [entry]}).matrices
        check_shape(matrix, weight)
        return build_layer(matrix, weight.device, weight.dtype)

    def finish(self, model: PreTrainedModel) -> None:
        for layer in model.modules():
            if isinstance(layer, KroneckerEmbedding):
                patches.refuse_resizing(model)
        ties.settle(model)
        attach(model, self.quantization_config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        config.plan = Plan.from_dict(config.plan).to_dict()  # with what older files leave out
        if config.quantized is not None:
            config.quantized = Quantized.from_dict(config.quantized).to_dict()
            packing.torchao()
        super()._process_model_before_weight_loading(model)
        if checkpoint_files:
            check_factors(model, Plan.from_dict(config.plan), checkpoint_files)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict to save, as `to_file` has it, with what travels along."""
        weights = model.state_dict() if self.gathered is None else self.gathered
        return {**self.to_file(weights), **left_over(model)}, {}

    def dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """An ordinary model in every respect: also without krony's activations and MLPs.

        Raises:
            KronyError: weights that are offloaded, or adapters that are not merged.
        """
        check_present(model, "fold the model to dense")
        check_merged(model)
        mlp.restore(model)
        restore(model)
        patches.allow_resizing(model)
        return super().dequantize(model, dtype)


# The package's own classes take precedence, whatever was registered before (runtime/loader.py).
AUTO_QUANTIZATION_CONFIG_MAPPING[loader.METHOD] = KroneckerConfig
AUTO_QUANTIZER_MAPPING[loader.METHOD] = KroneckerQuantizer


def attach(model: Any, config: KroneckerConfig) -> None:
    """Mark a model whose modules are factored, so that saving and folding know about it."""
    fuse(model)
    mlp.install(model, _unfactored(config))
    loader.mark(model, KroneckerQuantizer(config))
    patches.forget_code(model)


def check_merged(model: nn.Module) -> None:
    """Raise `KronyError` for factors with adapters, whose part in W would be lost."""
    for name, module in model.named_modules():
        if isinstance(module, KroneckerGroup) and is_adapted(module):
            raise KronyError(f"{name} has an adapter; merge it into the factors first")


def config_of(model: nn.Module) -> KroneckerConfig | None:
    """The configuration of a factored model (its plan and provenance), or None for a dense one."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer.quantization_config if isinstance(quantizer, KroneckerQuantizer) else None


def narrowed_layers(model: nn.Module) -> list[str]:
    """Names of the layers that are dense but for the hidden units that they lost."""
    config = config_of(model)
    return [] if config is None else _unfactored(config)


def _unfactored(config: KroneckerConfig) -> list[str]:
    return [matrix.name for matrix in Plan.from_dict(config.plan).matrices if not matrix.groups]


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own, whose modules can be replaced, with the same parameters and buffers."""
    same = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)


def form(model: PreTrainedModel) -> list[str]:
    """Put W in the place of the factors in every layer that keeps it in inference, and keep the
    small factors of the others in full; the names of the layers that changed.

    Such a layer uses its factors under `torch.compile` and in training, and interpolative factors
    are put together anew there for every token. After this both are as fast there as elsewhere. W
    takes the memory of W alone, factors in full R² numbers more; saved, the model is larger.
    """
    if (config := config_of(model)) is None:
        return []
    check_present(model, "form W in it")
    formed, completed = [], []
    matrices = list(Plan.from_dict(config.plan).matrices)
    for number, matrix in enumerate(matrices):
        layer = model.get_submodule(matrix.name)
        if not isinstance(layer, KroneckerLinear):
            continue
        if can_keep(layer):
            model.set_submodule(matrix.name, dense_layer(layer, matrix.conv1d))
            matrices[number] = replace(matrix, groups=())
            formed.append(matrix.name)
        elif any(group.interpolative for group in matrix.groups):
            for group in layer.groups:
                group.complete()  # type: ignore[operator]
            full = tuple(replace(group, interpolative=False) for group in matrix.groups)
            matrices[number] = replace(matrix, groups=full)
            completed.append(matrix.name)
    if formed or completed:
        packed = None
        if (quantized := quantized_of(model)) is not None:
            rest = tuple(m for m in quantized.matrices if not _within(m.name, formed))
            packed = replace(quantized, matrices=rest).to_dict() if rest else None
        mlp.restore(model)
        attach(model, KroneckerConfig(Plan(tuple(matrices)).to_dict(), config.provenance, packed))
    return formed + completed


def quantized_of(model: nn.Module) -> Quantized | None:
    """What was quantized in a model, and to what; None where nothing is."""
    config = config_of(model)
    found = None if config is None else config.quantized
    return None if found is None else Quantized.from_dict(found)


def _within(name: str, parents: list[str]) -> bool:
    return any(name.startswith(f"{parent}.groups.") for parent in parents)


def install(model: PreTrainedModel, matrix: MatrixPlan, layer: Factored | Plain) -> None:
    """Put a factored layer in the place of a dense one; a tied output matrix follows it."""
    loader.install(model, matrix.name, layer)
    if isinstance(layer, KroneckerEmbedding):
        patches.refuse_resizing(model)


def build_layer(
    matrix: MatrixPlan,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Factored | Plain:
    """The module that the plan describes, with random factors, or without any an ordinary one."""
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    if not matrix.groups:
        return loader.empty_layer(matrix.shape, matrix.bias, matrix.conv1d, **where)
    groups = [
        KroneckerGroup(
            g.large, g.small, g.terms, g.layout, matrix.scalars, g.interpolative, **where
        )
        for g in matrix.groups
    ]
    (m, n) = matrix.shape
    if matrix.embedding:
        embedding = KroneckerEmbedding(m, n, groups)
        embedding.scale = matrix.scale
        return embedding
    layer = KroneckerLinear(n, m, groups, matrix.bias, **where)
    layer.keeps_formed = matrix.keeps_formed
    return layer
