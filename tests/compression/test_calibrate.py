"""Streaming moments against moments of everything at once; the data initialization; budgets."""

import itertools
from functools import partial

import pytest
import torch

from helpers import FAMILIES, logits, scaled_logits, tiny
from krony import Factors, KroneckerLinear, KronyError, MatrixPlan, Plan, compress, make_plan
from krony.compression import calibrate as calibration
from krony.compression.budget import make_budget_plan
from krony.compression.limits import Candidate, choose
from krony.compression.prices import Matrix, low_rank_candidates
from krony.compression.sequential import DataOptions, writes_the_stream
from krony.compression.work import Work
from krony.hf import replay
from krony.hf.families import blocks, dense_weight, find_targets
from krony.words import parse_count

WINDOWS = torch.randint(96, (24, 16), generator=torch.Generator().manual_seed(1))


def names(model, target="mlp"):
    return [t.name for t in find_targets(model, target)]


def log_probabilities(model, windows):
    with torch.no_grad():
        return model(input_ids=windows).logits.double().log_softmax(-1)


def inputs_of(model, name):
    with replay.captured({name: model.get_submodule(name)}, False) as seen, torch.no_grad():
        model(input_ids=WINDOWS)
    return seen[name].reshape(-1, seen[name].shape[-1]).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_moments_are_the_moments(family):
    model = tiny(family)
    found = calibration.calibrate(model, WINDOWS, names(model), batch=5)
    assert list(found) == names(model)
    for name in (names(model)[0], names(model)[-1]):
        x = inputs_of(model, name)
        entry = found[name]
        assert entry.inputs.tokens == entry.tokens == WINDOWS.numel()
        torch.testing.assert_close(entry.inputs.mean, x.mean(0), rtol=1e-4, atol=1e-5)
        covariance = torch.cov(x.T, correction=0)
        torch.testing.assert_close(entry.inputs.covariance, covariance, rtol=1e-3, atol=1e-5)
        values = torch.linalg.eigvalsh(entry.gradient)
        assert float(values.min()) > -1e-6 * float(values.max())
        assert float(values.max()) > 0
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_an_output_matrix_among_the_names_has_its_inputs_either_way():
    with_gradients, without = (
        calibration.calibrate(tiny("llama"), WINDOWS, ["lm_head"], gradients=gradients)["lm_head"]
        for gradients in (True, False)
    )
    assert with_gradients.inputs.tokens == without.inputs.tokens == WINDOWS.numel()
    torch.testing.assert_close(with_gradients.inputs.second, without.inputs.second)


def test_shared_inputs_are_collected_once():
    model = tiny("llama")
    found = calibration.calibrate(model, WINDOWS, names(model, "all"), gradients=False)
    by_name = {name.split(".", 2)[2]: m.inputs for name, m in found.items() if ".0." in name}
    assert by_name["0.mlp.gate_proj"] is by_name["0.mlp.up_proj"]
    assert by_name["0.self_attn.q_proj"] is by_name["0.self_attn.v_proj"]
    assert len({id(i) for i in by_name.values()}) == 4
    assert found["model.layers.0.mlp.up_proj"].gradient is None


@pytest.mark.slow
def test_predicted_harm_is_the_divergence_for_small_errors():
    """½ tr(G Δ C Δᵀ) against the KL divergence itself, for a small random error in one matrix."""
    from krony.maths.fit import Metric

    torch.manual_seed(0)
    model = tiny("gpt2")
    with torch.no_grad():  # a sharper model than the random one, so that there is a gradient
        for p in model.parameters():
            p.mul_(3.0)
    windows = torch.randint(96, (128, 32))
    name = "transformer.h.1.mlp.c_proj"
    entry = calibration.calibrate(model, windows, [name])[name]
    weight = model.get_submodule(name).weight
    delta = torch.randn(weight.shape, dtype=torch.float64).T * 0.01
    metric = Metric(entry.gradient, entry.inputs.second)
    with torch.no_grad():
        before = model(input_ids=windows).logits.log_softmax(-1)
        weight += delta.T.float()
        after = model(input_ids=windows).logits.log_softmax(-1)
    real = float((before.exp() * (before - after)).sum(-1).mean())
    assert metric.harm(delta) == pytest.approx(real, rel=0.25)


def test_the_product_in_blocks_is_the_product():
    generator = torch.Generator().manual_seed(0)
    for width in (5, 768, 1000):
        x = torch.randn(40, width, generator=generator)
        found = calibration.gram(x)
        torch.testing.assert_close(found, (x.T @ x).double(), rtol=1e-5, atol=1e-4)
        assert torch.equal(found, found.T)


@pytest.mark.parametrize("pieces", [1, 7, 384])
@pytest.mark.parametrize("make", [lambda: tiny("gpt2"), scaled_logits])
def test_the_backward_pass_in_pieces_is_that_of_the_sampled_labels(monkeypatch, make, pieces):
    """Against autograd on -log p of the same labels."""
    model = make()
    name = names(model)[0]
    drawn = []
    monkeypatch.setattr(calibration, "LOGITS", pieces * 96)
    search = torch.searchsorted
    monkeypatch.setattr(
        torch, "searchsorted", lambda *a, **k: drawn.append(search(*a, **k)) or drawn[-1]
    )
    found = calibration.calibrate(model, WINDOWS, [name], batch=24)[name]
    labels = torch.cat(drawn).flatten()
    with replay.captured({name: model.get_submodule(name)}, True, detach=False) as seen:
        logs = model(input_ids=WINDOWS).logits.log_softmax(-1).flatten(0, 1)
    gradient = torch.autograd.grad(-logs.gather(1, labels[:, None]).sum(), seen[name])[0]
    flat = gradient.flatten(0, 1).double()
    torch.testing.assert_close(
        found.gradient, flat.T @ flat / len(flat), rtol=1e-3, atol=1e-6 * float(flat.square().max())
    )


def test_labels_are_drawn_from_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0]).log().expand(20_000, 5)
    logits = logits.clone().requires_grad_()
    calibration.backward_from_samples(logits, torch.nn.Identity(), 5, generator)
    counts = (logits.grad - logits.detach().exp()).lt(-0.5).double().mean(0)
    expected = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(counts, expected, rtol=0.05, atol=1e-9)


def test_few_tokens_warn_with_the_number_needed(gpt2):
    with pytest.warns(UserWarning, match="32 calibration tokens are few for 128 .* at least 2560"):
        compress(gpt2, make_plan(gpt2, small=(2, 2)), init="data", calibration=WINDOWS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_data_beats_van_loan_on_its_own_measure(family):
    """Less divergence from the dense model than Van Loan, at the same shapes."""
    windows = torch.randint(96, (64, 16), generator=torch.Generator().manual_seed(2))
    reference = log_probabilities(tiny(family), windows)
    errors = {}
    for init in ("van-loan", "data"):
        model = tiny(family)
        plan = make_plan(model, small=(4, 4), terms=4, target="all")
        compress(model, plan, init=init, calibration=windows)
        after = log_probabilities(model, windows)
        errors[init] = float((reference.exp() * (reference - after)).sum(-1).mean())
    assert 0 < errors["data"] < errors["van-loan"]


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_every_ingredient_can_be_switched_off_and_changes_the_factors():
    plan = make_plan(tiny("gpt2"), small=(4, 4), terms=2)
    states = {}
    for off in ("none", "sequential", "bias", "centered", "gradients", "residual"):
        options = DataOptions(**({} if off == "none" else {off: False}))
        model = compress(tiny("gpt2"), plan, init="data", calibration=WINDOWS, options=options)
        states[off] = model.state_dict()
        assert torch.isfinite(logits(model)).all(), off
    whole = states.pop("none")
    for off, state in states.items():
        assert any(not torch.equal(whole[k], state[k]) for k in whole), off


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_enough_terms_leave_the_model_as_it_was(gpt2):
    expected = logits(gpt2)
    plan = make_plan(gpt2, small=(2, 2), terms=4)
    compress(gpt2, plan, init="data", calibration=WINDOWS)
    torch.testing.assert_close(logits(gpt2), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_the_bias_removes_the_mean_error_exactly(gpt2):
    """On the calibration text, what the last block leaves has the mean of the dense model."""
    name = "transformer.ln_f"
    goal = inputs_of(gpt2, name).mean(0)
    plan = make_plan(gpt2, small=(8, 8), terms=2)
    compress(gpt2, plan, init="data", calibration=WINDOWS)
    torch.testing.assert_close(inputs_of(gpt2, name).mean(0), goal, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "writers"), [("gpt2", 1), ("llama", 1), ("gpt_neox", 2)])
def test_the_matrices_that_write_the_residual_stream_are_found(family, writers):
    """The MLP's last one; in GPT-NeoX's parallel blocks attention's too, but not in others."""
    model = tiny(family)
    ((_, _, block), *_) = blocks(model)
    stream = replay.BlockStream(model, [block], WINDOWS, 4)
    linear = [
        name for name, m in block.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2
    ]
    with torch.no_grad():
        found = [
            name for name in linear if writes_the_stream(stream, 0, block, stream.hidden[0], [name])
        ]
    assert len(found) == writers
    assert any(name.endswith(("mlp.c_proj", "down_proj", "4h_to_h")) for name in found)


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_later_matrices_make_up_for_the_error_of_earlier_ones(gpt2):
    """The last block's output comes closer to the dense model's than without the ingredient."""
    reference = inputs_of(gpt2, "transformer.ln_f")
    plan = make_plan(gpt2, small=(8, 8), terms=6)
    errors = []
    for residual in (True, False):
        model = tiny("gpt2")
        options = DataOptions(residual=residual, gradients=False)
        compress(model, plan, init="data", calibration=WINDOWS, options=options)
        errors.append(float((inputs_of(model, "transformer.ln_f") - reference).norm()))
    assert errors[0] < errors[1]


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_data_is_deterministic():
    plan = make_plan(tiny("gpt2"), small=(4, 4), terms=2)
    states = []
    for _ in range(2):
        model = compress(tiny("gpt2"), plan, init="data", calibration=WINDOWS, seed=3)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_half_precision_models_are_fitted_in_float32():
    model = tiny("gpt2").to(torch.bfloat16)
    compress(model, make_plan(model, small=(2, 2)), init="data", calibration=WINDOWS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_a_matrix_outside_of_the_blocks_is_refused():
    model = tiny("opt", word_embed_proj_dim=16)
    plan = make_plan(model, small=(2, 2), target="*.project_in")
    with pytest.raises(KronyError, match="project_in is outside of the model's blocks"):
        compress(model, plan, init="data", calibration=WINDOWS)


def test_self_calibration_is_seeded(gpt2):
    first, second = (calibration.calibration_windows("self", gpt2, None, 5, 12) for _ in range(2))
    assert first.shape == (5, 12)
    assert torch.equal(first, second)
    with pytest.raises(KronyError, match="0 calibration windows can't be"):
        calibration.calibration_windows("self", gpt2, None, 0)
    with pytest.raises(KronyError, match="use self instead"):
        calibration.calibration_windows("wikitext2", gpt2, None)


# Budgets.


def candidates(seed, matrices=4, options=5):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(matrices):
        costs = sorted(torch.randint(1, 100, (options,), generator=generator).tolist())
        harms = sorted(torch.rand(options, generator=generator).tolist(), reverse=True)
        made.append(
            [Candidate((), cost, cost, harm) for cost, harm in zip(costs, harms, strict=True)]
        )
    return made


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_exact_and_within_its_budget(seed):
    rows = candidates(seed)
    least = sum(row[0].parameters for row in rows)
    for budget in (least, least + 30, least + 120):
        chosen = choose(rows, {"parameters": budget})
        assert sum(c.parameters for c in chosen) <= budget
        best = min(
            sum(c.harm for c in pick)
            for pick in itertools.product(*rows)
            if sum(c.parameters for c in pick) <= budget
        )
        assert sum(c.harm for c in chosen) == pytest.approx(best, rel=1e-3)


def test_a_budget_below_the_least_is_refused():
    rows = candidates(0)
    least = sum(row[0].parameters for row in rows)
    with pytest.raises(KronyError, match=f"smallest factors take {least}"):
        choose(rows, {"parameters": least - 1})


def test_the_budget_goes_where_the_harm_is():
    """A model whose last block hardly matters keeps little of it, and beats uniform shares."""
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(0.01)
        model.transformer.h[1].mlp.c_proj.bias.mul_(0.01)
    windows = torch.randint(96, (64, 16), generator=torch.Generator().manual_seed(2))
    found = make_budget_plan(model, windows, share=0.3)
    total = sum(t.shape[0] * t.shape[1] for t in find_targets(model, "mlp"))
    planned = {m.name: m.parameters for m in found.plan.matrices}
    dense = [t for t in find_targets(model, "mlp") if t.name not in planned]
    assert sum(planned.values()) + sum(t.shape[0] * t.shape[1] for t in dense) <= 0.3 * total
    first, last = (planned.get(f"transformer.h.{i}.mlp.c_fc", 4096) for i in (0, 1))
    assert first > 2 * last
    uniform = sum(
        min(
            c.harm
            for c in low_rank_candidates(
                t,
                partial(
                    Matrix, t, dense_weight(model.get_submodule(t.name)), found.moments[t.name]
                ),
                Work(),
            )
            if c.parameters <= 0.3 * t.shape[0] * t.shape[1]
        )
        for t in find_targets(model, "mlp")
    )
    assert found.harm < uniform


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_parameters_of_the_whole_model_and_throughput():
    model = tiny("llama")
    before = sum(p.numel() for p in model.parameters())
    found = make_budget_plan(model, WINDOWS, parameters=before - 5000, target="all", sums=True)
    after = before - found.plan.dense_parameters + found.plan.parameters
    assert before - 6500 < after <= before - 5000
    compress(model, found.plan, init="data", calibration=WINDOWS, moments=found.moments)
    assert sum(p.numel() for p in model.parameters()) == after
    assert any(isinstance(m, KroneckerLinear) for m in model.modules())
    fast = make_budget_plan(
        tiny("llama"), WINDOWS, share=0.5, objective="throughput", sums=True
    ).plan
    assert all(g.large[1] == 1 for m in fast.matrices for g in m.groups)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "give a budget"),
        ({"share": 0.5, "parameters": 100}, "not both"),
        ({"share": 1.5}, "a budget of 1.5 is no share"),
        ({"parameters": 10}, "a model of 10 parameters can't be"),
        ({"share": 0.5, "objective": "beauty"}, "no objective 'beauty'"),
    ],
)
def test_budgets_that_cannot_be(gpt2, wrong, message):
    with pytest.raises(KronyError, match=message):
        make_budget_plan(gpt2, WINDOWS, **wrong)


def test_counts_are_read():
    assert parse_count("81M") == 81_000_000
    assert parse_count("81972576") == 81_972_576
    with pytest.raises(KronyError, match="write for example 81M"):
        parse_count("many")


def test_mixed_groups_are_fitted_on_data(gpt2):
    groups = (Factors((128, 1), (1, 32), 2), Factors((16, 4), (8, 8), 4))
    plan = Plan((MatrixPlan("transformer.h.0.mlp.c_fc", (128, 32), groups, conv1d=True),))
    windows = torch.randint(96, (192, 16), generator=torch.Generator().manual_seed(2))
    reference = logits(tiny("gpt2"))
    errors = []
    for part in (groups, groups[:1], groups[1:]):
        matrix = MatrixPlan("transformer.h.0.mlp.c_fc", (128, 32), part, conv1d=True)
        model = compress(tiny("gpt2"), Plan((matrix,)), init="data", calibration=windows)
        errors.append(float((logits(model) - reference).norm()))
    assert errors[0] < min(errors[1:])
    assert len(plan.matrices[0].groups) == 2
