"""Models with weights on a disk: they run and are saved right, and all else is refused."""

import pytest
import torch
import transformers as hf

import krony
from helpers import logits, tiny
from krony import KronyError, compress, load_model, make_plan, save_model
from krony.export.onnx import onnx
from krony.export.quantize import quantize
from krony.export.self_contained import self_contained
from krony.hf.offload import check_present
from krony.runtime import loader


def offloaded(folder, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": "30KB"},
        offload_folder=str(tmp_path / "offload"),
    ).eval()
    assert any(p.is_meta for p in model.parameters())
    return model


@pytest.fixture(params=[("llama", "mlp"), ("gpt2", "everything")], ids=lambda p: "-".join(p))
def factored(request, tmp_path):
    """(the directory, its logits)."""
    family, target = request.param
    model = tiny(family)
    compress(model, make_plan(model, small=(2, 2), target=target), init="van-loan")
    return save_model(model, tmp_path / "small"), logits(model)


def test_it_runs_and_is_saved_as_it_is(factored, tmp_path):
    folder, expected = factored
    model = offloaded(folder, tmp_path)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load_model(save_model(model, tmp_path / "a"))), expected)
    assert torch.equal(logits(load_model(self_contained(model, tmp_path / "b"))), expected)
    assert torch.equal(logits(model), expected)


FORBIDDEN = {
    "fold the model to dense": lambda model, _: model.dequantize(),
    "form W in it": lambda model, _: krony.form(model),
    "quantize the model": lambda model, _: quantize(model, "int8"),
    "write a graph of the model": lambda model, path: onnx(model, path / "out"),
}


def test_what_reads_the_weights_themselves_is_refused(factored, tmp_path):
    folder, expected = factored
    model = offloaded(folder, tmp_path)
    for doing, do in FORBIDDEN.items():
        with pytest.raises(KronyError, match=rf"can't {doing}: \d+ of its tensors, .* offloaded"):
            do(model, tmp_path)
        assert torch.equal(logits(model), expected), f"{doing}: and nothing is changed"


@pytest.mark.parametrize("init", ["van-loan", "data"])
def test_compressing_is_refused(init, tmp_path):
    folder = save_model(tiny("llama"), tmp_path / "dense")
    model = offloaded(folder, tmp_path)
    plan = make_plan(model, small=(2, 2))
    with pytest.raises(KronyError, match=r"can't compress the model: .*load it without device_map"):
        compress(model, plan, init=init, calibration=torch.randint(96, (4, 16)))
    assert krony.hf.modeling.config_of(model) is None


def test_without_krony_folding_is_refused_as_well(factored, tmp_path, monkeypatch):
    folder, _ = factored
    monkeypatch.setitem(loader.AUTO_QUANTIZER_MAPPING, "kronecker", loader.KroneckerQuantizer)
    with pytest.raises(ValueError, match="is offloaded; load the model without that"):
        offloaded(folder, tmp_path).dequantize()


def test_a_model_that_has_no_numbers_yet():
    with torch.device("meta"):
        model = hf.GPT2LMHeadModel(tiny("gpt2").config)
    with pytest.raises(KronyError, match="are on the meta device, without numbers"):
        check_present(model, "compress the model")
