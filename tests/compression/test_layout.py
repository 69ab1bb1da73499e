"""The side on which small factors stand is that of less harm."""

import copy
import re
from collections import Counter

import pytest
import torch
import transformers

import krony
from krony.compression import calibrate
from krony.compression.layout import choose_layouts, compress_in_better_layout
from krony.hf.plan import Plan
from krony.measure import evaluate


def tiny() -> transformers.PreTrainedModel:
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def test_each_matrix_gets_the_order_that_it_was_made_in():
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    made = {}
    with torch.no_grad():
        for number, matrix in enumerate(krony.make_plan(model, small=(2, 2)).matrices):
            (factors,) = matrix.groups
            large = torch.randn(factors.large, generator=generator)
            small = torch.randn(factors.small, generator=generator)
            first = number % 2 == 0
            made[matrix.name] = "large-outer" if first else "small-outer"
            weight = torch.kron(large, small) if first else torch.kron(small, large)
            model.get_submodule(matrix.name).weight.copy_(weight.T)
    windows = torch.randint(0, 50, (8, 32), generator=generator)
    moments = calibrate.calibrate(model, windows, list(made))
    for planned in ("small-outer", "large-outer"):
        plan = krony.make_plan(model, small=(2, 2), layout=planned)
        found = choose_layouts(model, plan, moments)
        assert {m.name: m.groups[0].layout for m in found.matrices} == made
        assert found.parameters == plan.parameters


def test_low_rank_and_matrices_without_moments_stay_as_they_are():
    model = tiny()
    plan = krony.make_plan(model, small=(2, 2), layout="large-outer")
    assert choose_layouts(model, plan, {}) == plan
    low_rank = krony.make_plan(model, shape=(64, 1), terms=4, target="*.mlp.c_fc")
    windows = torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(1))
    moments = calibrate.calibrate(model, windows, [m.name for m in low_rank.matrices])
    assert choose_layouts(model, low_rank, moments) == low_rank


@pytest.mark.parametrize("init", ["van-loan", "van-loan-scaled", "prune"])
@pytest.mark.parametrize("better", ["small-outer", "large-outer"])
def test_by_weights_the_whole_model_gets_the_order_of_less_loss(init, better):
    # Trained matrices, replaced by such that are nearly one product in one of the orders.
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    plan = krony.make_plan(model, small=(2, 2))
    with torch.no_grad():
        for matrix in plan.matrices:
            (factors,) = matrix.groups
            large = torch.randn(factors.large, generator=generator)
            small = torch.randn(factors.small, generator=generator)
            made = (small, large) if better == "small-outer" else (large, small)
            model.get_submodule(matrix.name).weight.copy_(torch.kron(*made).T)
    windows = calibrate.sample(model, 8, 32, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made, found, losses = compress_in_better_layout(model, plan, windows, init=init)
    assert set(losses) == {"small-outer", "large-outer"}
    for layout, loss in losses.items():
        each = krony.make_plan(model, small=(2, 2), layout=layout)
        other = krony.compress(copy.deepcopy(model), each, init=init)
        assert loss == pytest.approx(evaluate.perplexity(other, windows.flatten(), window=32).nats)
    if init == "van-loan":  # exact in that order
        assert min(losses, key=losses.__getitem__) == better
    chosen = {m.groups[0].layout for m in found.matrices}
    assert chosen == {min(losses, key=losses.__getitem__)}
    assert Plan.from_dict(made.config.quantization_config.plan) == found
    after = dict(model.named_parameters())
    assert before.keys() == after.keys(), "the dense model stays"
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_command_says_which_side_it_took_and_takes_another_if_told(run, tmp_path):
    krony.save_model(tiny(), tmp_path / "dense")
    command = ["compress", tmp_path / "dense", "--small", "2x2", "--init", "van-loan"]
    command.insert(2, tmp_path / "chosen")
    code, out, err = run(*command)
    assert code == 0, err
    said = re.search(r"Layout of less loss: (\S+) [\d.]+, (\S+) [\d.]+ nats a token", out)
    matrices = krony.load_model(tmp_path / "chosen").config.quantization_config.plan["matrices"]
    assert {m["groups"][0]["layout"] for m in matrices} == {said[1]}
    assert {said[1], said[2]} == {"small-outer", "large-outer"}
    command[2] = tmp_path / "told"
    code, out, err = run(*command, "--layout", "large-outer")
    assert code == 0, err
    assert "Layout of less" not in out
    matrices = krony.load_model(tmp_path / "told").config.quantization_config.plan["matrices"]
    assert {m["groups"][0]["layout"] for m in matrices} == {"large-outer"}


def test_fitted_to_data_the_command_says_in_how_many_matrices(run, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "LEAST_TOKENS", 2048)
    krony.save_model(tiny(), tmp_path / "dense")
    code, out, err = run("compress", tmp_path / "dense", tmp_path / "out", "--small", "2x2")
    assert code == 0, err
    said = dict(re.findall(r"(small-outer|large-outer) in (\d+)", out))
    matrices = krony.load_model(tmp_path / "out").config.quantization_config.plan["matrices"]
    counts = Counter(m["groups"][0]["layout"] for m in matrices)
    assert said == {name: str(count) for name, count in counts.items()}
    assert not list(tmp_path.glob(".*"))
