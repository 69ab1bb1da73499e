"""Mixing slices by work that all tokens share, as on a GPU, against a product for every token."""

import pytest
import torch
from test_layers import LAYERS, build

from krony.nn import products

# Slices out and in, their length; by element up to sixteen entries, else in one product.
SIZES = [(2, 2, 3), (1, 3, 4), (3, 1, 4), (4, 4, 2), (12, 3, 5), (6, 8, 3)]


def slices(q, k, layout, dtype=torch.float64, tokens=7):
    x = torch.randn(tokens, q * k, dtype=dtype)
    return products.to_slices(x, (-1, q, k), layout)


@pytest.mark.parametrize("layout", ["small-outer", "large-outer"])
@pytest.mark.parametrize(("p", "q", "k"), SIZES)
def test_it_is_a_product_for_every_token(p, q, k, layout):
    mixing, x = torch.randn(p, q, dtype=torch.float64), slices(q, k, layout)
    torch.testing.assert_close(products.mix_all(mixing, x), mixing @ x)
    inputs = [t.clone().requires_grad_() for t in (mixing, x)]
    assert torch.autograd.gradcheck(products.mix_all, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("p", "q", "k"), [(2, 2, 3), (6, 8, 3)])
def test_a_training_step_compiles(p, q, k):
    def step(mixing, x):
        return torch.autograd.grad(products.mix_all(mixing, x).square().sum(), [mixing, x])

    inputs = torch.randn(p, q, requires_grad=True), torch.randn(5, q, k, requires_grad=True)
    compiled = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), step(*inputs))


@pytest.mark.parametrize(("p", "q", "k"), SIZES)
def test_half_precision_rounds_once_for_a_slice(p, q, k):
    mixing, x = torch.randn(p, q).bfloat16(), slices(q, k, "small-outer", torch.bfloat16, 500)
    exact = mixing.double() @ x.double()
    error = (products.mix_all(mixing, x).double() - exact).norm() / exact.norm()
    assert error < 2 * 2**-9


@pytest.mark.parametrize("spec", LAYERS)
def test_layers_train_with_it_as_with_the_dense_matrix(spec, monkeypatch):
    """As on a GPU, where `by_all_tokens` says so: outputs and all gradients."""
    monkeypatch.setattr(products, "by_all_tokens", lambda x: True)
    used = []
    monkeypatch.setattr(
        products, "mix_all", lambda *a, real=products.mix_all: used.append(1) or real(*a)
    )
    layer = build(spec, scalars=True)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(6, 12, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad((layer(x) * direction).sum(), wanted)
    dense = (x @ layer.to_dense().T + layer.bias) * direction
    for mine, oracle in zip(found, torch.autograd.grad(dense.sum(), wanted), strict=True):
        torch.testing.assert_close(mine, oracle, rtol=1e-10, atol=1e-10)
    slices_mixed = any(
        1 not in (group.large_shape[1], *group.small_shape) for group in layer.groups
    )
    assert bool(used) == slices_mixed


@pytest.mark.parametrize("spec", LAYERS)
def test_autocast_gives_the_dtype_of_a_dense_layer(spec, monkeypatch):
    monkeypatch.setattr(products, "by_all_tokens", lambda x: True)
    layer = build(spec, dtype=torch.float32)
    x = torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = torch.autograd.grad(layer(x).square().mean(), list(layer.parameters()))
    found = torch.autograd.grad(y.float().square().mean(), list(layer.parameters()))
    for mine, wanted in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - wanted).norm() <= 5e-2 * wanted.norm()


def test_a_cpu_keeps_a_product_for_every_token():
    assert not products.by_all_tokens(torch.zeros(1000, 2, 3))
