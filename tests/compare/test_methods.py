"""Every rival against its definition, written out the long way."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import krony
from helpers import tiny
from krony.compare import depth, lowrank, own, paper, pruning
from krony.compare.cells import deviation
from krony.compare.evidence import Evidence
from krony.compare.methods import METHODS, chosen
from krony.compression import prices
from krony.compression.judge import influence
from krony.errors import KronyError
from krony.hf.families import blocks, dense_weight
from krony.hf.modeling import config_of
from krony.maths import fit, kron
from krony.measure import info


def evidence(family="llama", **changes):
    """A tiny random model, and tokens to calibrate on."""
    torch.manual_seed(1)
    return Evidence(tiny(family, **changes), torch.randint(96, (6, 24)))


@pytest.fixture(scope="module")
def llama():
    return evidence()


def seen(model, names, ids, gradients=False):
    """Inputs of the named layers in each window, (windows, tokens, n), by plain hooks."""
    found = {name: [] for name in names}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, a, n=n: found[n].append(a[0][0]))
        for n in names
    ]
    with torch.no_grad():
        for row in ids:
            model(input_ids=row[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(rows).double() for name, rows in found.items()}


# Low rank


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_weighted_svd_is_the_truncated_svd_of_the_scaled_matrix(shape):
    """(W S) truncated and S taken off again, as the papers write it."""
    torch.manual_seed(0)
    weight = torch.randn(*shape, dtype=torch.float64)
    x = torch.randn(shape[1], 50, dtype=torch.float64)
    whole, single = torch.linalg.cholesky(x @ x.T), torch.rand(shape[1], dtype=torch.float64) + 0.1
    for scale, s in ((whole, whole), (single, torch.diag(single))):
        u, values, v = torch.linalg.svd(weight @ s, full_matrices=False)
        wanted = (u[:, :4] * values[:4]) @ v[:4] @ torch.linalg.inv(s)
        a, b = lowrank.weighted_svd(weight, scale, 4)
        assert a.shape == (shape[0], 4)
        assert torch.allclose(a @ b, wanted, atol=1e-9)


def test_scales_of_low_rank_are_those_of_their_papers(llama):
    target = llama.targets[-1]
    x = seen(llama.model, [target.name], llama.windows)[target.name].flatten(0, 1)
    assert torch.allclose(lowrank.activation(llama, target), x.abs().mean(0).sqrt(), rtol=1e-4)
    root = lowrank.whitening(llama, target)
    second = x.T @ x / len(x)
    ridge = 1e-6 * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    assert torch.allclose(root @ root.T, second + ridge, atol=1e-4 * float(second.max()))
    model, total = copy.deepcopy(llama.model), 0.0
    weight = model.get_submodule(target.name).weight
    for row in llama.windows:
        loss = model(input_ids=row[None], labels=row[None]).loss
        total = total + torch.autograd.grad(loss, weight)[0].double().square()
    assert torch.allclose(lowrank.fisher(llama, target), total.sum(0).sqrt(), rtol=1e-3)
    assert torch.equal(lowrank.plain(llama, target), torch.ones(48, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_low_rank_models_hold_what_was_fitted(family):
    """Of either layout of weights, each matrix is the best of its rank; biases stay."""
    found = evidence(family)
    made = METHODS["svd"].make(found, 0.6)
    for target in found.targets:
        layer, dense = (
            made.get_submodule(target.name),
            dense_weight(found.module(target)).detach().double(),
        )
        rank = layer.groups[0].terms
        values = torch.linalg.svdvals(dense)
        error = (layer.to_dense(torch.float64).detach() - dense).norm()
        assert error == pytest.approx(float(values[rank:].norm()), rel=1e-4)
        if layer.bias is not None:
            assert torch.equal(layer.bias, found.module(target).bias)


# Structure


def test_scores_of_structured_pruning_are_those_of_their_papers(llama, monkeypatch):
    """Each of them from activations and gradients by plain hooks."""
    given = {}
    monkeypatch.setattr(pruning, "_uniform", lambda e, share, scores: given.update(scores))
    model, ids = llama.model, llama.windows
    down, output = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"
    x = seen(model, [down, output], ids)
    flat = {name: each.flatten(0, 1) for name, each in x.items()}
    weight = {name: model.get_submodule(name).weight.detach().double() for name in x}

    pruning.magnitude(llama, 0.8)
    assert torch.allclose(given[1].units, weight[down].square().sum(0).sqrt())
    assert given[1].groups.shape == (2,)

    pruning.wanda(llama, 0.8)
    scores = {n: (w.abs() * flat[n].square().mean(0).sqrt()).mean(0) for n, w in weight.items()}
    assert torch.allclose(given[1].units, scores[down], rtol=1e-4)
    assert torch.allclose(given[1].groups, scores[output].view(2, 16).sum(1), rtol=1e-4)

    pruning.minitron(llama, 0.8)
    assert torch.allclose(given[1].units, x[down].abs().mean(1).norm(dim=0), rtol=1e-4)
    norms = x[output].view(6, 24, 4, 8).norm(dim=-1).mean(1).norm(dim=0)
    assert torch.allclose(given[1].groups, norms.view(2, 2).sum(1), rtol=1e-4)

    pruning.taylor(llama, 0.8)
    names = {n: p for n, p in model.named_parameters() if "layers.1." in n and "proj" in n}
    loss = sum(model(input_ids=row[None], labels=row[None]).loss for row in ids)
    gradients = torch.autograd.grad(loss, list(names.values()))
    each = {
        n.split(".")[-2]: (p.detach() * g).abs().double()
        for (n, p), g in zip(names.items(), gradients, strict=True)
    }
    wanted = each["gate_proj"].sum(1) + each["up_proj"].sum(1) + each["down_proj"].sum(0)
    assert torch.allclose(given[1].units, wanted, rtol=1e-3)
    rows = [each[name].sum(1).view(2, -1).sum(1) for name in ("q_proj", "k_proj", "v_proj")]
    wanted = sum(rows) + each["o_proj"].sum(0).view(2, -1).sum(1)
    assert torch.allclose(given[1].groups, wanted, rtol=1e-3)


def test_flap_standardizes_and_makes_up_for_the_mean(llama, monkeypatch):
    given = {}

    def adaptive(e, share, scores):
        given.update(scores)
        return original(e, share, scores)

    original = pruning.adaptive
    monkeypatch.setattr(pruning, "adaptive", adaptive)
    made = pruning.flap(llama, 0.7)
    down = "model.layers.0.mlp.down_proj"
    x = seen(llama.model, [down], llama.windows)[down].flatten(0, 1)
    weight = llama.model.get_submodule(down).weight.detach().double()
    score = x.var(0, correction=0) * weight.square().sum(0)
    wanted = (score - score.mean()) / score.std()
    assert torch.allclose(given[0].units, wanted, atol=1e-3)
    layer = made.get_submodule(down)
    kept = wanted.topk(layer.in_features).indices.sort().values
    gone = torch.ones(48, dtype=torch.bool)
    gone[kept] = False
    assert 0 < layer.in_features < 48
    assert torch.equal(layer.weight, weight.float()[:, kept])
    assert torch.allclose(layer.bias.double(), weight[:, gone] @ x.mean(0)[gone], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt"])
def test_a_pruned_model_is_the_dense_one_with_zeros(family):
    """What is cut out is cut out of every matrix that it goes through."""
    found = evidence(family)
    made = pruning.wanda(found, 0.6)
    cut = pruning.uniform(found, 0.6, pruning._by_columns(found, lambda n: _wanda(found, n)))
    zeroed = copy.deepcopy(found.model)
    for i, mlp, attention in pruning._parts(found):
        _keep_columns(zeroed, mlp.down.name, cut[i].units)
        if attention is not None:
            columns = torch.arange(32).view(found.body.sizes.groups, -1)[cut[i].groups].flatten()
            _keep_columns(zeroed, attention.output, columns)
    ids = found.windows[:2]
    with torch.no_grad():
        wanted, got = zeroed(input_ids=ids).logits, made(input_ids=ids).logits
    assert torch.allclose(got, wanted, atol=1e-4)
    assert info.parameters(made) < info.parameters(found.model)


def _wanda(found, name):
    weight = dense_weight(found.model.get_submodule(name)).detach().double()
    return (weight.abs() * found.moments[name].inputs.second.diagonal().sqrt()).mean(0)


def _keep_columns(model, name, columns):
    weight = dense_weight(model.get_submodule(name))
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[columns] = False
    with torch.no_grad():
        weight[:, gone] = 0


def test_llm_pruner_leaves_the_first_and_the_last_blocks_alone():
    found = evidence(num_hidden_layers=16)
    made = pruning.taylor(found, 0.8)
    changed = [
        i
        for i, (name, _, block) in enumerate(blocks(made))
        if block.mlp.down_proj.in_features < 48 or block.self_attn.o_proj.in_features < 32
    ]
    assert changed == list(range(2, 15))


# Depth


def test_depth_takes_out_what_its_scores_say():
    found = evidence(num_hidden_layers=4)
    gone = influence(found.model, found.windows).argsort().tolist()[:2]
    made = depth.block_influence(found, 0.5)
    kept = [b for _, i, b in blocks(found.model) if i not in gone]
    for (_, _, block), original in zip(blocks(made), kept, strict=True):
        assert torch.equal(block.mlp.up_proj.weight, original.mlp.up_proj.weight)
    kept = [blocks(found.model)[i][2] for i in (0, 2)]
    for (_, _, block), original in zip(blocks(depth.every_other(found, 0.5)), kept, strict=True):
        assert torch.equal(block.mlp.up_proj.weight, original.mlp.up_proj.weight)
    losses = depth.losses_without(found)
    alone = depth.without(found.model, [1])
    rows = found.windows[::1][: depth.LOSS_WINDOWS]
    with torch.no_grad():
        mean = sum(float(alone(input_ids=r[None], labels=r[None]).loss) for r in rows) / len(rows)
    assert losses[1] == pytest.approx(mean, rel=1e-5)
    with pytest.raises(KronyError, match="whole blocks"):
        depth.every_other(found, 0.99)


# The paper's


def test_krony_pt_is_the_papers_where_the_paper_has_that_size():
    """At half of the MLPs pruning is the paper's 96M: one factor of 2 x 1 in every matrix."""
    found = evidence("gpt2")
    mlp = sum(math.prod(t.shape) for t in found.targets if t.role in ("up", "down"))
    share = 1 - (0.5 * mlp - 8) / found.matrices  # the small factors are numbers too
    plan = paper.prune_plan(found, share)
    assert plan == krony.make_plan(found.model, small=(2, 1), layout="large-outer")
    made = paper.van_loan(found, 0.8)
    matrix = krony.Plan.from_dict(config_of(made).plan).matrices[0]
    (factors,) = matrix.groups
    assert factors.layout == "large-outer"
    weight = dense_weight(found.model.get_submodule(matrix.name)).detach().double()
    outer, inner = kron.van_loan(weight, *factors.sides, factors.terms, 0)
    wanted = sum(torch.kron(a, b) for a, b in zip(outer, inner, strict=True))
    got = made.get_submodule(matrix.name).to_dense(torch.float64)
    assert torch.allclose(got, wanted, atol=1e-5)
    norm = paper.scaled(found, 0.8).get_submodule(matrix.name).to_dense(torch.float64).norm()
    assert float(norm) == pytest.approx(float(weight.norm()), rel=1e-4)


def test_krony_pt_says_where_mlps_are_not_enough(llama):
    with pytest.raises(KronyError, match="MLPs only"):
        paper.van_loan(llama, 0.1)


# All of them


@pytest.fixture(scope="module")
def five():
    """Blocks enough for methods that take out whole ones, known once for all methods."""
    return evidence(num_hidden_layers=5, intermediate_size=144)


@pytest.mark.parametrize("share", [0.8, 0.6])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_makes_a_model_of_that_size(name, share, five, monkeypatch):
    """To half a percent of the blocks where the method is not one of whole blocks or widths."""
    # Ours search, block by block; rough fits are of the same size.
    found = evidence(intermediate_size=144) if name in ("krony", "krony-plain") else five
    monkeypatch.setattr(prices, "LOW_RANK_PARTS", (0.1,))
    monkeypatch.setattr(prices, "PRICING_STEPS", 1)
    monkeypatch.setattr(fit, "STEPS", 2)
    before = {k: v.clone() for k, v in found.model.state_dict().items()}
    if name == "slicegpt":
        with pytest.raises(KronyError, match="SliceGPT"):
            METHODS[name].make(found, share)
        return
    made = METHODS[name].make(found, share)
    for key, value in found.model.state_dict().items():
        assert torch.equal(value, before[key])  # the dense model stays as it is
    gone = info.parameters(found.model) - info.parameters(made)
    left = 1 - gone / found.matrices
    coarse = {"krony-plain": 0.06, "prune": 0.03, "van-loan": 0.03, "van-loan-scaled": 0.03}
    # Ranks of a toy are few numbers: a whole one is a percent of its matrix.
    assert left == pytest.approx(share, abs=coarse.get(name, 0.012))
    with torch.no_grad():
        assert made(input_ids=found.windows[:1]).logits.isfinite().all()


def test_methods_are_chosen_by_name():
    assert [m.name for m in chosen(["svd,krony", "flap"])] == ["krony", "flap", "svd"]
    assert len(chosen(["all"])) == len(METHODS)
    with pytest.raises(KronyError, match="no method 'svdd'"):
        chosen(["svdd"])
    assert own.factored is METHODS["krony"].make


def test_deviation_is_of_the_blocks():
    assert deviation({"share": 0.79, "budget": 0.8}) == pytest.approx(-0.01)
    assert math.isnan(deviation({"budget": 0.8}))
    assert replace(METHODS["svd"], name="other").name == "other"
