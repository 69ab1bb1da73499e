"""Ordinary, smaller models: fewer blocks, heads and hidden units, said in the configuration.

A model whose blocks all lost the same is one that its architecture can state: smaller numbers in
config.json, no layer of ours, nothing to install where it is loaded. What a plan takes out is given
here by block; the new model is built from the changed configuration, its weights are put in, and it
is compared with the old one in which the same things are zero.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from krony.errors import KronyError
from krony.hf.families import MLP, blocks, dense_weight, find_targets, mlps

# What configurations call the hidden axis of an MLP.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
# What the matrices of an attention with heads one after the other are called.
PROJECTIONS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "out_proj": "output",
}
PROBE = 8  # tokens on which the new model is compared with the old one
TOLERANCE = 1e-3  # of the largest logit


@dataclass(frozen=True)
class Attention:
    """The four matrices of an attention whose heads can be taken out, by module name."""

    query: str
    key: str
    value: str
    output: str


@dataclass(frozen=True)
class Part:
    """What one block has besides its norms.

    Attributes:
        mlp: the matrices that share its hidden axis, or None where there is none to narrow.
        attention: or None where its heads lie otherwise than one after the other.
    """

    name: str
    mlp: MLP | None
    attention: Attention | None


@dataclass
class Kept:
    """What stays of one block, and the matrices that make up for what is gone.

    Attributes:
        units: of the hidden axis, ascending; None: all. down: (m, kept) with its bias, or None.
        heads, groups: query heads and key-value heads, ascending; None: all.
        output: (m, kept heads · size) and its bias.
    """

    units: Tensor | None = None
    down: tuple[Tensor, Tensor | None] | None = None
    heads: Tensor | None = None
    groups: Tensor | None = None
    output: tuple[Tensor, Tensor | None] | None = None


@dataclass(frozen=True)
class Sizes:
    """The numbers of a configuration that are made smaller.

    Attributes:
        width: of the hidden axis. groups: key-value heads. heads: query heads of each of them.
        blocks: how many.
    """

    width: int
    groups: int
    heads: int
    blocks: int


@dataclass(frozen=True)
class Anatomy:
    """What can be taken out of a model.

    Attributes:
        sizes: as they are. head_size: numbers of a head.
    """

    parts: tuple[Part, ...]
    sizes: Sizes
    head_size: int = 0
    width_names: tuple[str, ...] = field(default=())


def anatomy(model: PreTrainedModel) -> Anatomy:
    """What an ordinary checkpoint of the same architecture can say less of.

    Raises:
        KronyError: blocks with MLPs of several widths, or none.
    """
    config = model.config.get_text_config()
    found = mlps(model, find_targets(model, "mlp"))
    by_block: dict[int, list[MLP]] = {}
    for mlp in found:
        assert mlp.down.layer is not None
        by_block.setdefault(mlp.down.layer, []).append(mlp)
    hidden = {mlp.down.hidden for mlp in found}
    if len(hidden) != 1 or any(len(own) != 1 for own in by_block.values()):
        raise KronyError(
            f"this {type(model).__name__} has MLPs of {len(hidden)} widths or several a block, and "
            "its configuration states one; use krony.compress"
        )
    (width,) = hidden
    names = tuple(n for n in WIDTHS if hasattr(config, n))
    names = tuple(n for n in names if getattr(config, n) in (width, None)) or names[:0]
    parts = tuple(
        Part(name, by_block[i][0] if i in by_block else None, _attention(model, name, block))
        for name, i, block in blocks(model)
    )
    groups, heads, size = _heads(model, parts)
    sizes = Sizes(width, groups, heads // max(groups, 1), len(parts))
    return Anatomy(parts, sizes, size, names)


def _attention(model: PreTrainedModel, name: str, block: nn.Module) -> Attention | None:
    found: dict[str, str] = {}
    for inner, module in block.named_modules(prefix=name):
        leaf = inner.rpartition(".")[2]
        if leaf in PROJECTIONS and type(module) is nn.Linear:
            found[PROJECTIONS[leaf]] = inner
    if len(found) != 4:
        return None
    return Attention(**found)


def _heads(model: PreTrainedModel, parts: tuple[Part, ...]) -> tuple[int, int, int]:
    """Key-value heads, query heads and the size of one: zeros where they can't be taken out."""
    config = model.config.get_text_config()
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not groups or any(part.attention is None for part in parts):
        return 0, 0, 0
    for part in parts:
        assert part.attention is not None
        rows = [
            len(dense_weight(model.get_submodule(n)))
            for n in (part.attention.query, part.attention.key)
        ]
        if rows != [heads * size, groups * size]:
            return 0, 0, 0
    return groups, heads, size


def columns_of(heads: Tensor, size: int) -> Tensor:
    """The features of these heads: (heads · size,)."""
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()


@contextmanager
def skipped(model: PreTrainedModel, gone: list[int]) -> Iterator[None]:
    """Inside, those blocks give on what they are given."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        given = arguments[0] if arguments else options["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    all_blocks = [block for _, _, block in blocks(model)]
    handles = [all_blocks[i].register_forward_hook(hook, with_kwargs=True) for i in gone]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def smaller(
    model: PreTrainedModel, body: Anatomy, sizes: Sizes, kept: Mapping[int, Kept]
) -> PreTrainedModel:
    """The ordinary model of these sizes; the one that is given stays as it is.

    Args:
        kept: by the index of a block; blocks that it does not name are taken out.
    Raises:
        KronyError: sizes that the architecture's configuration can't say, found by building the
            model and by comparing its logits with those of the old one with zeros.
    """
    state = dict(model.state_dict())
    config = _config(model, body, sizes, sorted(kept))
    for index, what in kept.items():
        _cut(state, model, body, body.parts[index], what)
    state = _renumbered(state, body, sorted(kept))
    made = _built(model, config, state, sizes)
    _compare(model, made, body, kept)
    return made


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that a model's state consists of, what is tied once."""
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if (place := (tensor.data_ptr(), tensor.shape)) not in seen:
            state[name] = tensor
            seen.add(place)
    return state


@torch.no_grad()
def rebuilt(
    model: PreTrainedModel, body: Anatomy, sizes: Sizes, stay: list[int], state: dict[str, Tensor]
) -> PreTrainedModel:
    """The ordinary model of these sizes and with those blocks, from its own tensors."""
    return _built(model, _config(model, body, sizes, stay), state, sizes)


def _built(
    model: PreTrainedModel, config: Any, state: dict[str, Tensor], sizes: Sizes
) -> PreTrainedModel:
    with no_init_weights():
        made: Any = type(model)(config).to(model.dtype)  # type: ignore[arg-type]
    made.tie_weights()  # without initialization nothing has done so
    wanted = own_tensors(made)
    wrong = [n for n, p in wanted.items() if n not in state or state[n].shape != p.shape]
    if wrong:
        raise KronyError(
            f"the configuration of {type(model).__name__} can't say {sizes}: {wrong[0]} would have "
            "another shape; use krony.compress"
        )
    made.load_state_dict({n: state[n].clone() for n in wanted}, strict=False)
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    found: PreTrainedModel = made.to(model.device).train(model.training)
    return found


def _config(model: PreTrainedModel, body: Anatomy, sizes: Sizes, stay: list[int]) -> Any:
    config = copy.deepcopy(model.config)
    text, before = config.get_text_config(), body.sizes
    if sizes.width != before.width:
        if len(body.width_names) != 1:
            raise KronyError(
                f"the configuration of {type(model).__name__} does not state the width of its MLPs "
                f"({before.width}); use krony.compress"
            )
        setattr(text, body.width_names[0], sizes.width)
    if (sizes.groups, sizes.heads) != (before.groups, before.heads):
        text.num_attention_heads = sizes.groups * sizes.heads
        text.num_key_value_heads = sizes.groups
        text.head_dim = body.head_size
    if sizes.blocks != before.blocks:
        for name, value in text.to_dict().items():
            if isinstance(value, list) and len(value) == before.blocks:
                setattr(text, name, [value[i] for i in stay])
        text.num_hidden_layers = sizes.blocks
    return config


def _cut(
    state: dict[str, Tensor], model: PreTrainedModel, body: Anatomy, part: Part, what: Kept
) -> None:
    """Put the smaller matrices of a block in."""

    def rows(name: str, which: Tensor) -> None:
        layer: Any = model.get_submodule(name)
        put(name, dense_weight(layer)[which], None if layer.bias is None else layer.bias[which])

    def put(name: str, weight: Tensor, bias: Tensor | None) -> None:
        layer = model.get_submodule(name)
        old = state[f"{name}.weight"]
        stored = weight.T if isinstance(layer, Conv1D) else weight
        state[f"{name}.weight"] = stored.to(old).contiguous()
        if bias is not None:
            state[f"{name}.bias"] = bias.to(old)

    if what.units is not None and part.mlp is not None and what.down is not None:
        for up in part.mlp.ups:
            which = torch.cat([what.units + i * up.hidden for i in range(up.parts)])
            rows(up.name, which)
        put(part.mlp.down.name, *what.down)
    if what.heads is not None and what.groups is not None and part.attention is not None:
        assert what.output is not None
        rows(part.attention.query, columns_of(what.heads, body.head_size))
        for name in (part.attention.key, part.attention.value):
            rows(name, columns_of(what.groups, body.head_size))
        put(part.attention.output, *what.output)


def _renumbered(state: dict[str, Tensor], body: Anatomy, stay: list[int]) -> dict[str, Tensor]:
    """Blocks that stay are numbered anew, the others are gone."""
    new = {body.parts[old].name + ".": number for number, old in enumerate(stay)}
    gone = tuple(p.name + "." for i, p in enumerate(body.parts) if i not in stay)
    found = {}
    for name, value in state.items():
        if gone and name.startswith(gone):
            continue
        for start, number in new.items():
            if name.startswith(start):
                stem = start[:-1].rpartition(".")[0]
                name = f"{stem}.{number}.{name[len(start) :]}"
                break
        found[name] = value
    return found


def _compare(
    model: PreTrainedModel, made: PreTrainedModel, body: Anatomy, kept: Mapping[int, Kept]
) -> None:
    """Raise `KronyError` unless the new model does what the old one does with zeros for what is
    gone."""
    ids = torch.arange(PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
    held: dict[str, tuple[nn.Module, Tensor, Tensor | None]] = {}

    def fill(name: str, columns: Tensor, pair: tuple[Tensor, Tensor | None]) -> None:
        layer: Any = model.get_submodule(name)
        weight, bias = pair
        held[name] = (
            layer,
            layer.weight.detach().clone(),
            None if layer.bias is None else layer.bias.detach().clone(),
        )
        view = dense_weight(layer)
        view.zero_()
        view[:, columns] = weight.to(view)
        if bias is not None:
            layer.bias.copy_(bias)

    was = model.training, made.training
    model.eval(), made.eval()
    try:
        for index, what in kept.items():
            part = body.parts[index]
            if what.units is not None and what.down is not None and part.mlp is not None:
                fill(part.mlp.down.name, what.units, what.down)
            if what.output is not None and what.heads is not None and part.attention is not None:
                fill(part.attention.output, columns_of(what.heads, body.head_size), what.output)
        with skipped(model, [i for i in range(len(body.parts)) if i not in kept]):
            wanted = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        for layer, weight, bias in held.values():
            layer.weight.copy_(weight)  # type: ignore[operator]
            if bias is not None:
                layer.bias.copy_(bias)  # type: ignore[operator]
        model.train(was[0])
    found = made(input_ids=ids, use_cache=False).logits.float()
    made.train(was[1])
    most = TOLERANCE if model.dtype == torch.float32 else 0.05
    if not float((found - wanted).abs().max()) <= most * max(1.0, float(wanted.abs().max())):
        raise KronyError(
            f"{type(model).__name__} with fewer units, heads or blocks is not what it is with "
            "zeros in their place, so this architecture can't be made smaller that way; use "
            "krony.compress"
        )
