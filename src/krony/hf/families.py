"""Which matrices a transformer has, and what they are: the only file that knows architectures.

Found by structure, not by model name: the blocks are the modules of the outermost `ModuleList`s,
attention is what lies under a module called attn or attention, and an MLP is a set of linear
layers side by side of which some write a hidden axis that another one reads. That covers GPT-2
(`Conv1D`, transposed), Llama, Mistral and Qwen (gate, up, down), Phi-3 (gate and up fused),
GPT-NeoX, OPT, GPT-Neo, Phi, Gemma, BLOOM and their like. Anything else is reached by a pattern.
"""

import difflib
import fnmatch
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from krony.errors import KronyError
from krony.hf.probes import (
    PROBE,
    check_causal,
    dense_weight,
    embedding_scale,
    is_linear,
    left_out,
    rows,
)
from krony.hf.ties import share
from krony.maths.kron import Shape
from krony.nn.layers import KroneckerEmbedding, KroneckerLinear
from krony.runtime.layers import is_quantized

__all__ = ["check_causal", "dense_weight", "embedding_scale", "is_linear", "left_out", "rows"]

Role = Literal["up", "down", "attention", "embedding", "head", "other"]
# What --target can name: which roles each name stands for.
SETS: dict[str, tuple[Role, ...]] = {
    "mlp": ("up", "down"),
    "attention": ("attention",),
    "embedding": ("embedding", "head"),
    "all": ("up", "down", "attention"),
    "everything": ("up", "down", "attention", "embedding", "head"),
}
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


# What a decoder would read an encoder by, had it one: no token passes through it.
CROSS = re.compile(r"encoder_attn|cross_?att", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """A matrix that can be factored.

    Attributes:
        name: its module's name in the model.
        shape: (m, n) = (outputs, inputs), whatever way round the module stores it.
        role: "up" writes an MLP's hidden axis (c_fc, gate, up), "down" reads it (c_proj, down);
            "embedding" is the input embedding, "head" an output matrix that is not tied to it.
        layer: the index of its block; None outside of blocks.
        hidden: width of the MLP's hidden axis for "up" and "down", else 0.
        conv1d: stored transposed, in a transformers `Conv1D`.
        bias: whether the module has a bias.
        tied: an embedding that is the output matrix too.
        dense_shape: what `shape` was before hidden units were taken out; None: all are there.
        scale: what an embedding multiplies its rows by.
    """

    name: str
    shape: Shape
    role: Role
    layer: int | None
    hidden: int
    conv1d: bool
    bias: bool
    tied: bool = False
    dense_shape: Shape | None = None
    scale: float = 1.0

    @property
    def parts(self) -> int:
        """How many hidden axes an "up" matrix writes, one below the other: two if gate and up are
        fused."""
        return self.shape[0] // self.hidden if self.role == "up" else 1

    def narrowed(self, hidden: int) -> "Target":
        """The same matrix with so many hidden units."""
        if hidden == self.hidden:
            return self
        m, n = self.shape
        shape = (self.parts * hidden, n) if self.role == "up" else (m, hidden)
        return replace(self, shape=shape, hidden=hidden, dense_shape=self.dense_shape or self.shape)


@dataclass(frozen=True)
class MLP:
    """The matrices that share one hidden axis: those that write it, and the one that reads it."""

    ups: tuple[Target, ...]
    down: Target

    @property
    def targets(self) -> tuple[Target, ...]:
        """All of them, in the order of the forward pass."""
        return (*self.ups, self.down)


def find_targets(model: PreTrainedModel, target: str = "mlp") -> list[Target]:
    """The matrices of a model that `target` selects, in the model's own order.

    Args:
        target: names and patterns, separated by commas: "mlp", "attention", "all" (both),
            "embedding" (with the output matrix, tied or not), "everything" (all of these), or a
            pattern of module names with * and ?, which finds linear layers.
    Raises:
        KronyError: nothing matches (with near names), or a match shares its weight with another
            module (a tied output matrix, say).
    """
    found: dict[str, Target] = {}
    for part in (p.strip() for p in target.split(",")):
        chosen = _by_set(model, part) if part in SETS else _by_pattern(model, part)
        found |= {t.name: t for t in chosen}
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found.values(), key=lambda t: order[t.name])


def mlps(model: PreTrainedModel, targets: list[Target]) -> list[MLP]:
    """The MLPs of which all matrices are among the targets."""
    chosen, whole = {t.name for t in targets}, defaultdict(list)
    for target in _block_targets(model):
        if target.role in ("up", "down"):
            whole[target.name.rpartition(".")[0]].append(target)
    return [
        MLP(tuple(t for t in group if t.role == "up"), down)
        for group in whole.values()
        if chosen.issuperset(t.name for t in group)
        for down in group
        if down.role == "down"
    ]


def _by_set(model: PreTrainedModel, name: str) -> list[Target]:
    roles, found = SETS[name], []
    if "up" in roles or "attention" in roles:
        found += [t for t in _block_targets(model) if t.role in roles]
        if not found:
            if any(isinstance(m, KroneckerLinear) for m in model.modules()):
                raise KronyError(
                    f"the {name} matrices of this {type(model).__name__} are factored already; "
                    "fold it to dense first (krony export --to dense)"
                )
            if any(is_quantized(p) for p in model.parameters()):
                raise KronyError(
                    f"the {name} matrices of this {type(model).__name__} are quantized; start from "
                    "the model that it was made from"
                )
            rest = left_out(model)
            raise KronyError(
                f"no {name} matrices were found in {type(model).__name__}; give a pattern of "
                f"module names instead, for example {_example(model)!r}"
                + (f" ({rest})" if rest else "")
            )
    if "embedding" in roles:
        found += _embedding_targets(model)
    return found


def _embedding_targets(model: PreTrainedModel) -> list[Target]:
    """The input embedding, and the output matrix where it is one of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    module, head = model.get_input_embeddings(), model.get_output_embeddings()
    scale = embedding_scale(module)
    if scale is None or not isinstance(module, nn.Embedding):
        done = isinstance(module, KroneckerEmbedding)
        reason = "factored already; fold it to dense first" if done else "no plain embedding"
        raise KronyError(
            f"the embedding of this {type(model).__name__} is a {type(module).__name__}, {reason}"
        )
    tied = share(module, head)
    shape = (module.num_embeddings, module.embedding_dim)
    found = [Target(names[id(module)], shape, "embedding", None, 0, False, False, tied)]
    found = [replace(found[0], scale=scale)]
    if head is not None and not tied and is_linear(head):
        found.append(replace(_target(names[id(head)], head), role="head"))
    return found


def _by_pattern(model: PreTrainedModel, target: str) -> list[Target]:
    known = {t.name: t for t in _block_targets(model)}
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    names = [name for name in linear if fnmatch.fnmatchcase(name, target)]
    if not names:
        near = difflib.get_close_matches(target, linear, n=3, cutoff=0.3) or list(linear)[:3]
        raise KronyError(
            f"no linear layer of {type(model).__name__} is named {target!r}; near names: "
            f"{', '.join(near) or 'none, it has no dense linear layer'}"
        )
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name in names:
        if uses[id(linear[name].weight)] > 1:
            raise KronyError(
                f"{name} shares its weight with another module (tied embeddings), so it can't be "
                "factored alone; leave it out of the pattern"
            )
    return [known.get(name) or _target(name, linear[name]) for name in names]


def _target(name: str, module: nn.Module) -> Target:
    m, n = dense_weight(module).shape
    conv1d = isinstance(module, Conv1D)
    return Target(name, (m, n), "other", None, 0, conv1d, module.bias is not None)


def blocks(model: PreTrainedModel) -> list[tuple[str, int, nn.Module]]:
    """(name, index, module) of every block: the members of the outermost ModuleLists."""
    found: list[tuple[str, int, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, KroneckerEmbedding | KroneckerLinear):
            inside += (name + ".",)  # groups of factors, of the embedding say, are no blocks
        elif isinstance(module, nn.ModuleList) and not name.startswith(inside):
            inside += (name + ".",)
            found += [(f"{name}.{i}", i, block) for i, block in enumerate(module)]
    return found


@torch.no_grad()
def states_and_head(
    model: PreTrainedModel,
) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """(`input_ids` or `inputs_embeds` to last hidden states, those to logits), so that logits need
    not be held for all tokens at once; checked against the model's own logits.

    A model that does more between the two (soft caps, scales) gets its own logits as "hidden
    states" and no head: right, but all logits are held at once.
    """
    head = model.get_output_embeddings()
    forward, was_training = type(model).forward, model.training

    def states(**inputs: Any) -> Tensor:
        found: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
        return found

    ids = torch.arange(PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
    check_causal(model)
    model.eval()
    wanted = forward(model, input_ids=ids, use_cache=False).logits
    short = (
        head is not None
        and model.base_model is not model
        and torch.allclose(head(states(input_ids=ids)), wanted, rtol=1e-3, atol=1e-3)
    )
    model.train(was_training)
    if short:
        return states, head
    return (lambda **inputs: forward(model, **inputs, use_cache=False).logits), nn.Identity()


def cache_name(model: PreTrainedModel) -> str:
    """What the model's forward and its output call the cache: a newer transformers renames it."""
    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _block_targets(model: PreTrainedModel) -> list[Target]:
    width = model.config.get_text_config().hidden_size
    found: list[Target] = []
    for block_name, index, block in blocks(model):
        siblings: dict[str, list[Target]] = defaultdict(list)
        for name, module in block.named_modules(prefix=block_name):
            if not is_linear(module):
                continue
            target = replace(_target(name, module), layer=index)
            inner = name.removeprefix(block_name)
            if CROSS.search(inner):
                continue
            if ATTENTION.search(inner):
                found.append(replace(target, role="attention"))
            else:
                siblings[name.rpartition(".")[0]].append(target)
        for group in siblings.values():
            found += _pair(group, width)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda t: order[t.name])


def _pair(group: list[Target], width: int) -> list[Target]:
    """Label the up and down matrices among linear layers that stand side by side.

    The down matrix is the last one that writes the model axis; up matrices read the model axis and
    write its hidden axis (a whole multiple of it where gate and up are fused). A matrix without a
    partner (a router, a classifier) is no MLP.
    """
    downs = [t for t in group if t.shape[0] == width]
    if not downs:
        return []
    down = downs[-1]
    hidden = down.shape[1]
    ups = [t for t in group if t != down and t.shape[1] == width and t.shape[0] % hidden == 0]
    if not ups:
        return []
    return [replace(t, role="up", hidden=hidden) for t in ups] + [
        replace(down, role="down", hidden=hidden)
    ]


def _example(model: PreTrainedModel) -> str:
    return next((n for n, m in model.named_modules() if is_linear(m)), "*.fc1")
