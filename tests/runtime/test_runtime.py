"""The layers in plain torch, against the dense product and the package's own with their kernels."""

import pytest
import torch

from helpers import dense_sum
from krony import Factors
from krony.maths import kron
from krony.maths.kron import LAYOUTS
from krony.nn import layers as fast
from krony.nn import products
from krony.runtime import layers
from krony.runtime import products as plain

SHAPES = [((6, 4), (3, 2)), ((3, 8), (4, 1)), ((8, 1), (1, 12)), ((5, 5), (5, 5)), ((2, 9), (6, 2))]


def factors(large, small, terms):
    return torch.randn(terms, *large).double(), torch.randn(terms, *small).double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix_first", [True, False])
@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize(("large", "small"), SHAPES)
def test_apply_equals_the_dense_product(layout, mix_first, terms, large, small):
    a, b = factors(large, small, terms)
    weight = dense_sum(b, a) if layout == "small-outer" else dense_sum(a, b)
    linear = kron.large_to_linear(a, mix_first)
    bias = torch.randn(len(weight), dtype=torch.float64)
    for lead in ((), (1,), (3,), (5,), (2, 3), (0,)):
        x = torch.randn(*lead, weight.shape[1], dtype=torch.float64)
        for made in (plain.apply, products.apply):
            for offset in (None, bias):
                y = made(x, b, lambda z: z @ linear.T, large, layout, mix_first, offset)
                torch.testing.assert_close(y, x @ weight.T + (0 if offset is None else offset))
        y = products.apply(x, b, linear, large, layout, mix_first, bias)
        torch.testing.assert_close(y, x @ weight.T + bias)
    assert torch.equal(plain.linear_to_large(linear, terms, mix_first), a)


@pytest.mark.parametrize(("large", "small"), SHAPES)
def test_the_cheaper_order_is_chosen(large, small):
    costs = {order: plain.multiply_adds(large, small, 2, order) for order in (True, False)}
    assert costs[plain.mixes_first(large, small)] == min(costs.values())
    assert Factors(large, small, 2).multiply_adds == min(costs.values()), "what a plan counts"


@pytest.mark.parametrize(("large", "small"), SHAPES)
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_w_is_formed_from_where_that_costs_less(large, small, terms):
    order = plain.mixes_first(large, small)
    entries = large[0] * large[1] * small[0] * small[1]
    start = plain.dense_from(large, small, terms, order)
    for tokens in (1, 10, 1000, 100_000):
        factored = tokens * plain.multiply_adds(large, small, terms, order)
        formed = (terms + plain.FORMING + tokens) * entries
        assert (tokens > start) == (formed < factored)


def pair(scalars=False, interpolative=False, bias=True):
    """The same layer of two groups, with kernels and in plain torch."""
    shapes = [((16, 8), (2, 4), 3, "small-outer"), ((32, 1), (1, 32), 5, "large-outer")]
    made = []
    for room in (fast, layers):
        torch.manual_seed(0)
        groups = [room.KroneckerGroup(*s, scalars, interpolative) for s in shapes]
        made.append(room.KroneckerLinear(32, 32, groups, bias))
    made[1].load_state_dict(made[0].state_dict())
    return made


@pytest.mark.parametrize("form", [{}, {"scalars": True}, {"interpolative": True}, {"bias": False}])
@pytest.mark.parametrize("tokens", [1, 7, 3000])
def test_both_ways_to_the_same_result(form, tokens):
    with_kernels, plain = pair(**form)
    given = torch.randn(tokens, 32)
    expected = given @ plain.to_dense().T
    if plain.bias is not None:
        expected = expected + plain.bias
    for x in (given, given.clone().requires_grad_()):
        results = []
        for layer in (with_kernels, plain):
            with torch.set_grad_enabled(x.requires_grad):
                y = layer(x)
            gradients = ()
            if x.requires_grad:
                y.square().mean().backward()
                gradients = (x.grad.clone(), *(p.grad for p in layer.parameters()))
                x.grad = None
            results.append((y.detach(), *gradients))
        for first, second in zip(*results, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_an_embedding_and_the_output_matrix_tied_to_it():
    torch.manual_seed(0)
    groups = [fast.KroneckerGroup((12, 4), (2, 3), 2, interpolative=True)]
    with_kernels = fast.KroneckerEmbedding(24, 12, groups)
    plain = layers.KroneckerEmbedding(
        24, 12, [layers.KroneckerGroup((12, 4), (2, 3), 2, interpolative=True)]
    )
    plain.load_state_dict(with_kernels.state_dict())
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(plain(ids), with_kernels(ids))
    torch.testing.assert_close(plain(ids), plain.to_dense()[ids])
    for embedding, room in ((plain, layers), (with_kernels, fast)):
        head = embedding.tied_linear()
        assert type(head) is room.KroneckerLinear
        assert type(head.groups[0]) is room.KroneckerGroup
        assert head.groups[0].large.weight is embedding.groups[0].large.weight
        assert "groups.0.order" not in head.state_dict()
        x = torch.randn(3, 12)
        torch.testing.assert_close(head(x), x @ embedding.to_dense().T)
