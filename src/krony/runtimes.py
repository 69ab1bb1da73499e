"""Greedy decoding and prefill, each timed: a bare loop over the forward, and transformers' own.

The bare loop is the least a runtime must do (a forward, an argmax), so the difference between the
two is what `generate` itself takes.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from krony.errors import KronyError
from krony.families import cache_name
from krony.modeling import form
from krony.roofline import timed


class Runner:
    """A model as the benchmarks run it.

    Args:
        model: in evaluation mode. Its generation settings are replaced: greedy, never stopping.
        compiled: whether a step of the bare loop runs through `torch.compile`, with CUDA graphs on
            a GPU, over a static cache; the prefill and `generate` stay as they are. Layers that
            keep W get it instead of their factors (`modeling.form`).
    Attributes:
        compile_seconds: spent on first steps so far.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        self.model, self.device, self.compiled = model, model.device, compiled
        self.compile_seconds = 0.0
        self._seen: set[tuple[int, ...]] = set()
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        if compiled:
            form(model)
            # Not dynamic: each batch size gets its own graph, as in a server.
            self._step = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
        else:
            self._step = model.forward

    @torch.inference_mode()
    def loop(self, ids: Tensor, new: int) -> tuple[float, Tensor]:
        """Seconds of `new` steps of the bare loop after a prompt (b, t), and the tokens (b, new).

        Raises:
            KronyError: torch.compile can't compile the model here.
        """
        length = ids.shape[1] + new
        config = self.model.config
        cache: Cache = DynamicCache(config=config)
        if self.compiled:
            cache = StaticCache(config, max_cache_len=length)
        token = self._next(self.model.forward, ids, cache)
        made: list[Tensor] = []

        def steps() -> None:
            nonlocal token
            for _ in range(new):
                made.append(token)
                token = self._next(self._step, token, cache)

        key = (*ids.shape, new)
        if self.compiled and key not in self._seen:
            self._seen.add(key)
            begun = time.perf_counter()
            try:
                steps()
            except torch._dynamo.exc.TorchDynamoException as error:
                first = str(error).strip().splitlines()[0]
                raise KronyError(
                    f"torch.compile can't compile this model here ({first}); leave out --compile"
                ) from error
            self.compile_seconds += time.perf_counter() - begun
            return self.loop(ids, new)
        return timed(steps, self.device), torch.cat(made, 1)

    def _next(self, forward: Callable[..., Any], ids: Tensor, cache: Cache) -> Tensor:
        """The likeliest next tokens (b, 1) after ids (b, t) and what the cache holds."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        held = {cache_name(self.model): cache}
        output = forward(input_ids=ids, use_cache=True, logits_to_keep=1, **held)
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def generate(self, ids: Tensor, new: int) -> tuple[float, Tensor]:
        """Seconds of transformers' `generate`, the prompt (b, t) included; the tokens (b, new)."""
        mask, made = torch.ones_like(ids), []

        def run() -> None:
            whole = self.model.generate(ids, attention_mask=mask, max_new_tokens=new)  # type: ignore[operator]
            made.append(whole[:, ids.shape[1] :])

        return timed(run, self.device), made[0]

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> float:
        """Seconds of a forward over a prompt (b, t) that fills a cache, up to the next token."""
        cache = DynamicCache(config=self.model.config)
        return timed(lambda: self._next(self.model.forward, ids, cache), self.device)


def compile_report() -> dict[str, int]:
    """What torch.compile did in this process: graphs, breaks between them, CUDA graphs skipped."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }
