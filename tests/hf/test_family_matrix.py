"""Fifty decoder classes of transformers, tiny, the whole chain; docs/families.md shows the same."""

import pytest

from family_matrix import FAMILIES, chain, passed, tiny
from krony.hf.families import embedding_scale, find_targets, left_out
from krony.measure.evaluate import context_length

QUICK = ("falcon", "gemma", "biogpt")
# Warnings of few tokens, and of what stays as it is.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_the_whole_chain(family, tmp_path):
    row = chain(family, tmp_path)
    assert passed(row), row


def test_scaled_embeddings_are_known():
    for family, scale in (("gemma", 32**0.5), ("biogpt", 32**0.5), ("xglm", 32**0.5), ("llama", 1)):
        assert embedding_scale(tiny(family).get_input_embeddings()) == pytest.approx(scale)


def test_falcon_s_own_linear_layers_are_found():
    names = {t.name.rpartition(".")[2] for t in find_targets(tiny("falcon"), "all")}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_experts_are_named_with_their_share():
    said = left_out(tiny("mixtral"))
    assert said is not None
    assert "mlp.experts.gate_up_proj" in said
    assert "% of the model" in said
    assert left_out(tiny("llama")) is None


def test_the_context_of_mpt():
    assert context_length(tiny("mpt")) == 64
