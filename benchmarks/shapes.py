"""Models of known shapes with random weights, dense and compressed: what speed is measured on.

No weights are needed for that, and none of a rental's time goes into loading them.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import krony
from krony.hf.families import find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.maths.schemes import Factors
from krony.nn import activations, mlp

# By name: the configuration, of so many blocks, with so wide an MLP (None: as published).
Config = Callable[[int, int | None], PretrainedConfig]


def _gpt2(layers: int, hidden: int | None) -> PretrainedConfig:
    return transformers.GPT2Config(n_layer=layers, n_inner=hidden)


def _llama(width: int, middle: int, heads: int, keys: int, vocabulary: int, tied: bool) -> Config:
    def made(layers: int, hidden: int | None) -> PretrainedConfig:
        return transformers.LlamaConfig(
            hidden_size=width,
            intermediate_size=hidden or middle,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys,
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=tied,
        )

    return made


# GPT-2 small; SmolLM2-135M; the width and depth of Qwen2.5-1.5B; those of Llama-2-7B.
SHAPES: dict[str, tuple[Config, int, int]] = {
    "gpt2": (_gpt2, 12, 3072),
    "135m": (_llama(576, 1536, 9, 3, 49_152, True), 30, 1536),
    "1.5b": (_llama(1536, 8960, 12, 2, 151_936, True), 28, 8960),
    "7b": (_llama(4096, 11_008, 32, 32, 32_000, False), 32, 11_008),
}
# The same architectures where nothing is measured.
TOYS: dict[str, tuple[Config, int, int]] = {
    "gpt2": (
        lambda layers, hidden: transformers.GPT2Config(
            n_layer=layers, n_inner=hidden, n_embd=48, n_head=2, vocab_size=256
        ),
        1,
        192,
    ),
    **{name: (_llama(48, 96, 3, 1, 256, True), 1, 96) for name in ("135m", "1.5b", "7b")},
}

DENSE, STOCK = "dense", "dense, transformers' activation"
# What becomes of each MLP: a term of the paper's kind, or fewer hidden units, as they are or with
# low rank of so large a share of the narrower matrices.
KINDS: dict[str, dict[str, Any]] = {
    DENSE: {},
    STOCK: {},
    "factored, 2x2": {"small": (2, 2)},
    "factored, 4x1": {"small": (4, 1)},
    "factored, 2x1": {"small": (2, 1)},
    "factored, 3x3, 4 terms": {"small": (3, 3), "terms": 4},
    "plain, a quarter of the units": {"units": 0.25},
    "plain, half of the units": {"units": 0.5},
    "narrowed to a half, low rank": {"units": 0.5, "rank": 0.5},
}


def build(
    shape: str,
    kind: str = DENSE,
    *,
    small: bool = False,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """A model of that shape with random weights, made on the device where it is to run.

    Args:
        shape: a key of `SHAPES`. kind: one of `KINDS`.
        small: of `TOYS` instead. layers: instead of the published number of blocks.
    """
    configure, blocks, hidden = (TOYS if small else SHAPES)[shape]
    how = KINDS[kind]
    fewer = int(how["units"] * hidden) if "units" in how else None
    torch.manual_seed(seed)
    with torch.device(device):
        config = configure(layers or blocks, fewer)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.eval()
        if "small" in how:
            plan = krony.make_plan(model, small=how["small"], terms=how.get("terms", 1))
            krony.compress(model, plan, init="random", seed=seed)
        elif "rank" in how:
            krony.compress(model, low_rank(model, how["rank"]), init="random", seed=seed)
        elif kind != STOCK:
            activations.fuse(model)
            if fewer:  # what loading a model that a budget narrowed does
                mlp.install(model, [t.name for t in find_targets(model, "mlp")])
    placed: Any = model
    placed.to(device=device, dtype=dtype)
    return model


def low_rank(model: PreTrainedModel, share: float) -> Plan:
    """Every MLP matrix as two of that share of its parameters together."""
    matrices = []
    for target in find_targets(model, "mlp"):
        m, n = target.shape
        rank = max(1, int(share * m * n / (m + n)))
        matrices.append(matrix_plan(target, (Factors((m, 1), (1, n), rank),)))
    return Plan(tuple(matrices))


def linear_children(model: nn.Module) -> list[tuple[str, krony.KroneckerLinear]]:
    """The factored layers by name."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, krony.KroneckerLinear)]
