"""The factored embedding: lookup, tie, saving, folding, training; its metric and closed form."""

import json

import pytest
import torch
import transformers as hf

from helpers import group_dense, logits, tiny
from krony import (
    Factors,
    KroneckerEmbedding,
    KroneckerLinear,
    KronyError,
    compress,
    make_budget_plan,
    make_plan,
)
from krony.compression import embedding as embeddings
from krony.compression.embedding import RowMetric, Use, WeightedSVD
from krony.hf.families import blocks, find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.maths import fit
from krony.nn.layers import KroneckerGroup

# Without token 1, whose row some families keep at zero: a norm's gradient there is enormous.
WINDOWS = torch.randint(2, 96, (32, 16), generator=torch.Generator().manual_seed(1))
SHAPES = [Factors((96, 1), (1, 32), 5), Factors((24, 8), (4, 4), 3), Factors((4, 4), (24, 8), 2)]
LOW_RANK = {"small": (1, 32), "terms": 8}  # of any matrix with 32 inputs


def wide(family, tied, **changes):
    """A random model whose errors matter: small weights would leave every logit alike."""
    model = tiny(family, tie_word_embeddings=tied, **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


def factored(family, tied, init="van-loan", **choices):
    model = wide(family, tied)
    plan = make_plan(model, target="embedding", **({"small": (4, 4), "terms": 3} | choices))
    return compress(model, plan, init=init, calibration=WINDOWS)


def ends(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


@pytest.mark.parametrize("layout", ["small-outer", "large-outer"])
@pytest.mark.parametrize("scalars", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_lookup_and_output_are_those_of_the_dense_matrix(shape, scalars, layout):
    group = KroneckerGroup(shape.large, shape.small, shape.terms, layout, scalars).double()
    if scalars:
        torch.nn.init.normal_(group.scalars)
    layer = KroneckerEmbedding(96, 32, [group])
    dense, ids = group_dense(group), torch.tensor([[0, 95, 7], [7, 31, 50]])
    torch.testing.assert_close(layer(ids), dense[ids])
    torch.testing.assert_close(layer.weight, dense)
    x = torch.randn(3, 32, dtype=torch.float64)
    head = layer.tied_linear()
    torch.testing.assert_close(head(x), x @ dense.T)
    assert {id(p) for p in head.parameters()} == {id(p) for p in layer.parameters()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("choices", [{}, {"scalars": True}, LOW_RANK])
def test_saves_loads_shards_and_folds(family, tied, choices, tmp_path):
    model = factored(family, tied, **choices)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a", max_shard_size="4KB")
    files = list((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert torch.equal(logits(again), expected)
    lookup, head = ends(again)
    assert isinstance(lookup, KroneckerEmbedding)
    assert isinstance(head, KroneckerLinear)
    assert (lookup.groups[0].small is head.groups[0].small) == tied
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    stored = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    keys = stored["weight_map"]
    assert any(k.startswith("lm_head.groups") for k in keys) != tied
    again.save_pretrained(tmp_path / "b")
    third = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(logits(third), expected)
    third.dequantize()
    lookup, head = ends(third)
    assert type(lookup) is torch.nn.Embedding
    assert (lookup.weight is head.weight) == tied
    torch.testing.assert_close(logits(third), expected, rtol=1e-4, atol=1e-4)
    third.save_pretrained(tmp_path / "dense")
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert torch.equal(logits(plain), logits(third))
    assert (ends(plain)[0].weight is ends(plain)[1].weight) == tied
    third.resize_token_embeddings(100)  # an ordinary model again


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_base_model_loads_and_half_precision_stays_tied(family, tmp_path):
    shape = Factors((96, 1), (1, 32), 8, interpolative=True)
    model = wide(family, True)
    (target,) = find_targets(model, "embedding")
    compress(model, Plan((matrix_plan(target, (shape,)),)), init="van-loan").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    base = hf.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.get_input_embeddings().weight, ends(model)[0].weight)
    base.save_pretrained(tmp_path / "base")
    grown = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    whole = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(grown), logits(whole))
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    again.tie_weights()
    again.float().to("cpu")
    lookup, head = ends(again)
    assert lookup.groups[0].large.weight is head.groups[0].large.weight
    assert again.dtype == torch.float32


def test_both_uses_train_the_shared_factors():
    model = factored("llama", True).train()
    lookup, head = ends(model)
    ids = torch.arange(20).reshape(2, 10)
    hidden = model.model(input_ids=ids).last_hidden_state
    head(hidden.detach()).square().sum().backward()
    by_output = lookup.groups[0].small.grad.clone()
    model.zero_grad()
    hidden.square().sum().backward()
    by_lookup = lookup.groups[0].small.grad.clone()
    assert min(float(by_output.norm()), float(by_lookup.norm())) > 0
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimiser.step()
    assert torch.equal(lookup.to_dense(), head.to_dense())


def test_resizing_is_refused_in_one_sentence():
    for tied in (True, False):
        with pytest.raises(KronyError, match="the embedding is factored, so tokens can't be added"):
            factored("gpt2", tied).resize_token_embeddings(100)


def test_targets_by_name_by_list_and_twice():
    tied, untied = tiny("gpt2"), tiny("llama")
    assert [(t.name, t.role, t.tied) for t in find_targets(tied, "embedding")] == [
        ("transformer.wte", "embedding", True)
    ]
    assert [(t.name, t.role) for t in find_targets(untied, "embedding")] == [
        ("model.embed_tokens", "embedding"),
        ("lm_head", "head"),
    ]
    everything = find_targets(untied, "everything")
    assert everything == find_targets(untied, "embedding, attention,mlp,*.gate_proj")
    assert len(everything) == len(find_targets(untied, "all")) + 2
    assert [b[0] for b in blocks(factored("gpt2", True))] == [b[0] for b in blocks(tied)]
    with pytest.raises(KronyError, match="is a KroneckerEmbedding, factored already"):
        find_targets(factored("gpt2", True), "embedding")


def test_costs_of_a_lookup_and_of_a_tied_output():
    shape = Factors((96, 1), (1, 32), 4)
    for family, tied in (("gpt2", True), ("llama", False)):
        plan = make_plan(wide(family, tied), target="embedding", small=(1, 32), terms=4)
        first = plan.matrices[0]
        assert first.parameters == shape.parameters
        assert first.dense_multiply_adds == (96 * 32 if tied else 0)
        assert first.multiply_adds == 4 * 32 + (shape.multiply_adds if tied else 0)
        assert first.reads == (shape.parameters if tied else 4 * 33)


# The metric and the closed form.


def metric(uses=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(uses):
        root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        made.append(Use(torch.rand(30, generator=generator).double() + 0.01, root @ root.T))
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    return weight, RowMetric(tuple(made))


def test_the_harms_of_all_ranks_are_those_of_the_factors():
    weight, form = metric()
    svd = WeightedSVD.of(weight, form)
    harms = svd.harms(form)
    assert harms[0] == pytest.approx(form.harm(weight))
    for rank in range(1, 9):
        outer, inner = svd.pair(rank)
        dense = torch.einsum("rvi,rid->vd", outer, inner)
        assert float(harms[rank]) == pytest.approx(form.harm(weight - dense), abs=1e-9)


def test_one_use_is_the_whitened_svd():
    weight, form = metric(uses=1)
    full = fit.Metric(torch.diag(form.uses[0].rows), form.uses[0].columns)
    expected = fit.low_rank_harm(weight, full).tolist()
    harms = WeightedSVD.of(weight, form).harms(form)
    assert harms.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", False)])
def test_predicted_harm_is_the_divergence_for_small_errors(family, tied):
    """The quadratic form against the KL divergence itself, for a small random error."""
    windows = torch.randint(2, 96, (128, 32), generator=torch.Generator().manual_seed(3))
    model = wide(family, tied)
    for target in find_targets(model, "embedding"):
        form = embeddings.calibrate(model, windows, [target])[target.name]
        module = model.get_submodule(target.name)
        torch.manual_seed(0)
        delta = torch.randn(target.shape) * 0.02 * float(module.weight.detach().std())
        with torch.no_grad():
            before = model(input_ids=windows).logits.log_softmax(-1)
            module.weight += delta
            after = model(input_ids=windows).logits.log_softmax(-1)
            module.weight -= delta
        real = float((before.exp() * (before - after)).sum(-1).mean())
        # The frequency is what the model expects; this text is uniform noise.
        assert form.harm(delta.double()) == pytest.approx(real, rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", False)])
@pytest.mark.parametrize("choices", [LOW_RANK, {"small": (4, 4), "terms": 6}])
@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_data_beats_van_loan_on_its_own_measure(family, tied, choices):
    windows = torch.randint(2, 96, (64, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        reference = wide(family, tied)(input_ids=windows).logits.log_softmax(-1)
    errors = {}
    for init in ("van-loan", "data"):
        model = wide(family, tied)
        plan = make_plan(model, target="embedding", **choices)
        compress(model, plan, init=init, calibration=windows)
        with torch.no_grad():
            after = model(input_ids=windows).logits.log_softmax(-1)
        errors[init] = float((reference.exp() * (reference - after)).sum(-1).mean())
    assert 0 < errors["data"] < errors["van-loan"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", False)])
@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_a_whole_model_budget_decides_over_everything(family, tied, tmp_path):
    """The embedding of this model has rank 4, so giving up the rest of it costs nothing."""
    model = wide(family, tied)
    with torch.no_grad():
        for weight in {end.weight for end in ends(model)}:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_((u[:, :4] * s[:4]) @ v[:4])
    before = sum(p.numel() for p in model.parameters())
    goal = int(0.8 * before)
    found = make_budget_plan(model, WINDOWS, parameters=goal, target="everything")
    compress(model, found.plan, init="data", calibration=WINDOWS, moments=found.moments)
    assert 0.95 * goal < sum(p.numel() for p in model.parameters()) <= goal
    names = {m.name for m in found.plan.matrices} | {t.name for t in found.dense}
    assert names == {t.name for t in find_targets(wide(family, tied), "everything")}
    assert isinstance(ends(model)[0], KroneckerEmbedding)
    assert ends(model)[0].groups[0].terms <= 5
    assert ends(model)[0].groups[0].order is not None
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    again.dequantize()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
