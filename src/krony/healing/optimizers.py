"""The optimizer of a recipe: groups of parameters, for torch's AdamW and torch's Muon."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from krony.healing.recipe import Recipe, factored_layers
from krony.nn.layers import KroneckerEmbedding

Groups = list[dict[str, Any]]  # of parameters, each with its learning rate and weight decay


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan 2024) for matrices, AdamW for everything else: one, since Trainer drives one.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, section 2.2), so that one
    learning rate serves both.
    """

    def __init__(self, matrices: Groups, others: Groups, betas: tuple[float, float]) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=betas, fused=True),
        )
        # The very groups of the parts: what a scheduler changes here is changed there.
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        muon, adamw = self.parts
        muon.state = adamw.state = self.state
        muon.param_groups = [group for group in self.param_groups if "ns_steps" in group]
        adamw.param_groups = [group for group in self.param_groups if "ns_steps" not in group]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a checkpoint: other groups, other states
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """One step of both, on gradients that are there: a closure can't be served twice."""
        assert closure is None
        for part in self.parts:
            part.step()


def make_optimizer(model: nn.Module, recipe: Recipe, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, or with `recipe.muon` Muon for the matrices and AdamW for the rest."""
    matrices, others = parameter_groups(model, recipe, learning_rate)
    if matrices:
        return MuonAndAdamW(matrices, others, recipe.betas)
    return torch.optim.AdamW(others, betas=recipe.betas, fused=True)


def parameter_groups(
    model: nn.Module, recipe: Recipe, learning_rate: float
) -> tuple[Groups, Groups]:
    """Groups for Muon and those for AdamW: factors or not, with weight decay or not.

    Muon is for what has two axes neither of which is tokens or positions.
    """
    factored: set[int] = set()
    for layer in factored_layers(model):
        factored |= {id(p) for name, p in layer.named_parameters() if name != "bias"}
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | KroneckerEmbedding)]
    tables.append(model.get_output_embeddings())  # type: ignore[operator]
    read = {id(p) for table in tables if table is not None for p in table.parameters()}
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            muon = recipe.muon and parameter.ndim == 2 and id(parameter) not in read
            key = (muon, id(parameter) in factored, parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    made: tuple[Groups, Groups] = ([], [])
    for (muon, factors, decays), parameters in groups.items():
        group = {
            "params": parameters,
            "lr": learning_rate * (recipe.factors if factors else 1.0),
            "weight_decay": recipe.decay if decays else 0.0,
        }
        made[0 if muon else 1].append(group)
    return made
