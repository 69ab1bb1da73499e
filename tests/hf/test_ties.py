"""What is tied to what: in memory, in the configuration, in the file, in all that krony does."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import logits, tiny
from krony import KroneckerLinear, KronyError, compress, load_model, make_plan, save_model
from krony.export.self_contained import self_contained
from krony.hf import patches, ties
from krony.hf.families import find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.maths.schemes import Factors


def says_tied(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


@pytest.fixture
def contradiction(tmp_path):
    """A directory whose configuration says tied, and which has an output matrix of its own."""
    folder = save_model(tiny("llama", tie_word_embeddings=True), tmp_path / "both")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("target", ["mlp", "embedding", "everything", "lm_head"])
def test_an_output_matrix_of_its_own_stays_one(contradiction, target, tmp_path):
    with pytest.warns(UserWarning, match="a matrix of its own, and is saved as that"):
        model = load_model(contradiction)
    embedding = model.get_input_embeddings()
    assert torch.equal(model.lm_head.weight, 2 * embedding.weight)
    dense = save_model(model, tmp_path / "dense")
    assert not says_tied(dense)
    assert torch.equal(logits(load_model(dense)), logits(model))

    compress(model, make_plan(model, small=(2, 2), target=target), init="van-loan")
    folder = save_model(model, tmp_path / "small")
    alone = self_contained(model, tmp_path / "alone")
    for written in (folder, alone):
        assert not says_tied(written)
        again = load_model(written)
        assert torch.equal(logits(again), logits(model))
        assert not ties.output_is_tied(again)
    made = again.dequantize()
    assert not ties.output_is_tied(made)
    folded = load_model(save_model(made, tmp_path / "folded"))
    torch.testing.assert_close(logits(folded), logits(model), rtol=1e-4, atol=1e-5)


def test_a_head_of_its_own_under_an_old_configuration_that_says_tied(tmp_path):
    model = tiny("llama")
    compress(model, make_plan(model, small=(2, 2), target="everything"), init="van-loan")
    folder = save_model(model, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    again = load_model(folder)
    assert torch.equal(logits(again), logits(model))
    assert not says_tied(save_model(again, tmp_path / "again"))


def test_untied_and_tied_by_hand(tmp_path):
    untied = tiny("gpt2")
    untied.lm_head.weight = nn.Parameter(3 * untied.transformer.wte.weight.detach())
    tied = tiny("llama")
    tied.lm_head.weight = tied.model.embed_tokens.weight
    for model, is_tied in ((untied, False), (tied, True)):
        for name, target in (("dense", None), ("small", "everything")):
            if target is not None:
                compress(model, make_plan(model, small=(2, 2), target=target), init="van-loan")
            folder = save_model(model, tmp_path / f"{name}-{is_tied}")
            assert says_tied(folder) == is_tied
            again = load_model(folder)
            assert ties.output_is_tied(again) == is_tied
            torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_that_takes_the_embedding_for_something_else(tied, tmp_path):
    model = tiny("llama", tie_word_embeddings=tied)
    other = tiny("llama", tie_word_embeddings=not tied)
    target = find_targets(other, "embedding")[0]
    assert target.tied is not tied
    compress(model, Plan((matrix_plan(target, (Factors((48, 16), (2, 2)),)),)), init="van-loan")
    again = load_model(save_model(model, tmp_path / "small"))
    assert again.hf_quantizer.quantization_config.plan["matrices"][0]["tied"] == tied
    assert torch.equal(logits(again), logits(model))
    assert isinstance(again.lm_head, KroneckerLinear) == tied


def test_what_is_right_stays_as_it_is():
    for family in ("gpt2", "llama", "opt"):
        for tied in (True, False):
            model = tiny(family, tie_word_embeddings=tied)
            names = dict(model.all_tied_weights_keys)
            assert not ties.settle(model)
            assert model.all_tied_weights_keys == names
            assert ties.output_is_tied(model) == tied


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["embedding", "head"])
def test_adapters_on_either_side_of_tied_factors_are_refused(family, side):
    peft = pytest.importorskip("peft")
    model = tiny(family, tie_word_embeddings=True)
    compress(model, make_plan(model, small=(2, 2), target="embedding"), init="van-loan")
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {module: name for name, module in model.named_modules()}
    target = f"{names[ends[side]]}.groups.0.large"
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[target]), model)
    with pytest.raises(KronyError, match="adapters can't be on the factors of an embedding"):
        logits(model)


def test_adapters_elsewhere_merge_and_are_not_lost_in_folding(gpt2):
    peft = pytest.importorskip("peft")
    compress(gpt2, make_plan(gpt2, small=(2, 2), target="everything"), init="van-loan")
    config = peft.LoraConfig(r=2, target_modules=r".*mlp.*large", init_lora_weights=False)
    peft.inject_adapter_in_model(config, gpt2)
    expected = logits(gpt2)
    with pytest.raises(KronyError, match=r"mlp\.c_fc\.groups\.0 has an adapter; merge it"):
        gpt2.dequantize()
    from krony.healing.recipe import merge_adapters

    merge_adapters(gpt2)
    torch.testing.assert_close(logits(gpt2), expected, rtol=1e-4, atol=1e-5)
    gpt2.dequantize()
    torch.testing.assert_close(logits(gpt2), expected, rtol=1e-4, atol=1e-5)


def test_ends_that_accelerate_does_not_find_are_found_again():
    model = tiny("gpt2")
    with patches.ends_together(model):
        assert model.get_input_embeddings() is model.transformer.wte, "only where it is factored"
    compress(model, make_plan(model, small=(2, 2), target="embedding"), init="van-loan")
    assert isinstance(model, hf.GPT2LMHeadModel)
    with patches.ends_together(model):
        assert model.get_input_embeddings() is model.get_output_embeddings() is None
    assert model.get_input_embeddings() is model.transformer.wte
    assert model.get_output_embeddings() is model.lm_head
