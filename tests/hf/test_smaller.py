"""Ordinary, smaller models: every family, against the old model with zeros for what is gone."""

import pytest
import torch
import transformers as hf

from helpers import FAMILIES, LLAMA, SMALL, TOKENS, logits, tiny
from krony import KroneckerLinear, KronyError
from krony.hf.families import dense_weight
from krony.hf.smaller import Kept, Sizes, anatomy, columns_of, skipped, smaller

WITH_HEADS = [name for name in FAMILIES if anatomy(tiny(name)).sizes.groups > 1]


def without_units(model: hf.PreTrainedModel, every: int) -> tuple[Sizes, dict[int, Kept]]:
    """Every so manieth hidden unit stays, with the column it had."""
    body, kept = anatomy(model), {}
    for i, part in enumerate(body.parts):
        units = torch.arange(0, body.sizes.width, every)
        down = model.get_submodule(part.mlp.down.name)
        kept[i] = Kept(units, (dense_weight(down)[:, units], down.bias))
    sizes = body.sizes
    return Sizes(sizes.width // every, sizes.groups, sizes.heads, sizes.blocks), kept


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_units_are_what_zeros_are(family):
    model = tiny(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = smaller(model, anatomy(model), *without_units(model, 2))
    assert type(made) is type(model)
    assert not any(isinstance(m, KroneckerLinear) for m in made.modules())
    for index, what in without_units(model, 2)[1].items():
        down = dense_weight(model.get_submodule(anatomy(model).parts[index].mlp.down.name))
        with torch.no_grad():
            stay = torch.zeros(down.shape[1], dtype=torch.bool)
            stay[what.units] = True
            down[:, ~stay] = 0
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in before.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_less_loads_as_any_model_does(family, tmp_path):
    model = tiny(family)
    body = anatomy(model)
    sizes = Sizes(body.sizes.width, body.sizes.groups, body.sizes.heads, 1)
    made = smaller(model, body, sizes, {1: Kept()})
    with skipped(model, [0]):
        wanted = logits(model)
    torch.testing.assert_close(logits(made), wanted, rtol=1e-4, atol=1e-5)
    made.save_pretrained(tmp_path / "one")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(again), logits(made))
    assert again.config.num_hidden_layers == 1


@pytest.mark.parametrize("family", WITH_HEADS)
def test_a_group_of_heads_less(family):
    model = tiny(family)
    body, kept = anatomy(model), {}
    heads, groups = torch.tensor([2]), torch.tensor([1])  # the first of the second group
    for i, part in enumerate(body.parts):
        output = model.get_submodule(part.attention.output)
        columns = columns_of(heads, body.head_size)
        kept[i] = Kept(heads=heads, groups=groups)
        kept[i].output = (dense_weight(output)[:, columns], output.bias)
    made = smaller(model, body, Sizes(body.sizes.width, 1, 1, body.sizes.blocks), kept)
    config = made.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (1, 1)
    assert config.head_dim == body.head_size
    for i in kept:
        output = dense_weight(model.get_submodule(body.parts[i].attention.output))
        with torch.no_grad():
            stay = torch.zeros(output.shape[1], dtype=torch.bool)
            stay[columns_of(heads, body.head_size)] = True
            output[:, ~stay] = 0
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-5)


def test_what_no_configuration_can_say():
    torch.manual_seed(0)
    bloom = hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, **TOKENS)
    ).eval()
    with pytest.raises(KronyError, match=r"does not state the width of its MLPs \(128\)"):
        smaller(bloom, anatomy(bloom), *without_units(bloom, 2))


def test_the_model_that_is_given_stays_as_it_is():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **LLAMA, **TOKENS)).eval()
    before, wanted = model.config.to_dict(), logits(model)
    smaller(model, anatomy(model), *without_units(model, 4))
    assert model.config.to_dict() == before
    assert torch.equal(logits(model), wanted)
