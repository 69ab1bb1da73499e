"""Greedy decoding and prefill, each timed: a bare loop over the forward, and transformers' own.

The bare loop is the least a runtime must do (a forward, an argmax), so the difference between the
two is what `generate` itself takes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from krony.errors import KronyError
from krony.hf.families import cache_name
from krony.hf.modeling import form
from krony.measure.roofline import timed

# A step, the tokens (b, 1) that it reads and writes, the cache that it adds to.
_Recorded = tuple["torch.cuda.CUDAGraph", Tensor, Cache]


class Runner:
    """A model as the benchmarks run it.

    Args:
        model: in evaluation mode. Its generation settings are replaced: greedy, never stopping.
        compiled: whether a step of the bare loop runs through `torch.compile` over a static cache,
            and on a GPU as one CUDA graph, which no Python is run for; the prefill and `generate`
            stay as they are. Layers that keep W get it instead of their factors (`modeling.form`).
    Attributes:
        compile_seconds: spent on first steps so far.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        self.model, self.device, self.compiled = model, model.device, compiled
        self.compile_seconds = 0.0
        self._seen: set[tuple[int, ...]] = set()
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
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
        config = self.model.config
        cache: Cache = DynamicCache(config=config)
        if self.compiled:
            cache = StaticCache(config, max_cache_len=ids.shape[1] + new)
            # Others count their tokens in Python, where a graph would not.
            if ids.is_cuda and all(type(layer) is StaticLayer for layer in cache.layers):
                return self._replayed(ids, new, cache)
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
            with self._compiling():
                steps()
            return self.loop(ids, new)
        return timed(steps, self.device), torch.cat(made, 1)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            first = str(error).strip().splitlines()[0]
            raise KronyError(
                f"torch.compile can't compile this model here ({first}); leave out --compile"
            ) from error
        self.compile_seconds += time.perf_counter() - begun

    def _replayed(self, ids: Tensor, new: int, cache: Cache) -> tuple[float, Tensor]:
        """`loop` with a step that is a CUDA graph: recorded once for a shape, with the cache, then
        replayed."""
        key = (*ids.shape, new)
        if key not in self._recorded:
            with self._compiling():
                self._recorded[key] = self._record(ids, cache)
        graph, token, cache = self._recorded[key]
        cache.reset()
        token.copy_(self._next(self.model.forward, ids, cache))
        made: list[Tensor] = []

        def steps() -> None:
            for _ in range(new):
                made.append(token.clone())
                graph.replay()

        return timed(steps, self.device), torch.cat(made, 1)

    def _record(self, ids: Tensor, cache: Cache) -> _Recorded:
        step = torch.compile(self.model.forward, dynamic=False)
        token = self._next(self.model.forward, ids, cache)
        with torch.cuda.device(self.device):
            graph = recorded(lambda: token.copy_(self._next(step, token, cache)))
        return graph, token, cache

    def _next(self, forward: Callable[..., Any], ids: Tensor, cache: Cache) -> Tensor:
        """The likeliest next tokens (b, 1) after ids (b, t) and what the cache holds."""
        if forward is self._step and self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        held = {cache_name(self.model): cache}
        output = forward(input_ids=ids, use_cache=True, logits_to_keep=1, **held)
        likeliest: Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return likeliest

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


def recorded(job: Callable[[], Any]) -> "torch.cuda.CUDAGraph":
    """A job as a CUDA graph on the current device, after one run that compiles what it needs and
    lets libraries take their memory."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        job()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph


def compile_report() -> dict[str, int]:
    """What torch.compile did in this process: graphs, breaks between them, CUDA graphs skipped."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }
