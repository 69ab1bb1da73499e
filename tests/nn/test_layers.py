"""KroneckerLinear against the dense oracle, in every dtype, and its gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import dense_sum, group_dense
from krony import Factors, KroneckerGroup, KroneckerLinear
from krony.errors import KronyError

# A list of groups, each (large, small, terms, layout) and perhaps more; all make 12 x 8.
LAYERS = [
    [((6, 4), (2, 2), 1, "small-outer")],
    [((6, 4), (2, 2), 3, "large-outer")],
    [((3, 4), (4, 2), 2, "small-outer")],
    [((12, 1), (1, 8), 3, "small-outer")],
    [((12, 8), (1, 1), 1, "small-outer")],
    [((12, 1), (1, 8), 2, "small-outer"), ((6, 4), (2, 2), 1, "large-outer")],
]
INTERPOLATIVE = [
    [((6, 4), (2, 2), 3, "large-outer", False, True)],
    [((3, 2), (4, 4), 4, "small-outer", False, True)],
    [((12, 1), (1, 8), 3, "small-outer", False, True)],
    [((12, 1), (1, 8), 8, "small-outer", False, True)],
    [((12, 1), (1, 8), 2, "small-outer", False, True), ((6, 4), (2, 2), 1, "large-outer")],
]


def build(spec, scalars=False, bias=True, dtype=torch.float64):
    groups = [KroneckerGroup(*s, *((scalars,) if len(s) == 4 else ()), dtype=dtype) for s in spec]
    layer = KroneckerLinear(8, 12, groups, bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("scalars", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spec", LAYERS + INTERPOLATIVE)
def test_forward_equals_the_dense_layer(spec, bias, scalars):
    layer = build(spec, scalars, bias)
    weight = sum(group_dense(group) for group in layer.groups)
    torch.testing.assert_close(layer.weight, weight)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected = x @ weight.T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]
)
@pytest.mark.parametrize("spec", LAYERS + INTERPOLATIVE)
def test_dtypes(spec, dtype, tolerance):
    layer = build(spec, dtype=dtype)
    x = torch.randn(7, 8, dtype=dtype)
    y = layer(x)
    assert y.dtype == layer.weight.dtype == dtype
    expected = x.double() @ layer.to_dense(torch.float64).T + layer.bias.double()
    error = (y.double() - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize("spec", LAYERS + INTERPOLATIVE)
def test_gradients(spec):
    layer = build(spec, scalars=True)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *values), rtol=1e-7, atol=1e-8)
    # And to 1e-10 against autograd through the dense weight.
    direction = torch.randn(3, 12, dtype=torch.float64)
    parameters = list(layer.parameters())
    factored = torch.autograd.grad((layer(x) * direction).sum(), [x, *parameters])
    dense = (x @ layer.weight.T + layer.bias) * direction
    for mine, oracle in zip(
        factored, torch.autograd.grad(dense.sum(), [x, *parameters]), strict=True
    ):
        torch.testing.assert_close(mine, oracle, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("terms", [1, 3])
def test_training_keeps_the_inputs_and_not_what_was_mixed_from_them(terms):
    group = KroneckerGroup((6, 4), (2, 2), terms)
    assert group.mix_first
    x = torch.randn(50, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        group(x).sum()
    large = [t for t in kept if t.numel() >= x.numel()]
    assert {t.untyped_storage().data_ptr() for t in large} == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("spec", LAYERS + INTERPOLATIVE + [[((6, 8), (2, 1), 1, "small-outer")]])
def test_gradients_under_autocast(spec):
    """Float32 of the parameters, and outputs as narrow as those of a dense layer."""
    layer = build(spec, dtype=torch.float32)
    x = torch.randn(6, 8)
    found = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
            assert y.dtype == F.linear(x, layer.weight, layer.bias).dtype
            loss = y.float().square().mean()
        found[enabled] = torch.autograd.grad(loss, list(layer.parameters()))
    for mine, exact in zip(found[True], found[False], strict=True):
        assert mine.dtype == torch.float32
        assert (mine - exact).norm() <= 5e-2 * exact.norm()


@pytest.mark.parametrize("spec", LAYERS)
def test_absorbed_scalars_change_no_bit(spec):
    layer = build(spec, scalars=True, dtype=torch.float32)
    x = torch.randn(4, 8)
    before = layer(x)
    for group in layer.groups:
        group.absorb_scalars()
    assert torch.equal(layer(x), before)
    assert not any("scalars" in name for name, _ in layer.named_parameters())


@pytest.mark.parametrize("spec", [s[0] for s in INTERPOLATIVE])
def test_the_interpolative_form_is_the_same_sum_in_fewer_numbers(spec):
    large, small, terms, layout, *_ = spec
    plain = KroneckerGroup(large, small, terms, layout, dtype=torch.float64)
    group = KroneckerGroup(*spec, dtype=torch.float64)
    with torch.no_grad():  # terms of very different weight, as fits have them
        plain.small.mul_(torch.logspace(-4, 0, terms, dtype=torch.float64)[:, None, None])
    group.set_factors(plain.large_factors, plain.small)
    torch.testing.assert_close(group.to_dense(), plain.to_dense())
    count = sum(p.numel() for p in group.parameters())
    assert count == sum(p.numel() for p in plain.parameters()) - terms**2
    assert count == Factors(large, small, terms, layout, interpolative=True).parameters
    # R of the blocks of W are stored as they are; the pivots keep the others' weights small.
    entries = group.scaled_small.detach().flatten(1)
    kept = (group.order < terms).nonzero().squeeze(1)
    assert torch.equal(entries[:, kept], torch.eye(terms, dtype=torch.float64))
    assert float(entries.abs().max()) < 5


@pytest.mark.parametrize("terms", [2, 3])
def test_dependent_terms_have_an_interpolative_form_too(terms):
    """Fewer independent terms than the group holds: a zero term, and a repeated one."""
    large = torch.randn(terms, 12, 1, dtype=torch.float64)
    small = torch.randn(terms, 1, 8, dtype=torch.float64)
    small[1] = small[0]
    small[-1] = 0 if terms == 3 else small[-1]
    group = KroneckerGroup((12, 1), (1, 8), terms, interpolative=True, dtype=torch.float64)
    group.set_factors(large, small)
    torch.testing.assert_close(group.to_dense(), dense_sum(small, large))


def test_weight_is_read_only():
    layer = build(LAYERS[0])
    before = layer.weight.clone()
    with torch.no_grad():
        layer.weight.fill_(3.0)
    assert torch.equal(layer.weight, before)
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(before)


def test_the_large_factor_is_an_ordinary_linear_child():
    layer = build([((6, 4), (2, 2), 3, "small-outer")])
    assert [type(m) for m in layer.modules() if isinstance(m, nn.Linear)] == [nn.Linear]
    assert set(dict(layer.named_parameters())) == {
        "bias",
        "groups.0.large.weight",
        "groups.0.small",
    }


def test_fresh_factors_have_the_spread_of_a_fresh_linear_layer():
    group = KroneckerGroup((64, 64), (8, 8), 16)
    dense = group.to_dense().detach()
    assert float(dense.std()) == pytest.approx((1 / (3 * 512)) ** 0.5, rel=0.1)


def test_autocast_compile_and_deepcopy():
    layer = build(LAYERS[1], dtype=torch.float32)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x).float()
    torch.testing.assert_close(found, layer(x), rtol=0.1, atol=0.3)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_layers_that_cannot_be():
    with pytest.raises(KronyError, match="make a 12x8 matrix, but the layer is 12x9"):
        KroneckerLinear(9, 12, [KroneckerGroup((6, 4), (2, 2))])
    with pytest.raises(KronyError, match="at least one group"):
        KroneckerLinear(8, 12, [])
    with pytest.raises(KronyError, match="between 1 and 4 terms"):
        KroneckerGroup((6, 4), (2, 2), terms=5)
    with pytest.raises(KronyError, match="interpolative factors have no scalars"):
        KroneckerGroup((6, 4), (2, 2), scalars=True, interpolative=True)
    with pytest.raises(KronyError, match="'diagonal' is not one of"):
        KroneckerGroup((6, 4), (2, 2), layout="diagonal")


@pytest.mark.parametrize("layout", ["small-outer", "large-outer"])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_forming_the_matrix_gives_the_same_outputs_and_gradients(layout, tokens, monkeypatch):
    group = KroneckerGroup((6, 4), (5, 3), terms=9, layout=layout).double()
    x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *group.parameters()]
    both = []
    for formed in (True, False):
        monkeypatch.setattr(KroneckerGroup, "forms_dense", lambda *_, formed=formed: formed)
        y = group(x)
        both.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_matrix_is_formed_where_that_takes_fewer_operations():
    sums, one = KroneckerGroup((64, 16), (16, 16), 51), KroneckerGroup((512, 128), (2, 2), 1)
    assert not sums.forms_dense(1)
    assert sums.forms_dense(1024)
    assert not any(one.forms_dense(tokens) for tokens in (1, 1024, 10**6))
    assert not any(KroneckerGroup((64, 1), (1, 32), 20).forms_dense(t) for t in (1, 10**6))
    # Adapted or quantized, the large factor is more than its weight.
    sums.large = nn.Sequential(sums.large)
    assert not sums.forms_dense(1024)
