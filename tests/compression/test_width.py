"""Hidden units that are taken out: against brute force, in every family, in and out of files."""

import itertools
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn

from helpers import FAMILIES, logits, refused_without_krony, tiny
from krony import Factors, KronyError, Plan, compress
from krony.compression import prices, width
from krony.compression.budget import make_budget_plan
from krony.compression.calibrate import calibrate
from krony.compression.sequential import DataOptions
from krony.compression.structures import widths
from krony.export.quantize import quantize
from krony.hf.families import dense_weight, find_targets, mlps
from krony.hf.modeling import config_of, quantized_of
from krony.hf.plan import matrix_plan
from krony.maths import fit
from krony.measure import info

M, N = 6, 10
WINDOWS = torch.randint(96, (96, 16), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


def spd(n, seed):
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


@pytest.fixture
def weight():
    return torch.randn(M, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def metric():
    return fit.Metric.of(spd(N, 1), spd(M, 2), M)


def least(weight, metric, kept):
    """The least harm with these units, from the normal equations written out with a Kronecker
    product: the oracle."""
    chosen = torch.eye(N, dtype=torch.float64)[list(kept)]
    form = torch.kron(metric.outputs, metric.inputs)  # of Δ, row by row
    basis = torch.einsum("ij,kn->injk", torch.eye(M, dtype=torch.float64), chosen).reshape(
        M * N, -1
    )
    flat = weight.flatten()
    best = torch.linalg.solve(basis.T @ form @ basis, basis.T @ form @ flat)
    delta = flat - basis @ best
    return 0.5 * float(delta @ form @ delta), best.reshape(M, len(kept))


def test_the_order_is_that_of_greedy_elimination(weight, metric):
    left, expected = set(range(N)), []
    while len(left) > 1:
        out = min(left, key=lambda j: least(weight, metric, sorted(left - {j}))[0])
        left.remove(out)
        expected.append(out)
    assert width.elimination(weight, metric).tolist() == [*expected, *left]


@pytest.mark.parametrize("hidden", [2, 5, 9])
def test_what_stays_is_the_best_that_these_units_can_do(weight, metric, hidden):
    found = width.narrow(weight, metric, width.elimination(weight, metric), hidden)
    harm, best = least(weight, metric, found.kept.tolist())
    assert found.harm == pytest.approx(harm, rel=1e-9)
    torch.testing.assert_close(found.down, best)
    assert found.kept.tolist() == sorted(found.kept.tolist())
    other = min(least(weight, metric, kept)[0] for kept in itertools.combinations(range(N), hidden))
    assert other <= found.harm * (1 + 1e-9)


def test_fewer_units_never_do_less_harm(weight, metric):
    order = width.elimination(weight, metric)
    harms = [width.narrow(weight, metric, order, h).harm for h in range(N, 0, -1)]
    assert harms[0] == pytest.approx(0, abs=1e-12)
    assert harms == sorted(harms)


@pytest.mark.slow
def test_of_a_thousand_units_that_come_in_pairs_one_of_each_stays():
    """Steps of many units at once must not take both."""
    generator = torch.Generator().manual_seed(3)
    half = torch.randn(4000, 300, generator=generator, dtype=torch.float64)
    other = half + 0.01 * torch.randn(4000, 300, generator=generator, dtype=torch.float64)
    x = torch.cat([half, other], 1)
    weight = torch.randn(8, 600, generator=generator, dtype=torch.float64)
    metric = fit.Metric.of(x.T @ x / len(x), None, 8)
    kept = width.narrow(weight, metric, width.elimination(weight, metric), 300).kept
    assert sorted((kept % 300).tolist()) == list(range(300))


def narrow_plan(model, share=0.5):
    targets = find_targets(model, "mlp")
    return Plan(tuple(matrix_plan(t.narrowed(int(share * t.hidden)), ()) for t in targets))


def cut(model, options=None):
    return compress(model, narrow_plan(model), init="data", calibration=WINDOWS, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loses_units_and_saves_loads_generates_and_folds(family, tmp_path):
    model = tiny(family)
    found = mlps(model, find_targets(model, "mlp"))
    assert len(found) == 2
    assert all(width.can_narrow(model, mlp) for mlp in found)
    before, shapes = logits(model), [p.shape for p in model.parameters()]
    plan = narrow_plan(model)
    parameters = info.parameters(model)
    # The oracle: the same units, with zeros for the rest in the dense model.
    moments = calibrate(model, WINDOWS, [m.name for m in plan.matrices])
    apart = tiny(family)
    for mlp in found:
        layer = apart.get_submodule(mlp.down.name)
        entry = moments[mlp.down.name]
        bias = layer.bias is not None
        inputs = entry.inputs.weighing(bias)
        metric = fit.Metric.of(inputs, entry.gradient, mlp.down.shape[0])
        old = dense_weight(layer).detach().double()
        units = width.narrow(old, metric, width.elimination(old, metric), mlp.down.hidden // 2)
        new = torch.zeros_like(old)
        new[:, units.kept] = units.down
        with torch.no_grad():
            if bias:
                layer.bias += ((old - new) @ entry.inputs.mean).float()
            dense_weight(layer).copy_(new)
    cut(model, DataOptions(sequential=False))
    expected = logits(model)
    torch.testing.assert_close(expected, logits(apart), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)
    assert plan.parameters == plan.dense_parameters // 2
    assert parameters - info.parameters(model) == sum(m.saved for m in plan.matrices)
    figures = info.model_info(model)
    assert figures["dense_parameters"] == parameters

    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), expected)
    assert again.generate(torch.tensor([[2, 3]]), max_new_tokens=4, min_new_tokens=4).shape[1] == 6
    again.dequantize()
    assert config_of(again) is None
    assert [p.shape for p in again.parameters()] == shapes
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def doubled(family="gpt2"):
    """A model of which every hidden unit of its MLPs is there twice, so that a half is enough, in
    an order that no Kronecker product can use."""
    model = tiny(family)
    with torch.no_grad():
        for mlp in mlps(model, find_targets(model, "mlp")):
            hidden = mlp.down.hidden
            generator = torch.Generator().manual_seed(hidden)
            twice = torch.arange(hidden)[torch.randperm(hidden, generator=generator)] // 2
            dense_weight(model.get_submodule(mlp.down.name)).mul_(10)
            for t in mlp.ups:
                layer = model.get_submodule(t.name)
                rows = width.rows_of(twice, hidden, t.parts)
                weight = dense_weight(layer)
                weight.copy_(10 * weight[rows])  # so that the MLPs of a random model matter
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias[rows])
    return model


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "phi3", "llama"])
def test_units_that_are_there_twice_are_lost_without_loss(family, sequential):
    model = doubled(family)
    expected = logits(model)
    cut(model, DataOptions(sequential=sequential))
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_budget_takes_out_what_is_there_twice(family, monkeypatch):
    # Few candidates, rough fits: without narrowing everything is worse by far.
    monkeypatch.setattr(prices, "LOW_RANK_PARTS", (0.1,))
    monkeypatch.setattr(prices, "PRICING_STEPS", 1)
    monkeypatch.setattr(fit, "STEPS", 3)
    expected = logits(doubled(family))
    errors, harms = [], []
    for narrow in (True, False):
        model = doubled(family)
        found = make_budget_plan(model, WINDOWS, share=0.5, narrow=narrow)
        assert found.plan.parameters <= 0.5 * found.plan.dense_parameters
        assert all(m.narrowed is narrow for m in found.plan.matrices)
        compress(model, found.plan, init="data", calibration=WINDOWS, moments=found.moments)
        errors.append(float((logits(model) - expected).norm()))
        harms.append(found.harm)
    assert errors[0] < 0.5 * errors[1]
    assert harms[0] < 0.2 * harms[1]  # what rounding hides weighs something


def test_half_precision_does_not_keep_units():
    found = make_budget_plan(doubled().to(torch.bfloat16), WINDOWS, share=0.5)
    assert all(m.narrowed for m in found.plan.matrices)


def test_widths_are_sixteenths():
    assert widths(3072)[:3] == [3072, 2688, 2304]
    assert all(w % 192 == 0 for w in widths(3072))
    assert all(w % 8 == 0 for w in widths(100)[1:])
    assert widths(3)[0] == 3


class Normalised(nn.Module):
    """An MLP that normalises its hidden axis, which must not change its width."""

    def __init__(self, mlp):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.fc2(self.norm(torch.relu(self.fc1(x))))


class Grouped(Normalised):
    """One whose code works with fewer units, but mixes them."""

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)).softmax(-1))


@pytest.mark.parametrize("kind", [Normalised, Grouped])
def test_an_mlp_that_needs_all_of_its_units_keeps_them(kind):
    model = tiny("gpt2")
    for block in model.transformer.h:
        block.mlp = kind(block.mlp)
    model.eval()
    targets = find_targets(model, "mlp")
    before = dict(model.state_dict())
    assert not any(width.can_narrow(model, mlp) for mlp in mlps(model, targets))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = make_budget_plan(model, WINDOWS, share=0.5)
    assert not any(m.narrowed for m in found.plan.matrices)


def test_a_part_of_an_mlp_is_not_narrowed():
    model = doubled()
    assert not mlps(model, find_targets(model, "*.c_fc"))
    found = make_budget_plan(model, WINDOWS, share=0.5, target="*.c_fc")
    assert not any(m.narrowed for m in found.plan.matrices)


def test_what_is_refused():
    model = tiny("gpt2")
    plan = narrow_plan(model)
    with pytest.raises(KronyError, match="--init van-loan does not say which; use --init data"):
        compress(model, plan, init="van-loan")
    partner = Plan(plan.matrices[1:])
    with pytest.raises(KronyError, match=r"hidden units out of transformer\.h\.0\.mlp, but not"):
        compress(model, partner, init="data", calibration=WINDOWS)
    first = replace(plan.matrices[0], shape=(32, 32))
    uneven = Plan((first, *plan.matrices[1:]))
    with pytest.raises(KronyError, match="the same number out of all of its matrices"):
        compress(model, uneven, init="data", calibration=WINDOWS)
    assert torch.equal(logits(model), logits(tiny("gpt2")))
    cut(model)
    with pytest.raises(KronyError, match="lost hidden units already"):
        cut(model)


@pytest.mark.parametrize("changes", [{"shape": (128, 32)}, {"parts": 0}, {"parts": 7}])
def test_a_plan_that_no_taking_out_could_make_is_refused(changes):
    entry = replace(narrow_plan(tiny("phi3")).matrices[0], **changes)
    wanted = r"which taking hidden units out can't|a whole number, 1 to"
    with pytest.raises(KronyError, match=wanted):
        Plan.from_json(Plan((entry,)).to_json())


def test_a_plan_travels():
    plan = narrow_plan(tiny("phi3"))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.matrices[0].parts == 2
    assert plan.matrices[0].dense_shape == (96, 32)
    assert "dense_shape" not in Plan((replace(plan.matrices[0], dense_shape=None),)).to_json()


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_narrow_models_are_quantized_and_fold_back(to, tmp_path):
    model = quantize(cut(tiny("llama")), to)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), expected)
    again.dequantize()
    assert again.model.layers[0].mlp.down_proj.weight.shape == (32, 48)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_a_matrix_that_is_only_narrow_is_quantized_beside_factors():
    model = tiny("gpt2")
    fewer = [t.narrowed(64) for t in find_targets(model, "mlp")]
    low_rank = (Factors((32, 1), (1, 64), 4),)
    plan = [matrix_plan(t, low_rank if t.role == "down" else ()) for t in fewer]
    compress(model, Plan(tuple(plan)), init="data", calibration=WINDOWS)
    names = {m.name for m in quantized_of(quantize(model, "int8")).matrices}
    layers = [f"transformer.h.{i}.mlp" for i in (0, 1)]
    assert names == {f"{n}.c_fc" for n in layers} | {f"{n}.c_proj.groups.0.large" for n in layers}


@pytest.mark.slow
def test_without_krony_a_narrow_model_stops_instead_of_loading_noise(tmp_path):
    cut(tiny("gpt2")).save_pretrained(tmp_path)
    assert "size mismatch" in refused_without_krony(tmp_path)
