"""Saving, loading and folding through transformers itself."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers as hf

from helpers import FAMILIES, logits, refused_without_krony, tiny
from krony import (
    INITS,
    Factors,
    KroneckerGroup,
    KroneckerLinear,
    KronyError,
    MatrixPlan,
    Plan,
    compress,
    form,
    load_model,
    make_plan,
    save_model,
)
from krony.hf.families import find_targets


def factored(family="gpt2", init="van-loan-scaled", **choices):
    model = tiny(family)
    plan = make_plan(model, **({"small": (2, 2), "terms": 2} | choices))
    return compress(model, plan, init=init)


def load(path, **options):
    return hf.AutoModelForCausalLM.from_pretrained(path, **options).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_saves_loads_generates_and_folds(family, tmp_path):
    model = factored(family, target="all")
    expected = logits(model)
    model.save_pretrained(tmp_path / "factored")
    again = load(tmp_path / "factored")
    assert sum(isinstance(m, KroneckerLinear) for m in again.modules()) == len(
        find_targets(tiny(family), "all")
    )
    assert torch.equal(logits(again), expected)
    made = again.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=6, min_new_tokens=6)
    assert made.shape == (1, 9)
    again.dequantize()
    assert not any(isinstance(m, KroneckerLinear) for m in again.modules())
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    "choices",
    [
        {"terms": 1},
        {"terms": 1, "scalars": True},
        {"terms": 1, "layout": "large-outer"},
        {"terms": 1, "small": (2, 1), "layers": [1]},
    ],
)
def test_round_trip_is_bit_exact(choices, init, tmp_path):
    model = factored(init=init, **choices)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_round_trip(dtype, tmp_path):
    model = factored().to(dtype)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).dtype == dtype
    assert torch.equal(logits(load(tmp_path)), logits(model))
    widened = load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in widened.parameters()} == {torch.float32}


def test_shards_device_map_and_saving_again(tmp_path):
    model = factored("llama")
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    again = load(tmp_path / "a", device_map="auto")
    again.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert config["provenance"]["init"] == "van-loan-scaled"
    assert Plan.from_dict(config["plan"]) == make_plan(tiny("llama"), small=(2, 2), terms=2)


def test_equal_bytes_on_disk(tmp_path):
    for name in "ab":
        save_model(factored("llama"), tmp_path / name)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_mixed_groups_travel(tmp_path):
    model = tiny("gpt2")
    groups = (Factors((128, 1), (1, 32), 2), Factors((64, 16), (2, 2), 1, "large-outer"))
    plan = Plan((MatrixPlan("transformer.h.0.mlp.c_fc", (128, 32), groups, conv1d=True),))
    compress(model, plan, init="van-loan")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


GROUP = Factors((16, 4), (8, 8), 20, "large-outer", interpolative=True)
INTERPOLATIVE = Plan((MatrixPlan("transformer.h.0.mlp.c_fc", (128, 32), (GROUP,), conv1d=True),))


def test_the_interpolative_form_travels_trains_and_folds(tmp_path):
    groups = (replace(GROUP, interpolative=False),)
    plain = Plan((replace(INTERPOLATIVE.matrices[0], groups=groups),))
    model, same = (
        compress(tiny("gpt2"), INTERPOLATIVE, init="van-loan"),
        compress(tiny("gpt2"), plain, init="van-loan"),
    )
    torch.testing.assert_close(logits(model), logits(same))
    assert same.num_parameters() - model.num_parameters() == 20**2
    model.save_pretrained(tmp_path / "factored")
    again = load(tmp_path / "factored")
    assert torch.equal(logits(again), logits(model))
    half = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "factored", dtype=torch.bfloat16)
    assert half.transformer.h[0].mlp.c_fc.groups[0].order.dtype == torch.int32
    ids = torch.arange(20).reshape(2, 10)
    again.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in again.parameters())
    again.eval().dequantize()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


def test_formed_the_interpolative_form_is_in_full(tmp_path):
    name = "transformer.h.0.mlp.c_fc"
    groups = (Factors((16, 4), (8, 8), 20, interpolative=True), Factors((128, 1), (1, 32), 2))
    model = compress(
        tiny("gpt2"), Plan((MatrixPlan(name, (128, 32), groups, conv1d=True),)), init="van-loan"
    )
    before, numbers = logits(model), model.num_parameters()
    assert form(model) == [name]
    assert form(model) == []
    assert model.num_parameters() == numbers + 20**2
    first, second = model.get_submodule(name).groups
    assert first.order is second.order is None
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), before)


def test_the_factored_model_is_an_ordinary_trainable_model(tmp_path):
    model = factored(scalars=True)
    model.save_pretrained(tmp_path)
    again = load(tmp_path).train()
    ids = torch.arange(20).reshape(2, 10)
    again(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in again.parameters())
    again.half().float()  # transformers forbids both on what it takes for quantized
    hf.Trainer(model=again, args=hf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "interpolative"])
def test_compiles_whole(form):
    model = (
        factored("llama")
        if form == "plain"
        else compress(tiny("gpt2"), INTERPOLATIVE, init="van-loan")
    )
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(model))


def test_loading_forms_no_matrix(tmp_path, monkeypatch):
    """transformers initialises what is not in the file, and looks at GPT-2's weights for that."""
    save_model(factored(), tmp_path / "out")

    def fail(*_):
        raise AssertionError("formed")

    monkeypatch.setattr(KroneckerLinear, "to_dense", fail)
    monkeypatch.setattr(KroneckerGroup, "to_dense", fail)
    load_model(tmp_path / "out")


@pytest.mark.slow
def test_dequantize_dtype_and_plain_save(tmp_path):
    model = factored()
    expected = logits(model)
    model.dequantize(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = factored()
    model.dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    # In an interpreter that never heard of krony.
    script = (
        "import sys, torch, transformers as hf\n"
        "sys.modules['krony'] = None\n"
        f"model = hf.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()\n"
        "ids = torch.arange(24).reshape(2, 12) % 90\n"
        f"torch.save(model(input_ids=ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    plain = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_without_krony_a_factored_model_stops_instead_of_loading_noise(tmp_path):
    factored("llama").save_pretrained(tmp_path)
    assert "kronecker" in refused_without_krony(tmp_path)


def test_the_base_model_loads_too(tmp_path):
    model = factored()
    model.save_pretrained(tmp_path)
    base = hf.AutoModel.from_pretrained(tmp_path)
    assert isinstance(base.h[0].mlp.c_fc, KroneckerLinear)
    small, large = (m.h[0].mlp.c_fc.groups[0].small for m in (base, model.transformer))
    assert torch.equal(small, large)
    base.dequantize()
    assert not any(isinstance(m, KroneckerLinear) for m in base.modules())


def test_models_that_share_a_configuration_stay_apart(tmp_path):
    config = FAMILIES["gpt2"]()
    dense, other = (hf.GPT2LMHeadModel(config) for _ in range(2))
    compress(other, make_plan(other, small=(2, 2)), init="van-loan")
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert other.transformer.config is other.config


def test_offloading_names_no_weight_missing(tmp_path):
    factored().save_pretrained(tmp_path)
    _, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


# Writing: whole or not at all.


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_nothing(error, tmp_path, monkeypatch):
    model = factored()
    save = type(model).save_pretrained

    def half(self, folder, **options):
        save(self, folder, **options)
        (folder / "config.json").unlink()
        raise error

    monkeypatch.setattr(type(model), "save_pretrained", half)
    expected = KronyError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_model(model, tmp_path / "out")
    if expected is KronyError:
        assert "No space left on device" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    model = factored()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the weights take 100 kB
    try:
        with pytest.raises(KronyError, match=r"can't write .*out: .*nothing was left there"):
            save_model(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(KronyError, match="exists already"):
        save_model(factored(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# Reading: safetensors and JSON only.


def test_directories_that_do_not_load(tmp_path):
    with pytest.raises(KronyError, match="no local directory, and no model of that name"):
        load_model("no-such-name/at-all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KronyError, match=r"has no config\.json"):
        load_model(tmp_path / "empty")
    tiny("gpt2").config.save_pretrained(tmp_path / "bare")
    with pytest.raises(KronyError, match=r"but no \*.safetensors weights"):
        load_model(tmp_path / "bare")
    (tmp_path / "bare" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(KronyError, match=r"only as a pickle \(pytorch_model.bin\)"):
        load_model(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(KronyError, match=r"has a header of .* bytes"):
        load_model(tmp_path / "bare")
    with pytest.raises(KronyError, match="is a file"):
        load_model(tmp_path / "bare" / "config.json")


def test_a_truncated_checkpoint_is_one_sentence(tmp_path):
    factored().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(KronyError, match="is no safetensors file that can be read"):
        load_model(tmp_path)
