"""What a smaller model loses, measured against the dense one, and what each block does at all."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.hf.families import blocks, states_and_head
from krony.hf.replay import fast_products

LOGITS = 2**24  # at a time
IN_CACHE = 2**20  # of them, those that a core's cache has room for


class Judge:
    """The predictions of a dense model on some windows, to measure others against.

    Args:
        windows: token ids (windows, window).
    """

    def __init__(self, teacher: PreTrainedModel, windows: Tensor) -> None:
        states, self._head = states_and_head(teacher)
        self._windows = windows.to(teacher.device)
        with torch.inference_mode(), fast_products(teacher):
            self._hidden = [states(input_ids=row[None])[0] for row in self._windows]

    @torch.inference_mode()
    def harm(self, model: PreTrainedModel) -> float:
        """KL divergence of a model from the dense one, nats a token."""
        states, head = states_and_head(model)
        vocabulary = model.config.get_text_config().vocab_size
        size, some = max(1, LOGITS // vocabulary), max(1, IN_CACHE // vocabulary)
        total = 0.0
        with fast_products(model):
            for row, known in zip(self._windows, self._hidden, strict=True):
                found = states(input_ids=row[None])[0]
                for mine, its in zip(found.split(size), known.split(size), strict=True):
                    made, wanted = head(mine).split(some), self._head(its).split(some)
                    total += sum(map(_divergence, made, wanted))
        return total / self._windows.numel()


def _divergence(logits: Tensor, wanted: Tensor) -> float:
    """Summed KL divergence of predictions (tokens, vocabulary) from wanted ones, in nats."""
    logits, wanted = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return float(wanted.exp().mul_(wanted - logits).sum(dtype=torch.float64))


@torch.inference_mode()
def influence(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """1 minus the cosine of what goes into a block and what comes out, a mean over tokens: one
    number a block."""
    modules = [block for _, _, block in blocks(model)]
    total = torch.zeros(len(modules), dtype=torch.float64)

    def hook(i: int) -> Any:
        def note(_: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            given = arguments[0] if arguments else options["hidden_states"]
            made = output[0] if isinstance(output, tuple) else output
            alike = torch.cosine_similarity(given.double(), made.double(), dim=-1)
            total[i] += float((1 - alike).sum())

        return note

    handles = [b.register_forward_hook(hook(i), with_kwargs=True) for i, b in enumerate(modules)]
    try:
        for row in windows.to(model.device):
            model.base_model(input_ids=row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return total / windows.numel()
