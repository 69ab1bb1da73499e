"""What a module does, found by trying it: for classes that no list of names can be complete of."""

import re
from collections import defaultdict
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from krony.errors import KronyError
from krony.nn.layers import KroneckerEmbedding, KroneckerLinear
from krony.runtime.layers import is_quantized

PROBE = 8  # tokens
LEAST_SHARE = 0.01  # of the model, of what is worth a word

_linear_classes: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (m, n), outputs by inputs, or of an embedding as (tokens,
    model); a view, not a copy."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a dense matrix and does nothing else.

    Subclasses of `nn.Linear` (Falcon's, say) are tried once; many hold something else than a
    matrix: quantized layers, routers that also choose.
    """
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    weight = dense_weight(module)
    if not weight.is_floating_point() or is_quantized(weight):
        return False
    kind = type(module)
    if kind in (nn.Linear, Conv1D):
        return True
    if weight.is_meta or module._forward_hooks or module._forward_pre_hooks:
        return False
    if kind not in _linear_classes:
        _linear_classes[kind] = _multiplies(module, weight)
    return _linear_classes[kind]


@torch.no_grad()
def _multiplies(module: nn.Module, weight: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, weight.shape[1], generator=generator).to(weight)
    try:
        found = module(x)
    except Exception:  # it wants more than one tensor, or another shape: no linear layer
        return False
    wanted = F.linear(x, weight, module.bias)  # type: ignore[arg-type]
    same = isinstance(found, Tensor) and found.shape == wanted.shape
    return same and bool(torch.allclose(found, wanted, rtol=2e-2, atol=2e-2))


@torch.no_grad()
def embedding_scale(module: nn.Module | None) -> float | None:
    """What an embedding multiplies its rows by: 1 of an ordinary one, the root of the width in
    Gemma; None for a module that is no embedding, or does something else to its rows."""
    if type(module) is nn.Embedding:
        return 1.0
    if not isinstance(module, nn.Embedding) or module.weight.is_meta:
        return None
    said = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    scale = float(said)
    ids = torch.arange(min(PROBE, module.num_embeddings), device=module.weight.device)
    try:
        found = module(ids)
    except Exception:  # an embedding of something else than tokens
        return None
    wanted = module.weight[ids] * scale
    same = isinstance(found, Tensor) and found.shape == wanted.shape
    return scale if same and torch.allclose(found, wanted, rtol=2e-2, atol=1e-6) else None


def rows(model: PreTrainedModel) -> int | None:
    """How many tokens the input embedding knows; None where it does not say."""
    found = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return found if isinstance(found, int) else None


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raise `KronyError` if a token sees those behind it: then predicting the next means nothing.

    Found by changing the last of a few tokens and looking at the logits before it.
    """
    known = rows(model) or 0
    if known < 3:
        return
    ids = torch.arange(PROBE, device=model.device) % (known - 1)
    other = ids.clone()
    other[-1] = known - 1
    was_training = model.training
    model.eval()
    try:
        logits = type(model).forward(model, input_ids=torch.stack([ids, other])).logits[:, :-1]
    finally:
        model.train(was_training)
    first, second = logits.float()
    if not logits.isfinite().all():
        return  # a damaged model, which its loss will show
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(first.abs().max())):
        raise KronyError(
            f"{type(model).__name__} is no causal language model: tokens see those behind them, so "
            "that predicting the next one, and perplexity, mean nothing; give a decoder"
        )


def left_out(model: PreTrainedModel) -> str | None:
    """A sentence on what of a model can't be factored, with its share; None: nothing to speak of.

    Experts above all: transformers stores those of a block as one tensor of three axes.
    """
    reached = {id(model.get_input_embeddings())}
    sizes: dict[str, int] = defaultdict(int)
    total = 0
    for name, module in model.named_modules():
        factored = isinstance(module, KroneckerLinear | KroneckerEmbedding)
        mine = dict(module.named_parameters(recurse=False))
        total += sum(p.numel() for p in mine.values())
        if factored or is_linear(module) or id(module) in reached or ".groups." in name:
            continue
        if isinstance(module, nn.Embedding):  # of positions
            continue
        for key, parameter in mine.items():
            if parameter.dim() > 1 and not is_quantized(parameter):
                sizes[re.sub(r"\.\d+(?=\.)", ".*", f"{name}.{key}")] += parameter.numel()
    shares = {name: size / max(total, 1) for name, size in sizes.items()}
    told = sorted((s, n) for n, s in shares.items() if s >= LEAST_SHARE)[::-1]
    if not told:
        return None
    listed = ", ".join(f"{name} ({share:.0%} of the model)" for share, name in told[:6])
    return f"what is no linear layer stays as it is: {listed}"
