"""Initialisations on whole models, and the in-place compression."""

import pytest
import torch

from helpers import FAMILIES, group_dense, logits, tiny
from krony import INITS, Factors, KroneckerLinear, KronyError, MatrixPlan, Plan, compress, make_plan
from krony.hf.families import dense_weight
from krony.hf.modeling import config_of

WEIGHT = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def matrix(*groups, scalars=False):
    return MatrixPlan("m", (12, 8), groups, scalars)


def rebuild(found, plan):
    parts = []
    for terms, factors in zip(found, plan.groups, strict=True):
        outer, inner = terms.ordered(factors)
        parts += [torch.kron(a, b) for a, b in zip(outer, inner, strict=True)]
    return sum(parts)


@pytest.mark.parametrize("layout", ["small-outer", "large-outer"])
@pytest.mark.parametrize("init", INITS)
def test_every_initialisation_gives_the_planned_shapes(init, layout):
    plan = matrix(Factors((6, 4), (2, 2), 1, layout))
    (terms,) = INITS[init](WEIGHT, plan, 0)
    assert terms.large.shape == (1, 6, 4)
    assert terms.small.shape == (1, 2, 2)
    assert rebuild([terms], plan).shape == (12, 8)


def test_errors_rank_as_they_must():
    plan = matrix(Factors((6, 4), (2, 2)))
    dense = {init: rebuild(INITS[init](WEIGHT, plan, 0), plan) for init in INITS}
    error = {init: float((WEIGHT - w).norm()) for init, w in dense.items()}
    assert error["van-loan"] == min(error.values())
    assert error["van-loan"] < error["van-loan-scaled"] < error["random"]
    for init in ("van-loan-scaled", "random"):
        assert float(dense[init].norm()) == pytest.approx(float(WEIGHT.norm()))


def test_scaled_van_loan_puts_alpha_into_the_scalars():
    plan = matrix(Factors((6, 4), (2, 2), 2), scalars=True)
    (terms,) = INITS["van-loan-scaled"](WEIGHT, plan, 0)
    kept = float(rebuild(INITS["van-loan"](WEIGHT, plan, 0), plan).norm())
    alpha = float(WEIGHT.norm()) / kept
    torch.testing.assert_close(terms.scalars, torch.full((2,), alpha, dtype=torch.float64))


def test_groups_are_fitted_one_to_what_the_other_leaves():
    low_rank, kronecker = Factors((12, 1), (1, 8), 2), Factors((6, 4), (2, 2), 1)
    together = matrix(low_rank, kronecker)
    error = float((WEIGHT - rebuild(INITS["van-loan"](WEIGHT, together, 0), together)).norm())
    for alone in (matrix(low_rank), matrix(kronecker)):
        assert error < float((WEIGHT - rebuild(INITS["van-loan"](WEIGHT, alone, 0), alone)).norm())


def test_prune_takes_one_term():
    with pytest.raises(KronyError, match="the plan gives m 2; use one term"):
        INITS["prune"](WEIGHT, matrix(Factors((6, 4), (2, 2), 2)), 0)


@pytest.mark.parametrize("layout", ["small-outer", "large-outer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_set_of_terms_changes_nothing(family, layout):
    """With as many terms as the rearranged matrix has rank, Van Loan is exact."""
    model = tiny(family)
    before = logits(model)
    compress(
        model, make_plan(model, small=(2, 2), terms=4, target="all", layout=layout), init="van-loan"
    )
    assert sum(isinstance(m, KroneckerLinear) for m in model.modules()) >= 8
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_compress_in_place_keeps_bias_dtype_ties_and_mode(gpt2):
    gpt2.to(torch.bfloat16)
    bias = gpt2.transformer.h[0].mlp.c_fc.bias.detach().clone()
    weight = dense_weight(gpt2.transformer.h[0].mlp.c_fc).detach().double()
    assert compress(gpt2, make_plan(gpt2, small=(2, 2)), init="van-loan") is gpt2
    layer = gpt2.transformer.h[0].mlp.c_fc
    assert isinstance(layer, KroneckerLinear)
    assert torch.equal(layer.bias, bias)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert not layer.training
    report = config_of(gpt2).provenance["matrices"]["transformer.h.0.mlp.c_fc"]
    stored = group_dense(layer.groups[0]).detach()
    assert report["norm_kept"] == pytest.approx(
        float(stored.double().norm() / weight.norm()), abs=1e-2
    )
    assert 0 < report["relative_error"] < 1


def test_equal_input_gives_equal_bytes():
    for init in INITS:
        states = []
        for _ in range(2):
            model = tiny("llama")
            torch.manual_seed(len(states))  # the global generator must not matter
            compress(model, make_plan(model, small=(2, 2)), init=init, seed=5)
            states.append(model.state_dict())
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_seed_matters_only_for_random():
    def factors(init, seed):
        model = tiny("gpt2")
        compress(model, make_plan(model, small=(2, 2)), init=init, seed=seed)
        return model.transformer.h[0].mlp.c_fc.groups[0].small

    assert torch.equal(factors("van-loan", 0), factors("van-loan", 1))
    assert not torch.equal(factors("random", 0), factors("random", 1))


def test_a_second_pass_adds_to_the_first(gpt2):
    compress(gpt2, make_plan(gpt2, small=(2, 2)), init="van-loan")
    compress(gpt2, make_plan(gpt2, small=(1, 2), target="attention"), init="prune")
    config = config_of(gpt2)
    assert len(Plan.from_dict(config.plan).matrices) == len(config.provenance["matrices"]) == 8


def test_progress_is_reported(gpt2):
    calls = []
    plan = make_plan(gpt2, small=(2, 2))
    compress(gpt2, plan, progress=lambda *call: calls.append(call), init="van-loan")
    assert calls == [(m.name, i, 4) for i, m in enumerate(plan.matrices, 1)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_and_nothing_is_changed(gpt2, value):
    plan = make_plan(gpt2, small=(2, 2))
    with torch.no_grad():
        gpt2.transformer.h[1].mlp.c_fc.weight[3, 4] = value
    with pytest.raises(KronyError, match=r"h\.1\.mlp\.c_fc has 1 NaN or Inf among its 4096"):
        compress(gpt2, plan, init="van-loan")
    assert not any(isinstance(m, KroneckerLinear) for m in gpt2.modules())


def test_singular_and_zero_matrices_are_factored():
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.zero_()
        model.transformer.h[1].mlp.c_fc.weight.fill_(0.5)
    for init in INITS:
        copy = tiny("gpt2")
        copy.load_state_dict(model.state_dict())
        compress(copy, make_plan(copy, small=(2, 2)), init=init)
        assert torch.isfinite(logits(copy)).all()


def test_plans_that_do_not_fit_the_model(gpt2):
    plan = make_plan(gpt2, small=(2, 2))
    with pytest.raises(KronyError, match="there are van-loan, van-loan-scaled"):
        compress(gpt2, plan, init="magic")
    other = tiny("gpt2", n_embd=64)
    with pytest.raises(KronyError, match="is 256x64 in the model and 128x32 in the plan"):
        compress(other, plan, init="van-loan")
    with pytest.raises(KronyError, match=r"near names: .*mlp"):
        compress(
            tiny("llama"),
            Plan((MatrixPlan("model.layers.0.mlp.up", (48, 32), plan.matrices[0].groups),)),
            init="van-loan",
        )
    compress(gpt2, plan, init="van-loan")
    with pytest.raises(KronyError, match="is factored already"):
        compress(gpt2, plan, init="van-loan")
    with pytest.raises(KronyError, match="factored already"):
        make_plan(gpt2, small=(2, 2))
