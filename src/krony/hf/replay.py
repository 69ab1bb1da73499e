"""Replays a model's blocks one at a time, and captures what flows in and out of its modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

WIDE = 512  # columns of a model from which products rounded to bfloat16 are faster


@contextmanager
def fast_products(model: PreTrainedModel) -> Iterator[None]:
    """Inside, float32 products of a model's size take the units that a machine has for rounded
    factors: bfloat16 in tiles on CPUs (AMX), TF32 on GPUs. Sums are float32.

    A relative rounding of 2⁻⁹ adds about 1e-6 of its diagonal to a second moment: the ridge that it
    gets anyhow.
    """
    wide = model.config.get_text_config().hidden_size >= WIDE
    tiles = model.device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    rates: list[tuple[Any, str]] = []
    if wide and tiles:
        rates.append((torch.backends.mkldnn.matmul, "bf16"))  # type: ignore[attr-defined]
    elif wide and model.device.type == "cuda":
        rates.append((torch.backends.cuda.matmul, "tf32"))
    before = [units.fp32_precision for units, _ in rates]
    try:
        for units, name in rates:
            units.fp32_precision = name
        yield
    finally:
        for (units, _), name in zip(rates, before, strict=True):
            units.fp32_precision = name


class BlockStream:
    """Replays the blocks of a model on stored hidden states, one block at a time.

    Everything but the hidden states that a block receives (masks, positions) is recorded once, so
    all batches must have one shape. Memory: the hidden states, 4 bytes x tokens x width.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: list[nn.Module], windows: Tensor, batch: int
    ) -> None:
        self.blocks, size = blocks, min(batch, len(windows))
        self.extra: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: list[Tensor] = []
        usable = len(windows) // size * size
        with torch.no_grad():
            for start in range(0, usable, size):
                ids = windows[start : start + size].to(model.device)
                self._record(model, ids)

    def _record(self, model: PreTrainedModel, ids: Tensor) -> None:
        first = not self.hidden

        def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            hidden = arguments[0] if arguments else options["hidden_states"]
            if module is self.blocks[0]:
                self.hidden.append(hidden.clone())
                if not first:
                    raise _Stop
            kept = {k: v for k, v in options.items() if k != "hidden_states"}
            self.extra.append((arguments[1:], kept))

        with _hooks(self.blocks if first else self.blocks[:1], hook), suppress(_Stop):
            # Without the output matrix: logits of a whole batch may not fit.
            model.base_model(input_ids=ids, use_cache=False)

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The output of `block`, which stands at `index`, for a batch of hidden states."""
        arguments, options = self.extra[index]
        return _hidden(block(hidden, *arguments, **options))


def _hidden(output: Any) -> Tensor:
    """The hidden states in what a module returns: blocks of some families return a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


class _Stop(Exception):  # noqa: N818  not an error: it ends a forward pass early
    pass


@contextmanager
def _hooks(modules: list[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def silent(module: nn.Module) -> Iterator[None]:
    """Inside, the module writes zeros."""
    handle = module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


def alike(found: Tensor, written: Tensor) -> bool:
    """Whether two tensors of as many numbers are the same but for rounding."""
    return float((found.reshape_as(written) - written).norm()) <= 1e-3 * float(written.norm())


@contextmanager
def captured(
    modules: dict[str, nn.Module], outputs: bool, detach: bool = True, stop: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Inside, every forward leaves the inputs (or outputs) of the modules in the dictionary.

    With `stop` there is one forward inside, and it ends, with the block, once all of them are seen.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str, found: Any) -> None:
        seen[name] = _hidden(found).detach() if detach else _hidden(found)
        if stop and len(seen) == len(modules):
            raise _Stop

    def hook(name: str, module: nn.Module) -> Any:
        if outputs:
            return module.register_forward_hook(lambda _, arguments, output: note(name, output))
        return module.register_forward_pre_hook(lambda _, arguments: note(name, arguments))

    handles = [hook(name, module) for name, module in modules.items()]
    try:
        with suppress(_Stop):
            yield seen
    finally:
        for handle in handles:
            handle.remove()
