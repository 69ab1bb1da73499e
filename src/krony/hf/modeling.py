"""The transformers plug-in: configuration, loading, saving and folding back to dense.

Registering a `HfQuantizer` makes `AutoModelForCausalLM.from_pretrained` put `KroneckerLinear`
modules in place on the meta device and load the factors into them, for every architecture, dtype,
device map and sharding. The factors are ordinary floating-point parameters, unless `krony.quantize`
made torchao's tensors of the large ones; then the loader makes these again.
"""

import copy
import re
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from krony.errors import KronyError
from krony.hf.plan import MatrixPlan, Plan
from krony.hf.whole import check_factors, check_shape, left_over
from krony.nn import mlp
from krony.nn.activations import fuse, restore
from krony.nn.layers import KroneckerEmbedding, KroneckerGroup, KroneckerLinear
from krony.nn.packing import Packed, Quantised, StoredLinear, tensors
from krony.nn.watched import can_keep

METHOD = "kronecker"
Factored = KroneckerLinear | KroneckerEmbedding
Plain = nn.Linear | Conv1D  # of a plan that only takes hidden units out
_Entry = TypeVar("_Entry", MatrixPlan, Packed)


class KroneckerConfig(QuantizationConfigMixin):
    """What `config.json` holds about a factored model, under `quantization_config`.

    Args:
        plan: `Plan.to_dict()`: the shapes of every factored matrix.
        provenance: how the factors were made (initialisation, seed, error by matrix); only for
            people to read, the same for the same input.
        quantised: `Quantised.to_dict()`, only where something is; the plan may be empty then.
    """

    quantised: dict[str, Any] | None = None

    def __init__(
        self,
        plan: dict[str, Any],
        provenance: dict[str, Any] | None = None,
        quantised: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.plan = plan
        self.provenance = provenance or {}
        if quantised is not None:
            self.quantised = quantised


class KroneckerQuantizer(HfQuantizer):
    """Builds the factored modules before the weights are loaded, and folds them back on request."""

    quantization_config: KroneckerConfig
    # The whole weights of a model that is spread over processes, while it is being saved.
    gathered: dict[str, torch.Tensor] | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not self.pre_quantized:
            raise KronyError(
                "a dense checkpoint can't be factored while it loads; load it, then call "
                "krony.compress(model, plan)"
            )
        # The plan may have been made on the model with its head, and loads into one without, or
        # the other way round; from here on it speaks of this model.
        plan = Plan.from_dict(self.quantization_config.plan)
        plan = Plan(_found(model, plan.matrices))
        self.quantization_config.plan = plan.to_dict()
        for matrix in plan.matrices:
            weight = model.get_parameter(f"{matrix.name}.weight")
            check_shape(matrix, weight)
            install(model, matrix, build_layer(matrix, weight.device, weight.dtype))
            parent: Any = model.get_submodule(matrix.name.rpartition(".")[0])
            if not (parent._parameters or parent._buffers):  # GPT-2's would fill W with noise
                parent._is_hf_initialized = True
        if (quantised := self._quantised()) is not None:
            packed = _found(model, quantised.matrices)
            self.quantization_config.quantised = replace(quantised, matrices=packed).to_dict()
            for entry in packed:
                weight = model.get_parameter(f"{entry.name}.weight")
                stored = StoredLinear(entry, quantised.to, weight.dtype, weight.device)
                model.set_submodule(entry.name, stored)

        if checkpoint_files:
            check_factors(model, plan, checkpoint_files)
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        # By ending: the guards in the file may carry the prefix of another head.
        ignored |= {re.escape(key) + "$" for key in self._guards()}
        model._keys_to_ignore_on_load_unexpected = ignored

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, KroneckerEmbedding):
                for head in _tied_to(model, name):
                    _copy_orders(layer, model.get_submodule(head))
            elif isinstance(layer, StoredLinear):
                model.set_submodule(name, layer.restored())
        attach(model, self.quantization_config)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The state dict to save, with an empty tensor under the name of every dense weight.

        Where krony is not imported, transformers would skip the unknown method with a warning and
        leave the dense matrices at random. The empty tensors make it stop with a size mismatch.
        """
        weights = dict(model.state_dict()) if self.gathered is None else self.gathered
        if (quantised := self._quantised()) is not None:
            for entry in quantised.matrices:
                parts = tensors(weights.pop(f"{entry.name}.weight"), quantised.to)
                weights |= {f"{entry.name}.{name}": part for name, part in parts.items()}
        return {**weights, **left_over(model), **self._guards()}, {}

    def _guards(self) -> dict[str, torch.Tensor]:
        # Not of matrices that only lost hidden units: those fit no dense model as they are.
        plan = Plan.from_dict(self.quantization_config.plan)
        names = [matrix.name for matrix in plan.matrices if matrix.groups]
        if (quantised := self._quantised()) is not None:  # those that are not large factors
            names += [e.name for e in quantised.matrices if not _within(e.name, names)]
        return {f"{name}.weight": torch.empty(0) for name in names}

    def _quantised(self) -> Quantised | None:
        found = self.quantization_config.quantised
        return None if found is None else Quantised.from_dict(found)

    def dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Replace every factored or quantised layer by the ordinary one with the same dense weight.

        The sum of products is formed in float64 and rounded once, to `dtype` (default: the
        dtype of the factors). What quantisation lost stays lost. Hidden units that were taken out
        come back as zeros, since the architecture has a place for them.
        """
        plan = Plan.from_dict(self.quantization_config.plan)
        for matrix in plan.matrices:
            layer = model.get_submodule(matrix.name)
            if isinstance(layer, KroneckerEmbedding):
                _unfold_embedding(model, matrix.name, layer, dtype)
            elif isinstance(layer, KroneckerLinear):
                model.set_submodule(matrix.name, dense_layer(layer, matrix.conv1d, dtype))
        quantised, modules = self._quantised(), dict(model.named_modules())
        for entry in quantised.matrices if quantised is not None else ():
            if (module := modules.get(entry.name)) is not None:  # else a large factor, gone by now
                weight = module.weight.dequantize()
                dense = plain_layer(weight, module.bias, entry.conv1d)
                model.set_submodule(entry.name, dense)
        for matrix in plan.matrices:
            if matrix.narrowed:
                model.set_submodule(matrix.name, _widened(model.get_submodule(matrix.name), matrix))
        mlp.restore(model)
        restore(model)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.quantization_config.quantised is None

    @property
    def is_compileable(self) -> bool:
        return True


# transformers' decorators refuse a second class of the same name. A self-contained model brings a
# copy of this file, before krony or after it: krony's own classes take precedence, then the latest.
if getattr(AUTO_QUANTIZER_MAPPING.get(METHOD), "__module__", None) != "krony.hf.modeling":
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = KroneckerConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = KroneckerQuantizer


def _found(model: PreTrainedModel, entries: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
    """The entries with the base model's prefix added to their names or taken away, as `model`
    needs."""
    modules, prefix = {name for name, _ in model.named_modules()}, model.base_model_prefix + "."
    found = []
    for entry in entries:
        name = entry.name
        ways = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules]
        if not ways:
            raise KronyError(
                f"the checkpoint has a factored {name}, which {type(model).__name__} does not "
                "have; load it with the class that it was saved from"
            )
        found.append(replace(entry, name=ways[0]))
    return tuple(found)


def _within(name: str, parents: list[str]) -> bool:
    return any(name.startswith(f"{parent}.groups.") for parent in parents)


def attach(model: Any, config: KroneckerConfig) -> None:
    """Mark a model whose modules are factored, so that saving and folding know about it."""
    fuse(model)
    mlp.install(model, _unfactored(config))
    # Models made from one configuration object share it: without a copy of its own, this model
    # would make its dense siblings look factored.
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    own.quantization_config = config
    # The code of a self-contained directory is saved again by the class in it, and by no other.
    if not model.is_remote_code() and "modeling_krony" in str(getattr(own, "auto_map", "")):
        del own.auto_map
    model.hf_quantizer = KroneckerQuantizer(config)
    model.quantization_method = METHOD
    # transformers forbids .float(), .half() and training on what it takes for quantised models;
    # these factors are plain floating-point parameters, for which all of that works.
    model.is_quantized = False
    if hasattr(own, "_is_quantized"):
        del own._is_quantized


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
        if (quantised := quantised_of(model)) is not None:
            rest = tuple(m for m in quantised.matrices if not _within(m.name, formed))
            packed = replace(quantised, matrices=rest).to_dict() if rest else None
        mlp.restore(model)
        attach(model, KroneckerConfig(Plan(tuple(matrices)).to_dict(), config.provenance, packed))
    return formed + completed


def quantised_of(model: nn.Module) -> Quantised | None:
    """What was quantised in a model, and to what; None where nothing is."""
    config = config_of(model)
    found = None if config is None else config.quantised
    return None if found is None else Quantised.from_dict(found)


def install(model: PreTrainedModel, matrix: MatrixPlan, layer: Factored | Plain) -> None:
    """Put a factored layer in the place of a dense one; a tied output matrix follows it.

    Tied factors are tied as transformers ties weights, parameter by parameter, so that they are
    one in memory and in the file.
    """
    before = getattr(model.get_submodule(matrix.name), "padding_idx", None)
    model.set_submodule(matrix.name, layer)
    if not isinstance(layer, KroneckerEmbedding):
        return
    layer.padding_idx = before
    model.resize_token_embeddings = _refuse_resizing  # type: ignore[assignment, method-assign]
    weight = f"{matrix.name}.weight"
    tied: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        if source == weight:
            head = target.removesuffix(".weight")
            model.set_submodule(head, layer.tied_linear())
            names = [name for name, _ in layer.named_parameters()]
            tied |= {f"{head}.{name}": f"{matrix.name}.{name}" for name in names}
        else:
            tied[target] = source
    model._tied_weights_keys = tied
    model.all_tied_weights_keys = dict(tied)


def _refuse_resizing(*_: Any, **__: Any) -> None:
    raise KronyError(
        "the embedding is factored, so tokens can't be added or taken away; fold the model to "
        "dense first (krony export --to dense), resize that, and compress it again"
    )


def _copy_orders(layer: KroneckerEmbedding, head: Any) -> None:
    """Give a tied output matrix the index of interpolative factors, which only one stores."""
    for mine, its in zip(layer.groups, head.groups, strict=True):
        if mine.order is not None:
            its.order = mine.order.clone()  # type: ignore[operator]


def _tied_to(model: PreTrainedModel, name: str) -> set[str]:
    """Names of the output matrices that share the factors of the embedding `name`."""
    keys, start = model.all_tied_weights_keys.items(), f"{name}.groups."
    return {target.partition(".groups.")[0] for target, source in keys if source.startswith(start)}


def _unfold_embedding(
    model: PreTrainedModel, name: str, layer: KroneckerEmbedding, dtype: torch.dtype | None
) -> None:
    """The ordinary embedding again, and the ordinary output matrix tied to it."""
    weight = nn.Parameter(_rounded(layer, dtype))
    with torch.device("meta"):
        dense = nn.Embedding(weight.shape[0], weight.shape[1], layer.padding_idx)
    dense.weight = weight
    model.set_submodule(name, dense)
    for head in _tied_to(model, name):
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = weight
        model.set_submodule(head, linear)
    # What `install` put on this model gives way to what its class says.
    for attribute in ("resize_token_embeddings", "_tied_weights_keys"):
        vars(model).pop(attribute, None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def build_layer(
    matrix: MatrixPlan,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Factored | Plain:
    """The module that the plan describes, with random factors, or without any an ordinary one."""
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    if not matrix.groups:
        (m, n) = matrix.shape
        bias = torch.empty(m, **where) if matrix.bias else None
        return plain_layer(torch.empty(m, n, **where), bias, matrix.conv1d)
    groups = [
        KroneckerGroup(
            g.large, g.small, g.terms, g.layout, matrix.scalars, g.interpolative, **where
        )
        for g in matrix.groups
    ]
    (m, n) = matrix.shape
    if matrix.embedding:
        return KroneckerEmbedding(m, n, groups)
    layer = KroneckerLinear(n, m, groups, matrix.bias, **where)
    layer.keeps_formed = matrix.keeps_formed
    return layer


@torch.no_grad()
def _widened(layer: Any, matrix: MatrixPlan) -> Plain:
    """The layer with zeros for the hidden units that are gone, behind those that stayed."""
    assert matrix.dense_shape is not None
    (m, n), (most, wide) = matrix.shape, matrix.dense_shape
    parts, weight, bias = matrix.parts, layer.weight, layer.bias
    weight = (weight.T if matrix.conv1d else weight).unflatten(0, (parts, m // parts))
    weight = F.pad(weight, (0, wide - n, 0, (most - m) // parts)).flatten(0, 1)
    if bias is not None:
        bias = F.pad(bias.unflatten(0, (parts, m // parts)), (0, (most - m) // parts)).flatten()
    return plain_layer(weight, bias, matrix.conv1d)


@torch.no_grad()
def _rounded(layer: Factored, dtype: torch.dtype | None) -> torch.Tensor:
    """The dense weight, summed in float64 and rounded once."""
    dense = layer.to_dense(torch.float64).to(dtype or next(layer.parameters()).dtype)
    return dense.contiguous()


def dense_layer(
    layer: KroneckerLinear, conv1d: bool, dtype: torch.dtype | None = None
) -> nn.Linear | Conv1D:
    """The ordinary layer with the same weight and bias; `conv1d` says which of the two kinds."""
    return plain_layer(_rounded(layer, dtype), layer.bias, conv1d)


def plain_layer(
    weight: torch.Tensor, bias: torch.Tensor | None, conv1d: bool
) -> nn.Linear | Conv1D:
    """The ordinary layer of a weight (m, n) and a bias."""
    (m, n), weight = weight.shape, weight.detach()
    with torch.device("meta"):
        dense = Conv1D(m, n) if conv1d else nn.Linear(n, m, bias=bias is not None)
    dense.weight = nn.Parameter(weight.T.contiguous() if conv1d else weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(weight.dtype))
    return dense
