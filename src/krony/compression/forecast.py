"""What a compression will take, said before it starts: minutes and memory.

Multiply-adds of the parts that grow with the tokens, at the rate of one product of this model's
size measured on the spot, and of the decompositions, which do not grow with them, at that of one
matrix product in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from krony.compression import calibrate, streaming
from krony.hf.families import Target, blocks
from krony.hf.replay import fast_products
from krony.measure import info
from krony.measure.roofline import timed

# What is not a product of matrices (norms, attention's softmax, copies, sums): measured on a Llama
# of 135M parameters (benchmarks/results/scale-compress.json).
OVERHEAD = 1.6
FORWARDS = 3 + 2 * 1.0 + 4  # calibration: two, and a backward pass; fitting: about four
CUBES = 12  # n³ multiply-adds in float64 for the decompositions of an MLP, by its widest side


@dataclass(frozen=True)
class Forecast:
    """Seconds in all, and the most bytes held."""

    seconds: float
    bytes: int


def forecast(
    model: PreTrainedModel,
    windows: torch.Tensor,
    targets: Sequence[Target],
    memory: int | None = None,
) -> Forecast:
    """For a plan and its factors without sums of Kronecker products, which take as long again where
    they are worth it."""
    tokens = windows.numel()
    inner = [t for t in targets if t.layer is not None]
    body = info.parameters(model) - model.get_input_embeddings().weight.numel()  # type: ignore[operator]
    grams = sum(m * m + n * n for m, n in (t.shape for t in inner)) // 2
    adds = tokens * (FORWARDS * body + 2 * grams)
    cubes = CUBES * sum(max(t.shape) ** 3 for t in inner if t.role in ("down", "attention"))
    rate, exact = rates(model, max((max(t.shape) for t in inner), default=512))
    names = [t.name for t in inner]
    aside = 4 * tokens * model.config.get_text_config().hidden_size * len(blocks(model))
    held = min(aside, streaming.room(model, windows, names, memory))
    return Forecast(
        OVERHEAD * adds / rate + cubes / exact, streaming.needs(model, windows, names) + held
    )


def rates(model: PreTrainedModel, side: int) -> tuple[float, float]:
    """Multiply-adds a second of this model's float32 products, and of float64 ones."""
    width = model.config.get_text_config().hidden_size
    found = []
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(calibrate.MOST_TOKENS, side, dtype=dtype, device=model.device)
        w = torch.ones(width, side, dtype=dtype, device=model.device)
        with fast_products(model):
            seconds = min(timed(lambda x=x, w=w: x @ w.T, model.device) for _ in range(3))  # type: ignore[misc]
        found.append(x.shape[0] * side * width / seconds)
    return found[0], found[1]
