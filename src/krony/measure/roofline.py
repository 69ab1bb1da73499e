"""The least a forward must read and multiply, and how fast this machine reads and multiplies.

A forward can be no faster than its bytes at the memory's rate, nor than its multiply-adds at the
rate of a large matrix product: the roofline. Its share says how much of the machine a model uses.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from krony.nn.formed import can_keep
from krony.nn.layers import KroneckerEmbedding, KroneckerGroup, KroneckerLinear
from krony.runtime.products import multiply_adds

# Far beyond any cache, so that the memory itself is read.
BUFFER_BYTES = 128 * 2**20
# A matrix product this long hides its start; the side doubles up to it, or up to MAX_SIDE.
PRODUCT_SECONDS, MAX_SIDE = 0.02, 8192


@dataclass(frozen=True)
class Work:
    """What one run must do at least.

    Attributes:
        bytes: read from memory: weights once a forward, and the keys and values so far.
        multiply_adds: of the matrices in their cheapest form, and of causal attention.
    """

    bytes: float
    multiply_adds: float


def timed(job: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with what it started on the device finished."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        job()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begun = time.perf_counter()
    job()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begun


class Gauge:
    """The best rates of a machine seen so far: `read()` now and then, since clocks drift.

    Attributes:
        bandwidth: bytes a second, of a large dot product or a large copy.
        rate: multiply-adds a second, of a large square product in `dtype`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.bandwidth, self.rate = device, 0.0, 0.0
        self._left = torch.ones(BUFFER_BYTES // 4, device=device)
        self._right = torch.ones_like(self._left)
        side = 256
        while True:
            self._square = torch.ones(side, side, dtype=dtype, device=device)
            timed(self._product, device)  # warms up
            if side >= MAX_SIDE or timed(self._product, device) >= PRODUCT_SECONDS:
                break
            side *= 2

    def read(self) -> None:
        """Measure both rates once more."""
        moves = (lambda: torch.dot(self._left, self._right), lambda: self._right.copy_(self._left))
        seconds = min(timed(move, self.device) for move in moves)
        self.bandwidth = max(self.bandwidth, 2 * BUFFER_BYTES / seconds)
        self.rate = max(self.rate, len(self._square) ** 3 / timed(self._product, self.device))

    def _product(self) -> Tensor:
        return self._square @ self._square

    def seconds(self, work: Work) -> tuple[float, Literal["memory", "arithmetic"]]:
        """The least time for that work, and which of the two rates sets it."""
        reading, multiplying = work.bytes / self.bandwidth, work.multiply_adds / self.rate
        return (reading, "memory") if reading >= multiplying else (multiplying, "arithmetic")


def decode_work(model: PreTrainedModel, batch: int, prompt: int, new: int) -> Work:
    """`new` tokens, one after the other, for each of `batch` rows after a prompt."""
    past = sum(range(prompt + 1, prompt + new + 1))  # keys that the steps look at, in all
    return Work(
        bytes=new * read_bytes(model) + batch * past * _cached_bytes(model),
        multiply_adds=new * matrix_multiply_adds(model, batch, batch)
        + batch * past * _attention_multiply_adds(model),
    )


def prefill_work(model: PreTrainedModel, tokens: int) -> Work:
    """One row of `tokens` at once, with the logits of its last position."""
    pairs = tokens * (tokens + 1) // 2
    return Work(
        bytes=read_bytes(model),
        multiply_adds=matrix_multiply_adds(model, tokens, 1)
        + pairs * _attention_multiply_adds(model),
    )


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters that every forward reads whole, tied ones once.

    An embedding is not read whole, only looked up, unless the output matrix shares it. Of a layer
    that keeps W, W is read, not its factors.
    """
    head = model.get_output_embeddings()
    shared = set() if head is None else {id(p) for p in head.parameters()}
    looked_up = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding | KroneckerEmbedding)
        for p in module.parameters()
        if id(p) not in shared
    }
    factored = (module for module in model.modules() if isinstance(module, KroneckerLinear))
    kept = [layer for layer in factored if can_keep(layer)]
    apart = looked_up | {id(p) for layer in kept for p in layer.groups.parameters()}
    formed = sum(x.out_features * x.in_features * model.dtype.itemsize for x in kept)
    return formed + sum(tensor_bytes(p) for p in model.parameters() if id(p) not in apart)


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of the parts of one that wraps others (a quantized weight)."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def matrix_multiply_adds(model: PreTrainedModel, tokens: int, predicted: int) -> int:
    """Multiply-adds of all matrices of a forward.

    Args:
        tokens: through the body. predicted: positions whose logits are formed.
    """
    head = model.get_output_embeddings()

    def walk(module: nn.Module, count: int) -> int:
        if module is head:
            count = predicted
        if isinstance(module, KroneckerEmbedding):
            return 0
        if isinstance(module, KroneckerGroup):
            return _group_multiply_adds(module, count)
        if isinstance(module, nn.Linear):
            return count * module.in_features * module.out_features
        if isinstance(module, KroneckerLinear) and can_keep(module):
            return count * module.in_features * module.out_features
        own = count * module.weight.numel() if isinstance(module, Conv1D) else 0
        return own + sum(walk(child, count) for child in module.children())

    return walk(model, tokens)


def _group_multiply_adds(group: KroneckerGroup, tokens: int) -> int:
    """The cheaper of the factors one after the other and of forming W once."""
    large, small, terms = group.large_shape, group.small_shape, group.terms
    factored = tokens * multiply_adds(large, small, terms, group.mix_first)
    entries = large[0] * large[1] * small[0] * small[1]
    return min(factored, (terms + tokens) * entries)


def _heads(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """(layers, query heads, key heads, width of a head)."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers, heads, keys, width


def _cached_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one token."""
    layers, _, keys, width = _heads(model)
    return 2 * layers * keys * width * model.dtype.itemsize


def _attention_multiply_adds(model: PreTrainedModel) -> int:
    """Multiply-adds of one query with one key and one value, over all layers."""
    layers, heads, _, width = _heads(model)
    return 2 * layers * heads * width
