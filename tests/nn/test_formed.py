"""Layers that keep W once it is formed, against what their factors are at that moment."""

import copy
import io

import accelerate
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers import group_dense, replicated, tiny
from krony import (
    Factors,
    KroneckerGroup,
    KroneckerLinear,
    KronyError,
    Plan,
    compress,
    form,
    load_model,
    save_model,
)
from krony.export.onnx import onnx
from krony.export.quantize import quantize
from krony.hf.families import find_targets
from krony.hf.modeling import config_of
from krony.hf.plan import MatrixPlan, matrix_plan
from krony.measure import roofline
from krony.measure.runtimes import Runner
from krony.nn import mlp
from krony.nn.packing import FORMS

IN, OUT = 48, 36
GROUPS = (((36, 1), (1, 48), 3), ((9, 16), (4, 3), 7))
TOKENS = (1, 2, 5, 20, 300)


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def layer(dtype=torch.float32, layout="small-outer", scalars=False, interpolative=False):
    options = (layout, scalars, interpolative)
    made = KroneckerLinear(IN, OUT, [KroneckerGroup(*g, *options) for g in GROUPS]).eval()
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    made.keeps_formed = True
    return made.to(dtype)


def oracle(made):
    return sum(group_dense(group).double() for group in made.groups)


def check(made, kept=True):
    """Its outputs are those of its factors, and W is kept, or is not."""
    weight = oracle(made)
    tolerance = 2e-6 if made.bias.dtype == torch.float32 else 1e-2
    for tokens in TOKENS:
        x = torch.randn(tokens, IN, dtype=made.bias.dtype)
        wanted = x.double() @ weight.T + made.bias.double()
        error = (made(x).double() - wanted).norm() / wanted.norm()
        assert error < tolerance
    formed = made.formed()
    assert (formed is not None) == kept
    if kept:
        assert made.formed() is formed
        assert formed.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["small-outer", "large-outer"])
@pytest.mark.parametrize("form", [(False, False), (True, False), (False, True)])
def test_it_is_the_sum_of_the_factors(form, layout, dtype):
    made = layer(dtype, layout, *form)
    check(made)
    # Rounded once.
    assert torch.equal(made.formed(), made.to_dense(torch.float32).to(dtype))
    made.keeps_formed = False
    check(made, kept=False)


def test_every_change_of_a_factor_is_seen():
    made = layer(scalars=True)
    check(made)
    first, second = made.groups
    for change in (
        lambda: first.small.mul_(2),
        lambda: second.scalars.add_(1),
        lambda: second.large.weight[0].zero_(),
        lambda: made.load_state_dict({k: v + 1 for k, v in made.state_dict().items()}),
        lambda: setattr(first, "small", nn.Parameter(torch.randn_like(first.small))),
        lambda: setattr(second.large.weight, "data", torch.randn_like(second.large.weight)),
        lambda: setattr(second, "scalars", None),
        lambda: setattr(second, "large", copy.deepcopy(second.large)),
        lambda: made.groups[1].absorb_scalars(),
        lambda: setattr(made, "groups", nn.ModuleList(layer().groups)),
        lambda: made.to(torch.bfloat16),
        lambda: made.to(torch.float32),
    ):
        before = made.formed()
        change()
        check(made)
        assert made.formed() is not before
    made.to(torch.float64)
    assert not made.__dict__.get("_formed")  # no memory is held of what was
    made.to(torch.float32)
    check(made)
    # The bias is no part of it.
    before = made.formed()
    made.bias.add_(1)
    check(made)
    assert made.formed() is before


def test_a_step_of_an_optimizer_is_seen():
    made = layer()
    check(made)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1)
    with torch.enable_grad():
        assert made.formed() is None
        x = torch.randn(20, IN)
        made(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())
    optimizer.step()
    check(made)


def test_where_the_factors_are_used():
    made = layer()
    check(made)
    made.train()
    check(made, kept=False)
    made.eval()
    check(made)
    before = made.formed()
    assert made.eval().formed() is before
    for module in (made.groups[0], made.groups[1].large):
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        if module is made.groups[1].large:
            check(made, kept=False)
            assert len(seen) == len(TOKENS)
        handle.remove()
        check(made)
    large = made.groups[1].large
    made.groups[1].large = nn.Sequential(large, nn.Identity())  # an adapter, say
    assert made.formed() is None
    made.groups[1].large = large
    check(made)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.randn(20, IN)).dtype == torch.bfloat16
    with FlopCounterMode(display=False):
        made.formed()
    check(made)
    step = torch.compile(made, backend="eager", fullgraph=True)
    x = torch.randn(20, IN)
    torch.testing.assert_close(step(x), made(x))
    made.groups[0].small.mul_(2)
    torch.testing.assert_close(step(x), made(x))


def test_what_has_no_numbers_keeps_none():
    with torch.device("meta"):
        made = KroneckerLinear(IN, OUT, [KroneckerGroup(*g) for g in GROUPS]).eval()
    made.keeps_formed = True
    assert made(torch.empty(2, IN, device="meta")).shape == (2, OUT)
    assert made.formed() is None
    with torch.inference_mode():  # which doesn't count changes
        made = layer()
        check(made, kept=False)
    made = layer()
    with torch.inference_mode():
        check(made)
    check(made)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        made.groups[0].small.add_(1)
        assert made.formed() is None


def test_copies_have_their_own():
    made = layer()
    check(made)
    twin = copy.deepcopy(made)
    assert "_formed" not in twin.__dict__ or twin.__dict__["_formed"] is None
    twin.groups[0].small.mul_(2)
    check(twin)
    check(made)
    replica = replicated(made)
    assert replica.formed() is None
    x = torch.randn(20, IN)
    torch.testing.assert_close(replica(x), made(x))
    check(made)
    assert list(made.state_dict()) == list(layer().state_dict())
    stream = io.BytesIO()
    torch.save(made, stream)
    assert stream.tell() < 4 * (IN * OUT + sum(p.numel() for p in made.parameters())) + 20_000


def test_an_mlp_with_such_layers():
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = layer(), nn.SiLU(), nn.Linear(OUT, IN)

        def forward(self, x):
            return self.down(self.act(self.up(x)))

    for dense in (True, False):
        made = MLP().eval()
        if not dense:
            groups = [KroneckerGroup((16, 12), (3, 3), 4), KroneckerGroup((48, 1), (1, 36), 2)]
            made.down = KroneckerLinear(OUT, IN, groups).eval()
        plain = copy.deepcopy(made)
        plain.up.keeps_formed = False
        mlp.install(made)
        assert mlp.record_of(made) is not None
        for change in (lambda m: None, lambda m: m.up.groups[1].small.mul_(2)):
            for each in (made, plain):
                change(each)
            for tokens in TOKENS:
                x = torch.randn(tokens, IN)
                torch.testing.assert_close(made(x), plain(x), rtol=1e-4, atol=1e-5)
                assert made.up.formed() is not None


def matrix(groups, shape, dense_shape=None, **more):
    return MatrixPlan("w", shape, tuple(groups), dense_shape=dense_shape, **more)


def test_a_plan_says_which_layers_keep_it():
    low_rank = Factors((256, 1), (1, 256), 20, interpolative=True)
    balanced = Factors((16, 16), (16, 16), 30, interpolative=True)
    shape, dense = (256, 256), (1024, 256)
    sums = matrix([low_rank, balanced], shape, dense)
    assert sums.keeps_formed
    assert sums.multiply_adds == sums.reads == 256 * 256
    assert sums.in_memory == sums.parameters + 256 * 256
    # Few operations; no units gone, so that W would be the dense matrix; an embedding's lookup.
    for other in (
        matrix([low_rank], shape, dense),
        matrix([low_rank, balanced], shape),
        matrix([balanced], shape, dense, embedding=True),
        matrix([], shape, dense),
    ):
        assert not other.keeps_formed
        assert other.in_memory == other.parameters
    # Most of the units are there: both together would be larger than the dense matrix.
    wide = Factors((48, 16), (16, 16), 100)
    assert wide.multiply_adds > 768 * 256
    assert not matrix([wide], (768, 256), (800, 256)).keeps_formed


@pytest.fixture(scope="module")
def narrowed():
    """A model whose MLPs lost three quarters of their units and are sums of many terms."""
    torch.manual_seed(0)
    model = tiny("gpt2").eval()
    matrices = []
    for target in find_targets(model, "mlp"):
        fewer = target.narrowed(target.hidden // 4)
        m, n = fewer.shape
        matrices.append(matrix_plan(fewer, (Factors((m // 4, n // 4), (4, 4), 9),)))
    plan = Plan(tuple(matrices))
    assert all(m.keeps_formed for m in plan.matrices)
    compress(model, plan, init="data", calibration=torch.randint(96, (40, 64)))
    return model.eval()


def factored(model):
    return [x for x in model.modules() if isinstance(x, KroneckerLinear)]


def narrowed_names(model):
    return [m.name for m in Plan.from_dict(config_of(model).plan).matrices]


def test_a_narrowed_model_keeps_it_and_is_saved_without(narrowed, tmp_path):
    save_model(narrowed, tmp_path / "factored")
    loaded = load_model(tmp_path / "factored").eval()
    ids = torch.randint(96, (2, 30))
    layers, before = factored(loaded), roofline.read_bytes(loaded)
    for each in layers:
        each.keeps_formed = False
    wanted, read = loaded(ids).logits, roofline.read_bytes(loaded)
    for each in layers:
        each.keeps_formed = True
    formed = sum(x.in_features * x.out_features for x in layers)
    factors = sum(p.numel() for x in layers for p in x.groups.parameters())
    assert before - read == 4 * (formed - factors)
    found = loaded(ids).logits
    assert len(layers) == 4
    assert all(x.formed() is not None for x in layers)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for one in range(30):  # token by token
        last = loaded(ids[:, : one + 1]).logits[:, -1]
        torch.testing.assert_close(last, wanted[:, one], rtol=1e-4, atol=1e-5)
    save_model(loaded, tmp_path / "again")
    first, second = (tmp_path / n / "model.safetensors" for n in ("factored", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_w_in_the_place_of_the_factors(narrowed, tmp_path):
    model = copy.deepcopy(narrowed)
    ids = torch.randint(96, (2, 30))
    wanted, names = model(ids).logits, narrowed_names(model)
    assert form(tiny("gpt2")) == []
    assert form(model) == names
    assert form(model) == []
    assert not factored(model)
    for name, tokens in (("many", 30), ("few", 1)):
        found = model(ids[:, :tokens]).logits
        torch.testing.assert_close(found, wanted[:, :tokens], rtol=1e-4, atol=1e-5, msg=name)
    save_model(model, tmp_path / "formed")
    loaded = load_model(tmp_path / "formed")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    dense = loaded.dequantize()
    assert dense.transformer.h[0].mlp.c_fc.weight.shape == (32, 128)
    torch.testing.assert_close(dense(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    # What a compiled step takes.
    runner = Runner(copy.deepcopy(narrowed), compiled=True)
    assert not factored(runner.model)
    assert len(factored(Runner(copy.deepcopy(narrowed)).model)) == 4


def test_a_model_on_several_devices_is_as_fast(narrowed):
    """accelerate's hooks, of which those that only move inputs are no reason to call every part."""
    model, ids = copy.deepcopy(narrowed), torch.randint(96, (2, 30))
    wanted = model(ids).logits
    places = dict.fromkeys((name for name, _ in model.transformer.named_children()), "cpu")
    places = {f"transformer.{name}": where for name, where in places.items()} | {"lm_head": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    layers = factored(model)
    assert all(hasattr(x.groups[0].large, "_hf_hook") for x in layers)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert all(x.formed() is not None for x in layers)
    offloaded = copy.deepcopy(narrowed)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    torch.testing.assert_close(offloaded(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert not any(x.formed() is not None for x in factored(offloaded))


@pytest.mark.parametrize("to", FORMS)
def test_w_of_quantized_factors(narrowed, to, tmp_path):
    pytest.importorskip("torchao")
    model = quantize(copy.deepcopy(narrowed), to).eval()
    save_model(model, tmp_path / to)
    model = load_model(tmp_path / to).eval()
    ids, layers = torch.randint(96, (2, 30)), factored(model)
    for each in layers:
        each.keeps_formed = False
    wanted = model(ids).logits
    for each in layers:
        each.keeps_formed = True
    # Inputs that are quantized too are no matter of W.
    kept = to != "int8-dynamic"
    for name, tokens in (("many", 30), ("few", 1)):
        found = model(ids[:, :tokens]).logits
        torch.testing.assert_close(found, wanted[:, :tokens], rtol=1e-4, atol=1e-5, msg=name)
    assert [each.formed() is not None for each in layers] == [kept] * 4
    before = layers[0].formed()
    layers[0].groups[0].small.mul_(2)
    assert not kept or not torch.equal(layers[0].formed(), before)
    mixed = copy.deepcopy(model)
    for each in factored(mixed)[1:]:
        each.keeps_formed = False
    for changed, count in ((model, 4), (mixed, 1)):
        assert form(changed) == (narrowed_names(narrowed)[:count] if kept else [])
        save_model(changed, tmp_path / f"formed-{count}")
        again = load_model(tmp_path / f"formed-{count}").eval()
        for each in factored(again):
            each.keeps_formed = False
        for each in factored(changed):
            each.keeps_formed = False
        assert torch.equal(again(ids).logits, changed(ids).logits)


def test_a_graph_has_w(narrowed, monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")
    seen = []

    def export_(step, *_, **__):
        seen.append(step.model)
        raise torch.onnx.errors.OnnxExporterError("enough")

    monkeypatch.setattr(torch.onnx, "export", export_)
    with pytest.raises(KronyError, match="enough"):
        onnx(narrowed, tmp_path / "out")
    (traced,) = seen
    assert not factored(traced)
    assert len(factored(narrowed)) == 4
    assert traced.transformer.wte.weight is narrowed.transformer.wte.weight
