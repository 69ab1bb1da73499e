"""`krony.compress` with a plan and nothing else, or with the name of a text."""

import copy

import pytest
import torch

import krony
from helpers import healing_inputs
from krony import KronyError
from krony.compression import calibrate, needed


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def plan(gpt2):
    return krony.make_plan(gpt2, small=(2, 2), layers=[0])


def test_a_plan_alone_is_fitted_to_text_that_the_model_writes(gpt2, plan, monkeypatch):
    monkeypatch.setattr(calibrate, "LEAST_TOKENS", 4096)
    krony.compress(gpt2, plan)
    made = gpt2.config.quantization_config.provenance
    assert made["init"] == "data"
    assert set(made["matrices"]) == {m.name for m in plan.matrices}
    assert all(0 < found["harm"] < 1 for found in made["matrices"].values())


def test_it_is_the_text_and_the_factors_that_one_gets_step_by_step(gpt2, plan, monkeypatch):
    monkeypatch.setattr(calibrate, "LEAST_TOKENS", 2048)
    other = copy.deepcopy(gpt2)
    windows = calibrate.calibration_windows("self", other, None, needed.of_plan(other, plan))
    krony.compress(gpt2, plan)
    krony.compress(other, plan, init="data", calibration=windows)
    one, two = weights(gpt2), weights(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_text_is_named_and_read_with_the_tokenizer_of_the_model(tmp_path):
    inputs = healing_inputs(tmp_path)
    model = krony.load_model(inputs / "dense")
    plan = krony.make_plan(model, small=(2, 2), layers=[0])
    krony.compress(model, plan, calibration=str(inputs / "text.txt"))
    (text,) = model.config.quantization_config.provenance["texts"]
    assert (text["name"], text["use"]) == ("text.txt", "calibration")


def test_a_text_needs_a_tokenizer_and_a_method_that_reads_it(gpt2, plan):
    before = weights(gpt2)
    with pytest.raises(KronyError, match="give its tokenizer"):
        krony.compress(gpt2, plan, calibration="python-docs")
    for wrong in (7, [], b"text"):
        with pytest.raises(KronyError, match="calibration is a"):
            krony.compress(gpt2, plan, calibration=wrong)
        with pytest.raises(KronyError, match="calibration is a"):
            krony.compress(gpt2, size=0.8, calibration=wrong)
    with pytest.raises(KronyError, match="takes no calibration text"):
        krony.compress(gpt2, plan, init="van-loan", calibration="python-docs")
    after = weights(gpt2)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_plan_that_cannot_be_is_refused_before_a_text_is_written(gpt2, plan, monkeypatch):
    monkeypatch.setattr(calibrate, "calibration_windows", None)  # a call would be a TypeError
    other = krony.Plan((*plan.matrices, *plan.matrices))
    with torch.no_grad():
        gpt2.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(KronyError, match="NaN or Inf"):
        krony.compress(gpt2, other)
