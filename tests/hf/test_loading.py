"""A checkpoint is whole, or refused by the names of what is wrong with it."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import krony
from helpers import SMALL, logits, tiny
from krony import KronyError, load_model, save_model
from krony.errors import first_line
from krony.hf.whole import unwrapped

UP = "model.layers.1.mlp.up_proj.weight"


def factored() -> hf.PreTrainedModel:
    model = tiny("llama")
    return krony.compress(model, krony.make_plan(model, small=(2, 2)), init="van-loan")


@pytest.fixture
def dense(tmp_path):
    return save_model(tiny("llama"), tmp_path / "dense")


def rewrite(folder, change, name="model.safetensors"):
    """Change the tensors of a directory's file."""
    tensors = load_file(folder / name)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, folder / name, metadata={"format": "pt"})


def reset(folder, **entries):
    """Change entries of a directory's configuration."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(dense, name):
    rewrite(dense, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(KronyError, match=f"lacks 1 tensors that the model needs: {name}"):
        load_model(dense)


def test_a_tensor_of_another_shape_is_named(dense):
    rewrite(dense, lambda tensors: tensors.update({UP: torch.zeros(8, 32)}))
    with pytest.raises(KronyError, match=rf"{UP} is 8x32 in the file and 48x32 in the model"):
        load_model(dense)


@pytest.mark.parametrize("part", ["groups.0.large.weight", "groups.0.small"])
@pytest.mark.parametrize("load", [load_model, hf.AutoModelForCausalLM.from_pretrained])
def test_a_missing_factor_stops_every_loader(tmp_path, part, load):
    folder = save_model(factored(), tmp_path / "small")
    name = UP.replace("weight", part)
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(KronyError, match=rf"lacks 1 tensors.*{name}"):
        load(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", [lambda: tiny("llama"), factored])
def test_a_number_that_is_none_is_found(tmp_path, make, number):
    folder = save_model(make(), tmp_path / "model")
    name = next(k for k in load_file(folder / "model.safetensors") if "up_proj.g" in k or k == UP)

    def spoil(tensors):
        tensors[name].flatten()[-1] = number

    rewrite(folder, spoil)
    with pytest.raises(KronyError, match=rf"{name} (of .* NaN or Inf|in .* is not what krony)"):
        load_model(folder)


@pytest.mark.parametrize("make", [lambda: tiny("llama"), factored])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
        lambda name: name.replace("mlp.", "mlp._orig_mod."),
    ],
)
def test_prefixes_of_wrappers_are_read_through_and_said(tmp_path, make, wrap):
    model = make()
    folder = save_model(model, tmp_path / "model")
    rewrite(folder, lambda tensors: {wrap(name): value for name, value in tensors.items()})
    with pytest.warns(UserWarning, match="carry .* read without it"):
        loaded = load_model(folder)
    assert torch.equal(logits(loaded), logits(model))


def test_wrapped_names_keep_what_the_model_calls_module():
    assert unwrapped("module.model.layers.0.module.weight") == "model.layers.0.module.weight"
    assert unwrapped("model.layers.0._orig_mod.weight") == "model.layers.0.weight"
    assert unwrapped("model.my_module.weight") == "model.my_module.weight"


def test_what_the_class_has_no_place_for_travels_along(dense, tmp_path):
    extra = {"mtp.layers.0.mlp.up.weight": torch.arange(6.0).reshape(2, 3)}
    rewrite(dense, lambda tensors: tensors.update(extra))
    with pytest.warns(UserWarning, match=r"1 tensors .* travel along as they are: mtp\.layers"):
        model = load_model(dense)
    krony.compress(model, krony.make_plan(model, small=(2, 2)), init="van-loan")
    small = save_model(model, tmp_path / "small")
    with pytest.warns(UserWarning, match="travel along"):
        again = load_model(small)
    again.dequantize()
    folded = save_model(again, tmp_path / "folded")
    for folder in (small, folded):
        (name, value), *_ = extra.items()
        assert torch.equal(load_file(folder / "model.safetensors")[name], value)


def test_states_of_an_optimizer_are_left_out_and_said(dense, tmp_path):
    name = "optimizer.exp_avg.model.norm.weight"
    rewrite(dense, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.warns(UserWarning, match="of an optimizer and are left out"):
        model = load_model(dense)
    saved = save_model(model, tmp_path / "again")
    assert name not in load_file(saved / "model.safetensors")


def test_the_reason_is_said_where_a_message_begins_with_its_head():
    assert first_line(ValueError("can't:\n  * a reason\n  * another")) == "can't: * a reason"
    assert first_line(ValueError("all of it\nmore")) == "all of it"
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError("head:")) == "head:"


def test_an_encoder_is_refused(tmp_path):
    config = hf.BertConfig(**SMALL, intermediate_size=64)
    hf.BertForMaskedLM(config).save_pretrained(tmp_path / "encoder")
    with pytest.raises(KronyError, match=r"is an encoder \(bert\)"):
        load_model(tmp_path / "encoder")
    config.is_decoder = True
    save_model(hf.BertLMHeadModel(config), tmp_path / "decoder")
    assert load_model(tmp_path / "decoder").config.is_decoder


def test_an_adapter_is_no_model(dense):
    (dense / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(KronyError, match="merge it with peft's merge_and_unload"):
        load_model(dense)


@pytest.mark.parametrize(
    "name", ["../dense/model.safetensors", "/etc/passwd", "x.bin", "", None, "a" * 999]
)
def test_an_index_names_files_of_its_own_directory_only(dense, name):
    (dense / "model.safetensors").rename(dense / "other.safetensors")
    index = {"metadata": {}, "weight_map": {UP: name, "model.norm.weight": "other.safetensors"}}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(KronyError, match="which is no safetensors file of that directory"):
        load_model(dense)


def test_code_in_a_directory_is_not_run(dense):
    (dense / "evil.py").write_text("raise SystemExit('ran')")
    reset(dense, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert type(load_model(dense)) is hf.LlamaForCausalLM
    reset(dense, model_type="of-its-own", architectures=["Model"])
    with pytest.raises(KronyError, match="can't load the model"):
        load_model(dense)
