"""Which matrices are found in which architecture."""

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from helpers import FAMILIES, tiny
from krony import KronyError, make_plan
from krony.hf.families import find_targets

# Names in one block, in order: MLP up matrices, down matrix, attention. Hidden axis of the tiny
# models: 128 for GPT-2 and GPT-Neo (4 x 32), 48 with gates, else 64.
MLP = {
    "gpt2": (["mlp.c_fc"], "mlp.c_proj"),
    "llama": (["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
    "mistral": (["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
    "qwen2": (["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
    "phi3": (["mlp.gate_up_proj"], "mlp.down_proj"),
    "gpt_neox": (["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h"),
    "opt": (["fc1"], "fc2"),
    "gpt_neo": (["mlp.c_fc"], "mlp.c_proj"),
    "phi": (["mlp.fc1"], "mlp.fc2"),
}
ATTENTION = {
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "phi3": ["self_attn.o_proj", "self_attn.qkv_proj"],
    "gpt_neox": ["attention.dense", "attention.query_key_value"],
    "llama": ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"],
}


def in_block(targets, layer=0):
    return {t.name.split(f".{layer}.", 1)[1]: t for t in targets if t.layer == layer}


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_matrices_and_their_roles(family):
    found = find_targets(tiny(family), "mlp")
    ups, down = MLP[family]
    for layer in (0, 1):
        block = in_block(found, layer)
        assert {n for n, t in block.items() if t.role == "up"} == set(ups)
        assert {n for n, t in block.items() if t.role == "down"} == {down}
        hidden = block[down].shape[1]
        for name in ups:
            fused = 2 if family == "phi3" else 1
            assert block[name].shape == (fused * hidden, 32)
            assert block[name].hidden == hidden
        assert block[down].shape == (32, hidden)
    assert len(found) == 2 * (len(ups) + 1)
    assert all(t.conv1d == (family == "gpt2") for t in found)


@pytest.mark.parametrize("family", ATTENTION)
def test_attention_matrices(family):
    assert sorted(in_block(find_targets(tiny(family), "attention"))) == ATTENTION[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_is_both_and_leaves_the_embeddings_alone(family):
    model = tiny(family)
    names = {t.name for t in find_targets(model, "all")}
    parts = [{t.name for t in find_targets(model, part)} for part in ("mlp", "attention")]
    assert names == parts[0] | parts[1]
    assert not any("head" in n or "embed" in n or "wte" in n for n in names)


def test_patterns_reach_anything_and_know_what_structure_knows(gpt2):
    (found,) = find_targets(gpt2, "*.h.1.mlp.c_fc")
    assert (found.role, found.layer, found.hidden) == ("up", 1, 128)
    (head,) = find_targets(tiny("llama"), "lm_head")  # not tied in Llama
    assert (head.role, head.shape) == ("other", (96, 32))


def test_a_router_is_no_mlp():
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    with pytest.raises(KronyError, match="no mlp matrices were found in MixtralForCausalLM"):
        find_targets(model, "mlp")


def test_a_pattern_that_matches_nothing_names_near_ones(gpt2):
    with pytest.raises(KronyError, match=r"near names: .*transformer\.h\.0\.mlp\.c_fc"):
        find_targets(gpt2, "transformer.h.0.mlp.c_fcc")


def test_a_tied_output_matrix_is_refused(gpt2):
    with pytest.raises(KronyError, match="lm_head shares its weight"):
        find_targets(gpt2, "lm_head")


def test_fused_gate_and_up_get_the_same_small_factor():
    plan = make_plan(tiny("phi3"), shape=(24, 16))
    smalls = {m.name.split(".")[-1]: m.groups[0].small for m in plan.matrices}
    assert smalls == {"gate_up_proj": (2, 2), "down_proj": (2, 2)}
