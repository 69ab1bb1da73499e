"""Muon and AdamW as one optimizer: torch's own two, side by side, are the oracle."""

import copy

import pytest
import torch
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

import krony
from helpers import FAMILIES, tiny
from krony.healing.optimizers import MuonAndAdamW, make_optimizer, parameter_groups
from krony.healing.recipe import Recipe

RECIPE = Recipe(stages=(), decay=0.1, betas=(0.9, 0.99), muon=True)


def factored(family="gpt2"):
    model = tiny(family)
    return krony.compress(model, krony.make_plan(model, small=(2, 2), terms=2), init="van-loan")


def learn(model, *optimizers, steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 90, (2, 12), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_gets_the_matrices_of_blocks(family):
    model = factored(family)
    matrices, others = parameter_groups(model, RECIPE, 1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = {names[id(p)] for group in matrices for p in group["params"]}
    rest = {names[id(p)] for group in others for p in group["params"]}
    assert chosen | rest == set(names.values())
    assert not chosen & rest
    assert any(name.endswith("large.weight") for name in chosen)
    assert any("attn" in name or "attention" in name for name in chosen)
    head = model.get_output_embeddings().weight
    assert names[id(head)] in rest
    assert not any(word in name for name in chosen for word in ("bias", "norm", "wpe"))


def test_a_step_is_one_of_muon_and_one_of_adamw():
    model = factored()
    again = copy.deepcopy(model)
    learn(model, make_optimizer(model, RECIPE, 1e-2))
    matrices, others = parameter_groups(again, RECIPE, 1e-2)
    muon = Muon(matrices, adjust_lr_fn="match_rms_adamw")
    learn(again, muon, AdamW(others, betas=RECIPE.betas, fused=True))
    before = factored().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_scheduler_reaches_both():
    model = factored()
    optimizer = make_optimizer(model, RECIPE, 1e-2)
    scheduler = LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    optimizer.step()
    scheduler.step()
    before = copy.deepcopy(model.state_dict())
    learn(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_states_are_saved_and_loaded():
    model = factored()
    optimizer = make_optimizer(model, RECIPE, 1e-2)
    learn(model, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    learn(model, optimizer, seed=1)
    again = factored()
    again.load_state_dict(weights)
    other = make_optimizer(again, RECIPE, 5.0)
    other.load_state_dict(saved)
    learn(again, other, seed=1)
    assert isinstance(other, MuonAndAdamW)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_without_muon_it_is_adamw():
    recipe = Recipe(stages=())
    optimizer = make_optimizer(factored(), recipe, 1e-3)
    assert type(optimizer) is AdamW
