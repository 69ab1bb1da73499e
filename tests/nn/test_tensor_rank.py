"""Fewer large products: the decomposition, and the product by it, against the dense oracle."""

import pytest
import torch

from helpers import group_dense
from krony import KroneckerGroup
from krony.nn import dispatch, tensor_rank
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.tensor_rank import decompose
from krony.runtime.products import multiply_adds

TOKENS = 400


def make(large=(8, 12), small=(3, 3), terms=4, layout="small-outer", dtype=torch.float64, **more):
    torch.manual_seed(0)
    group = KroneckerGroup(large, small, terms, layout, dtype=dtype, **more)
    with torch.no_grad():
        for parameter in group.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return group


@pytest.mark.parametrize(
    ("terms", "sides", "most"),
    [
        (2, (3, 3), 4),
        (3, (3, 3), 5),
        (4, (3, 3), 5),
        (2, (2, 2), 3),
        (3, (2, 2), 3),
        (2, (2, 3), 3),
    ],
)
def test_a_decomposition_is_one(terms, sides, most):
    for seed in range(5):
        small = torch.randn(terms, *sides, generator=torch.Generator().manual_seed(seed))
        found = decompose(small)
        assert found is not None
        assert found.products <= most
        made = torch.einsum("rk,mk,nk->rmn", found.c, found.u, found.v)
        torch.testing.assert_close(made, small.double(), rtol=0, atol=1e-7)
        assert float(found.c.norm()) < tensor_rank.MOST_CANCELLATION * float(small.norm())
        again = decompose(small)
        assert torch.equal(again.c, found.c), "the same input gives the same numbers"


def test_what_saves_nothing_has_none():
    torch.manual_seed(0)
    assert decompose(torch.randn(9, 3, 3)) is None  # all matrices: nine products are needed
    assert decompose(torch.zeros(2, 3, 3)) is None
    assert decompose(torch.full((2, 3, 3), float("nan"))) is None
    # A product of polynomials modulo x² has rank 3, and comes as near as one likes with 2 terms.
    near = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    found = decompose(near)
    assert found is None or found.products == 3


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", ["small-outer", "large-outer"])
@pytest.mark.parametrize("large", [(8, 12), (12, 8)])  # mixed last, mixed first
@pytest.mark.parametrize(("small", "terms"), [((3, 3), 4), ((3, 3), 2), ((2, 2), 3), ((2, 3), 2)])
def test_many_tokens_go_by_fewer_products(monkeypatch, small, terms, large, layout, biased):
    group = make(large, small, terms, layout)
    ways = []
    route = tensor_rank.route
    monkeypatch.setattr(tensor_rank, "route", lambda *a: ways.append(a[0].products) or route(*a))
    x = torch.randn(2, TOKENS // 2, group_dense(group).shape[1], dtype=torch.float64)
    bias = torch.randn(len(group_dense(group)), dtype=torch.float64) if biased else None
    with torch.no_grad():
        y = group(x, bias)
    expected = x @ group_dense(group).T + (0 if bias is None else bias)
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-7)
    assert len(ways) == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_precision(dtype, tolerance):
    group = make(dtype=dtype)
    x = torch.randn(TOKENS, 36).to(dtype)
    with torch.no_grad():
        y = group(x)
    assert y.dtype == dtype
    expected = x.double() @ group_dense(group.double()).T
    assert (y.double() - expected).norm() < tolerance * expected.norm()


def test_it_is_found_once_and_again_when_a_factor_changes(monkeypatch):
    group, found = make(), []
    monkeypatch.setattr(
        tensor_rank, "decompose", lambda small: found.append(small) or decompose(small)
    )
    x = torch.randn(TOKENS, 36, dtype=torch.float64)
    with torch.no_grad():
        group(x)
        group(x)
        assert len(found) == 1
        group.small.data = torch.randn_like(group.small)
        torch.testing.assert_close(group(x), x @ group_dense(group).T, rtol=1e-7, atol=1e-7)
        assert len(found) == 2
        group.large.weight.mul_(2)
        torch.testing.assert_close(group(x), x @ group_dense(group).T, rtol=1e-7, atol=1e-7)
        group(x)
        assert len(found) == 3
        group.float()(x.float())
        assert len(found) == 4
    assert list(group.state_dict()) == ["small", "large.weight"]


def test_where_it_stays_out():
    def used(group, tokens=TOKENS, **options):
        x = torch.randn(tokens, 36, dtype=options.get("dtype", torch.float64))
        return dispatch.which(group, x) == "fewer"

    with torch.no_grad():
        assert used(make())
        assert used(make(scalars=True))
        assert not used(make(), tokens=8)
        assert not used(make(), dtype=torch.float32)
        assert not used(make((2, 3), (12, 12)))
        with torch.autocast("cpu", torch.bfloat16):
            assert not used(make())
        hooked = make()
        hooked.large.register_forward_hook(lambda *_: None)
        assert not used(hooked)
    assert not used(make())  # gradients may be wanted


@pytest.mark.parametrize(
    ("dtype", "compiled", "flags", "least"),
    [
        (torch.float32, True, "", 20),
        (torch.bfloat16, True, "", 34),
        (torch.float64, True, "", 53),
        (torch.float32, False, "", 53),
        (torch.bfloat16, False, "", 212),
        (torch.float32, True, "avx512f amx_bf16", 20),
        (torch.bfloat16, True, "avx512f amx_bf16", 374),
        (torch.bfloat16, False, "avx512f amx_bf16", None),
    ],
)
def test_what_a_token_must_save(dtype, compiled, flags, least, monkeypatch):
    """From the tokens on from which sums of large factors cost less than they save."""
    monkeypatch.setattr(cpu_kernels, "processor", lambda: flags)
    if compiled and cpu_kernels.library() is None:
        pytest.skip("needs a C compiler")
    if not compiled:
        monkeypatch.setattr(cpu_kernels, "library", lambda: None)
    group = make((64, 48)).to(dtype)
    assert multiply_adds((64, 48), (3, 3), 4, group.mix_first) > 12 * 64 * 48
    with torch.no_grad():
        if least is None:
            assert dispatch.which(group, torch.randn(5000, 144).to(dtype)) != "fewer"
            return
        xs = [torch.randn(tokens, 144).to(dtype) for tokens in (least - 1, least)]
        assert [dispatch.which(group, x) == "fewer" for x in xs] == [False, True]
