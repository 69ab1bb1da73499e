"""Reconstruction: errors fall, a perfect model stays as it is, inputs are the model's own."""

import pytest
import torch

import krony
from helpers import tiny
from krony.errors import KronyError
from krony.healing.reconstruct import reconstruct

WINDOWS = torch.arange(16 * 12).reshape(16, 12) * 7 % 90


def small(family):
    changes = {"initializer_range": 0.2, "init_std": 0.2}
    model, teacher = tiny(family, **changes), tiny(family, **changes)
    krony.compress(model, krony.make_plan(model, small=(2, 2)), init="van-loan")
    return model, teacher


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_errors_fall_and_only_mlps_change(family):
    model, teacher = small(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    errors = reconstruct(model, teacher, WINDOWS, 60)
    assert len(errors) == 2
    for first, last in errors.values():
        assert last < 0.97 * first
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed
    assert all(".mlp." in name for name in changed)
    assert all(p.grad is None for p in model.parameters())


def test_the_error_is_that_of_the_mlp_on_the_inputs_of_the_compressed_model():
    model, teacher = small("gpt2")
    errors = reconstruct(model, teacher, WINDOWS, 20)
    seen = {}
    last = model.transformer.h[1].mlp
    handle = last.register_forward_hook(lambda m, x, y: seen.update(x=x[0], y=y))
    with torch.no_grad():
        model(input_ids=WINDOWS)
        wanted = teacher.transformer.h[1].mlp(seen["x"]).flatten(0, 1)
    handle.remove()
    size = (wanted - wanted.mean(0)).square().sum()
    error = (seen["y"].flatten(0, 1) - wanted).square().sum() / size
    assert errors["transformer.h.1.mlp"][1] == pytest.approx(error.item(), rel=1e-4)


def test_what_is_perfect_stays_as_it_is():
    model, teacher = tiny("gpt2"), tiny("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    errors = reconstruct(model, teacher, WINDOWS, 5)
    assert all(pair == (0.0, 0.0) for pair in errors.values())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_the_same_seed_gives_the_same_weights():
    first, second = (small("gpt2") for _ in range(2))
    assert reconstruct(*first, WINDOWS, 10) == reconstruct(*second, WINDOWS, 10)


def test_bad_input_is_named():
    model, teacher = small("opt")
    with pytest.raises(KronyError, match="is no module of its own in OPTForCausalLM"):
        reconstruct(model, teacher, WINDOWS, 1)
    with pytest.raises(
        KronyError, match=r"the teacher has an MLP model.layers.0.mlp and the model"
    ):
        reconstruct(small("gpt2")[0], tiny("llama"), WINDOWS, 1)
