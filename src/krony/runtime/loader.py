"""The plug-in that puts factored layers into the models of transformers, loads, saves, folds them.

A part of krony (Apache-2.0) that needs torch and transformers. Directories that load without krony
hold a copy of it and of its neighbors; everything runs in plain torch there, and where krony is
imported its own classes take over.

Registering a `HfQuantizer` makes `AutoModelForCausalLM.from_pretrained` put the modules in place on
the meta device and load the factors into them, for every architecture, dtype, device map and
sharding. `config.json` says which: `quantization_config` holds
    plan            {"matrices": [{name, shape, groups: [{large, small, terms, layout,
                    interpolative}], scalars, bias, conv1d, embedding, dense_shape, parts, scale}]}
    format          a number, see `FORMAT`
    quantized       {"to", "matrices": [{name, shape, group, bias, conv1d}], "kept"}, or nothing
"""

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .layers import KroneckerEmbedding, KroneckerGroup, KroneckerLinear
from .quantized import StoredLinear, tensors

METHOD = "kronecker"
FORMAT = 2  # of what `config.json` says; 1, of krony 0.1, has no number and no `scale`
Factored = KroneckerLinear | KroneckerEmbedding
Plain = nn.Linear | Conv1D
Entry = dict[str, Any]


def check_format(found: Any) -> None:
    """Raise `ValueError` for the number of a format that this code does not know."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"the format in config.json is {found!r}, and must be a whole number")
    if found > FORMAT:
        raise ValueError(
            f"the model was written by a newer krony, in format {found}, and this one reads up to "
            f"{FORMAT}; update it: pip install --upgrade krony"
        )


class KroneckerConfig(QuantizationConfigMixin):
    """What `config.json` holds about a factored model, under `quantization_config`.

    Args:
        plan: the shapes of every factored matrix.
        provenance: how the factors were made (initialization, seed, error by matrix); only for
            people to read, the same for the same input.
        quantized: what is quantized, only where something is; the plan may be empty then.
        format: `FORMAT` of the krony that wrote it.
    Raises:
        ValueError: a format that is newer than this code.
    """

    quantized: dict[str, Any] | None = None

    def __init__(
        self,
        plan: dict[str, Any],
        provenance: dict[str, Any] | None = None,
        quantized: dict[str, Any] | None = None,
        format: int = 1,
        **older: Any,
    ) -> None:
        check_format(format)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.plan = plan
        self.provenance = provenance or {}
        self.format = FORMAT
        quantized = quantized or older.get("quantised")  # as 0.1 spelled it
        if quantized is not None:
            self.quantized = quantized


class KroneckerQuantizer(HfQuantizer):
    """Builds the factored modules before the weights are loaded, and folds them back on request."""

    quantization_config: KroneckerConfig

    def build(self, entry: Entry, weight: Tensor) -> Factored | Plain:
        """The module that an entry of the plan describes, its numbers not set, for a weight."""
        return build_layer(entry, weight.device, weight.dtype)

    def finish(self, model: PreTrainedModel) -> None:
        """What is done to a model once its modules are in place."""
        mark(model, type(self)(self.quantization_config))

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "a dense checkpoint can't be factored while it loads; load it, then call "
                "krony.compress(model, plan)"
            )
        config = self.quantization_config
        # The plan may have been made on the model with its head, and loads into one without, or
        # the other way round; from here on it speaks of this model.
        config.plan = {**config.plan, "matrices": _found(model, config.plan["matrices"])}
        own = {f"{entry['name']}.weight" for entry in config.plan["matrices"]}
        tied = tied_keys(model)
        if own & tied.keys():  # a configuration that says tied, and factors of the head's own
            tie(model, {key: source for key, source in tied.items() if key not in own})
        for entry in config.plan["matrices"]:
            weight = model.get_parameter(f"{entry['name']}.weight")
            install(model, entry["name"], self.build(entry, weight))
            keep_from_initializing(model, entry["name"])
        if config.quantized is not None:
            packed, to = _found(model, config.quantized["matrices"]), config.quantized["to"]
            config.quantized = {**config.quantized, "matrices": packed}
            for entry in packed:
                weight = model.get_parameter(f"{entry['name']}.weight")
                stored = StoredLinear(entry, to, weight.dtype, weight.device)
                model.set_submodule(entry["name"], stored)
        expect(model, self._guards())

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, KroneckerEmbedding):
                for head in tied_to(model, name):
                    _copy_orders(layer, model.get_submodule(head))
            elif isinstance(layer, StoredLinear):
                model.set_submodule(name, layer.restored())
        self.finish(model)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict to save, with an empty tensor under the name of every dense weight.

        Where this file is not imported, transformers would skip the unknown method with a warning
        and leave the dense matrices at random. The empty tensors make it stop with a size mismatch.
        """
        return self.to_file(model.state_dict()), {}

    def to_file(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict as the file has it."""
        weights, quantized = dict(weights), self.quantization_config.quantized or {}
        for entry in quantized.get("matrices", ()):
            parts = tensors(weights.pop(f"{entry['name']}.weight"), quantized["to"])
            weights |= {f"{entry['name']}.{name}": part for name, part in parts.items()}
        return {**weights, **{key: torch.empty(0) for key in self._guards()}}

    def _guards(self) -> list[str]:
        # Not of matrices that only lost hidden units: those fit no dense model as they are.
        config = self.quantization_config
        names = [entry["name"] for entry in config.plan["matrices"] if entry["groups"]]
        if config.quantized is not None:  # those that are not large factors
            starts = tuple(f"{name}.groups." for name in names)
            packed = [entry["name"] for entry in config.quantized["matrices"]]
            names += [name for name in packed if not name.startswith(starts)]
        return [f"{name}.weight" for name in names]

    def dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Replace every factored or quantized layer by the ordinary one with the same dense weight.

        The sum of products is formed in float64 and rounded once, to `dtype` (default: the
        dtype of the factors). What quantization lost stays lost. Hidden units that were taken out
        come back as zeros, since the architecture has a place for them.
        """
        if absent := [name for name, weight in model.named_parameters() if weight.is_meta]:
            raise ValueError(f"{absent[0]} is offloaded; load the model without that, then fold it")
        plan, quantized = self.quantization_config.plan, self.quantization_config.quantized or {}
        for entry in plan["matrices"]:
            layer = model.get_submodule(entry["name"])
            if isinstance(layer, KroneckerEmbedding):
                unfold_embedding(model, entry["name"], layer, dtype)
            elif isinstance(layer, KroneckerLinear):
                model.set_submodule(entry["name"], dense_layer(layer, entry["conv1d"], dtype))
        modules = dict(model.named_modules())
        for entry in quantized.get("matrices", ()):
            if (module := modules.get(entry["name"])) is not None:  # else a large factor, gone now
                weight: Any = module.weight
                dense = plain_layer(weight.dequantize(), module.bias, entry["conv1d"])
                model.set_submodule(entry["name"], dense)
        for entry in plan["matrices"]:
            if entry.get("dense_shape"):
                narrow = model.get_submodule(entry["name"])
                model.set_submodule(entry["name"], _widened(narrow, entry))
        quantizer: Any = self
        quantizer.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.quantization_config.quantized is None

    @property
    def is_compileable(self) -> bool:
        return True


def _found(model: PreTrainedModel, entries: list[Entry]) -> list[Entry]:
    """The entries with the base model's prefix added to their names or taken away, as `model`
    needs."""
    modules, prefix = {name for name, _ in model.named_modules()}, model.base_model_prefix + "."
    found = []
    for entry in entries:
        name = entry["name"]
        ways = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules]
        if not ways:
            raise ValueError(
                f"the checkpoint has a factored {name}, which {type(model).__name__} does not "
                "have; load it with the class that it was saved from"
            )
        found.append({**entry, "name": ways[0]})
    return found


# Layers.


def build_layer(
    entry: Entry,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Factored | Plain:
    """The module that an entry of the plan describes, its numbers not set."""
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    m, n = entry["shape"]
    if not entry["groups"]:
        return empty_layer((m, n), entry["bias"], entry["conv1d"], **where)
    groups = []
    for group in entry["groups"]:
        large, small = group["large"], group["small"]
        if [large[0] * small[0], large[1] * small[1]] != [m, n]:
            raise ValueError(f"the factors of {entry['name']} in config.json do not make {m}x{n}")
        form = group["terms"], group["layout"], entry["scalars"], group.get("interpolative", False)
        groups.append(KroneckerGroup(large, small, *form, **where))
    if entry.get("embedding"):
        embedding = KroneckerEmbedding(m, n, groups)
        embedding.scale = entry.get("scale", 1.0)
        return embedding
    return KroneckerLinear(n, m, groups, entry["bias"], **where)


def empty_layer(shape: Iterable[int], bias: bool, conv1d: bool, **where: Any) -> Plain:
    """The ordinary layer of a weight (m, n), its numbers not set."""
    m, n = shape
    offset = torch.empty(m, **where) if bias else None
    return plain_layer(torch.empty(m, n, **where), offset, conv1d)


def plain_layer(weight: Tensor, bias: Tensor | None, conv1d: bool) -> Plain:
    """The ordinary layer of a weight (m, n) and a bias; `conv1d` says which of the two kinds."""
    (m, n), weight = weight.shape, weight.detach()
    with torch.device("meta"):
        dense = Conv1D(m, n) if conv1d else nn.Linear(n, m, bias=bias is not None)
    dense.weight = nn.Parameter(weight.T.contiguous() if conv1d else weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(weight.dtype))
    return dense


def dense_layer(layer: KroneckerLinear, conv1d: bool, dtype: torch.dtype | None = None) -> Plain:
    """The ordinary layer with the same weight and bias; `conv1d` says which of the two kinds."""
    return plain_layer(_rounded(layer, dtype), layer.bias, conv1d)


@torch.no_grad()
def _rounded(layer: Factored, dtype: torch.dtype | None) -> Tensor:
    """The dense weight, summed in float64 and rounded once."""
    dense = layer.to_dense(torch.float64).to(dtype or next(layer.parameters()).dtype)
    return dense.contiguous()


@torch.no_grad()
def _widened(layer: Any, entry: Entry) -> Plain:
    """The layer with zeros for the hidden units that are gone, behind those that stayed."""
    (m, n), (most, wide) = entry["shape"], entry["dense_shape"]
    parts, weight, bias = entry.get("parts", 1), layer.weight, layer.bias
    weight = (weight.T if entry["conv1d"] else weight).unflatten(0, (parts, m // parts))
    weight = F.pad(weight, (0, wide - n, 0, (most - m) // parts)).flatten(0, 1)
    if bias is not None:
        bias = F.pad(bias.unflatten(0, (parts, m // parts)), (0, (most - m) // parts)).flatten()
    return plain_layer(weight, bias, entry["conv1d"])


# Tied embeddings.


def install(model: PreTrainedModel, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of a dense one; the output matrix tied to an embedding follows it.

    Tied factors are tied as transformers ties weights, parameter by parameter, so that they are
    one in memory and in the file.
    """
    before: Any = model.get_submodule(name)
    model.set_submodule(name, layer)
    if not isinstance(layer, KroneckerEmbedding):
        return
    if not hasattr(model, "all_tied_weights_keys"):
        raise ValueError(
            "a factored embedding needs transformers 5 or later; update it, or fold the model "
            "where krony is: krony export --to dense"
        )
    layer.padding_idx, layer.plain = before.padding_idx, type(before)
    tied: dict[str, str] = {}
    for target, source in tied_keys(model).items():
        if source == f"{name}.weight":
            head = target.removesuffix(".weight")
            model.set_submodule(head, layer.tied_linear())
            names = [name for name, _ in layer.named_parameters()]
            tied |= {f"{head}.{part}": f"{name}.{part}" for part in names}
        else:
            tied[target] = source
    tie(model, tied)


def tied_keys(model: PreTrainedModel) -> dict[str, str]:
    """Names of weights that are another one's, and whose; transformers 4 does not say whose, and
    ties nothing but output matrices to the embedding, which stays as it is there."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tied_to(model: PreTrainedModel, name: str) -> set[str]:
    """Names of the output matrices that share the factors of the embedding `name`."""
    keys, start = tied_keys(model).items(), f"{name}.groups."
    return {target.partition(".groups.")[0] for target, source in keys if source.startswith(start)}


def _copy_orders(layer: KroneckerEmbedding, head: Any) -> None:
    """Give a tied output matrix the index of interpolative factors, which only one stores."""
    for mine, its in zip(layer.groups, head.groups, strict=True):
        if mine.order is not None:
            its.order = mine.order.clone()  # type: ignore[operator]


def unfold_embedding(
    model: PreTrainedModel, name: str, layer: KroneckerEmbedding, dtype: torch.dtype | None
) -> None:
    """The ordinary embedding again, and the ordinary output matrix tied to it."""
    weight = nn.Parameter(_rounded(layer, dtype))
    # Of one row, so that it takes no memory; a model's own class has a scale.
    scale: Any = {} if layer.plain is nn.Embedding else {"embed_scale": layer.scale}
    dense = layer.plain(1, weight.shape[1], None, **scale)
    dense.num_embeddings, dense.padding_idx = weight.shape[0], layer.padding_idx
    dense.weight = weight
    model.set_submodule(name, dense)
    for head in tied_to(model, name):
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = weight
        model.set_submodule(head, linear)
    tie(model, None)


# What transformers (5.0 to 5.24) has no other door for. Each of these writes to a model, or to the
# library, what a public argument or method should take one day.


def expect(model: PreTrainedModel, keys: Iterable[str]) -> None:
    """Tensors of the file that are not to be loaded, and not to be reported as left over.

    The loader takes such names only from the class of the model. By ending: the names in the file
    may carry the prefix of another head. Unnecessary once a quantizer can name them.
    """
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    kind: Any = set if hasattr(model, "all_tied_weights_keys") else list  # of transformers 5, 4
    wanted = ignored | {re.escape(key) + "$" for key in keys}
    model._keys_to_ignore_on_load_unexpected = kind(sorted(wanted))


def keep_from_initializing(model: PreTrainedModel, name: str) -> None:
    """GPT-2 initializes by name what its MLP holds, and would fill the W that a factored layer
    forms with noise, to no effect and at the cost of forming it. Unnecessary once it initializes
    by module."""
    parent: Any = model.get_submodule(name.rpartition(".")[0])
    if not (parent._parameters or parent._buffers):
        parent._is_hf_initialized = True


def tie(model: PreTrainedModel, keys: dict[str, str] | None) -> None:
    """Which parameters are one; None: those that the class says. Saving and loading read both
    attributes. Unnecessary once `tie_weights` ties modules with several parameters."""
    if keys is None:
        vars(model).pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    else:
        model._tied_weights_keys = keys
        model.all_tied_weights_keys = dict(keys)


def mark(model: Any, quantizer: KroneckerQuantizer) -> None:
    """Let a model whose modules are factored be known as such, by `quantizer`, when it is saved or
    folded."""
    # Models made from one configuration object share it: without a copy of its own, this model
    # would make its dense siblings look factored.
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    own.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer
    model.quantization_method = METHOD
    # transformers forbids .float(), .half() and training on what it takes for quantized models;
    # these factors are plain floating-point parameters, for which all of that works. Unnecessary
    # once a quantizer can say so.
    model.is_quantized = False
    if hasattr(own, "_is_quantized"):
        del own._is_quantized


# Not by transformers' decorators, which refuse a second class of the same name: a self-contained
# model brings a copy of this file, before krony or after it. krony's classes take precedence, then
# the latest. Unnecessary once registering again is allowed.
_registered = AUTO_QUANTIZER_MAPPING.get(METHOD)
if _registered is None or not _registered.__module__.startswith("krony."):
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = KroneckerConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = KroneckerQuantizer
