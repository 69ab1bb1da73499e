"""What methods know of a model: its matrices and what calibration found, once for all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression import budget
from krony.compression.factorise import Known
from krony.compression.work import Tensors, Work
from krony.errors import KronyError
from krony.hf.families import Target, find_targets
from krony.hf.replay import fast_products
from krony.hf.smaller import Anatomy, anatomy

Progress = Callable[[str, int, int], None]


class Evidence:
    """A dense model and what is known of it, found when it is first asked for.

    Args:
        model: in float32; it stays as it is.
        windows: token ids (windows, window) to calibrate on.
        seed: of the labels that calibration samples.
        work: where what was found is kept.
        progress: called with (what, number, how many).
    Attributes:
        targets: the matrices of the blocks, which budgets are shares of.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        seed: int = 0,
        work: Work | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.windows, self.seed = model, windows, seed
        self.work, self.progress = work or Work(), progress
        self.targets: list[Target] = find_targets(model, "all")

    @property
    def matrices(self) -> int:
        """Parameters of the blocks' matrices."""
        return sum(t.shape[0] * t.shape[1] for t in self.targets)

    def removed(self, share: float) -> int:
        """Parameters that go, where that share of the matrices stays. Raises `KronyError`."""
        if not 0 < share < 1:
            raise KronyError(f"a budget of {share} can't be: it is a share between 0 and 1")
        return round((1 - share) * self.matrices)

    def copy(self) -> PreTrainedModel:
        """A model of its own, to be made smaller."""
        return copy.deepcopy(self.model)

    def module(self, target: Target) -> nn.Module:
        """The layer of a matrix."""
        return self.model.get_submodule(target.name)

    @cached_property
    def moments(self) -> Mapping[str, Known]:
        """Second moments of inputs and of output gradients, by matrix (`calibrate.Moments`)."""
        model, windows = self.model, self.windows
        return budget.known(model, windows, self.targets, self.work, self.seed, None, self.progress)

    @cached_property
    def body(self) -> Anatomy:
        """Blocks, and what of them can be taken out. Raises `KronyError` where nothing can."""
        return anatomy(self.model)

    @cached_property
    def activity(self) -> Tensors:
        """By matrix: mean |x| of its inputs in each window, (windows, n); under "NAME heads", for
        the output of attention, mean norms of the heads in it, (windows, heads)."""
        return self.work.once(self._activity, "activity")

    @cached_property
    def gradients(self) -> Tensors:
        """Of the loss on the text itself, by matrix W (m, n) with gradient D: under "NAME fisher"
        Σ over windows and outputs of D², (n,); with D summed over windows, under "NAME rows" and
        "NAME columns" the sums of |W D|, (m,) and (n,)."""
        return self.work.once(self._gradients, "gradients")

    def _told(self, what: str) -> Callable[[int], None]:
        count = len(self.windows)
        tell = self.progress and partial(self.progress, what)
        return lambda done: tell(done, count) if tell else None

    @torch.inference_mode()
    def _activity(self) -> Tensors:
        found: dict[str, list[Tensor]] = {}
        heads = {p.attention.output for p in self.body.parts if p.attention is not None}

        def note(name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            found.setdefault(name, []).append(x.abs().mean(0).cpu())
            if name in heads and (size := self.body.head_size):
                norms = x.view(len(x), -1, size).norm(dim=-1).mean(0)
                found.setdefault(f"{name} heads", []).append(norms.cpu())

        hooks = [
            self.module(t).register_forward_pre_hook(partial(note, t.name)) for t in self.targets
        ]
        told = self._told("Activations")
        try:
            with fast_products(self.model):
                for number, row in enumerate(self.windows.to(self.model.device), 1):
                    self.model.base_model(input_ids=row[None], use_cache=False)
                    told(number)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: torch.stack(rows) for name, rows in found.items()}

    def _gradients(self) -> Tensors:
        model, told = self.model, self._told("Weight gradients")
        weights: dict[str, Tensor] = {}
        for target in self.targets:
            weights[target.name] = self.module(target).weight  # type: ignore[assignment]
        flags = [p.requires_grad for p in model.parameters()]
        total = {name: torch.zeros_like(w) for name, w in weights.items()}
        found: Tensors = {}
        try:
            model.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            with torch.enable_grad(), fast_products(model):
                for number, row in enumerate(self.windows.to(model.device), 1):
                    loss = model(input_ids=row[None], labels=row[None], use_cache=False).loss
                    each = torch.autograd.grad(loss, list(weights.values()))
                    for target, gradient in zip(self.targets, each, strict=True):
                        total[target.name] += gradient
                        outputs = 1 if target.conv1d else 0
                        square = gradient.double().square().sum(outputs).cpu()
                        key = f"{target.name} fisher"
                        found[key] = found[key] + square if key in found else square
                    told(number)
        finally:
            for parameter, flag in zip(model.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)
        for target in self.targets:
            product = (weights[target.name].detach() * total[target.name]).abs().double().cpu()
            product = product.T if target.conv1d else product
            found[f"{target.name} rows"] = product.sum(1)
            found[f"{target.name} columns"] = product.sum(0)
        return found
