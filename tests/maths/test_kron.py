"""Every function of kron.py against torch.kron."""

import pytest
import torch

from helpers import dense_sum
from krony.errors import KronyError
from krony.maths import kron

# (outer, inner): the paper's kinds, both corners, prime sides, a vector, both orders.
SHAPES = [
    ((6, 4), (2, 2)),
    ((2, 2), (6, 4)),
    ((6, 8), (2, 1)),
    ((12, 4), (1, 2)),
    ((12, 1), (1, 8)),
    ((1, 8), (12, 1)),
    ((12, 8), (1, 1)),
    ((3, 5), (7, 2)),
    ((4, 1), (3, 1)),
]


def factors(outer, inner, terms):
    generator = torch.Generator().manual_seed(0)
    make = lambda shape: torch.randn(terms, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(outer), make(inner)


@pytest.mark.parametrize(("outer", "inner"), SHAPES)
def test_rearranged_product_is_an_outer_product(outer, inner):
    a, b = factors(outer, inner, 1)
    product = kron.rearrange(torch.kron(a[0], b[0]), outer, inner)
    torch.testing.assert_close(product, torch.outer(a.flatten(), b.flatten()))


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize(("outer", "inner"), SHAPES)
def test_to_dense_and_norm(outer, inner, terms):
    a, b = factors(outer, inner, terms)
    expected = dense_sum(a, b)
    torch.testing.assert_close(kron.to_dense(a, b), expected)
    assert kron.norm(a, b) == pytest.approx(float(expected.norm()), rel=1e-12)


@pytest.mark.parametrize(("outer", "inner"), SHAPES)
def test_van_loan_recovers_a_true_kronecker_sum(outer, inner):
    limit = min(outer[0] * outer[1], inner[0] * inner[1])
    for terms in range(1, min(limit, 4) + 1):
        weight = dense_sum(*factors(outer, inner, terms))
        found = kron.to_dense(*kron.van_loan(weight, outer, inner, terms))
        torch.testing.assert_close(found, weight, rtol=1e-9, atol=1e-9)


def test_van_loan_error_is_the_tail_of_the_spectrum_and_falls_with_terms():
    weight = torch.randn(24, 24, dtype=torch.float64)
    sigma = torch.linalg.svdvals(kron.rearrange(weight, (6, 6), (4, 4)))
    errors = []
    for terms in range(1, 17):
        found = kron.to_dense(*kron.van_loan(weight, (6, 6), (4, 4), terms))
        errors.append(float((weight - found).norm()))
        assert errors[-1] == pytest.approx(float(sigma[terms:].norm()), abs=1e-9)
    assert errors == sorted(errors, reverse=True)


def test_van_loan_low_rank_corner_is_the_truncated_svd():
    weight = torch.randn(12, 8, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    found = kron.to_dense(*kron.van_loan(weight, (12, 1), (1, 8), 3))
    torch.testing.assert_close(found, (u[:, :3] * s[:3]) @ vh[:3])


def test_van_loan_golden():
    # Origin: the tail of numpy's SVD of the rearranged matrix, 22 November 2026, numpy 2.4.
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    outer, inner = kron.van_loan(weight, (6, 4), (2, 2), 2)
    error = float((weight - kron.to_dense(outer, inner)).norm() / weight.norm())
    assert error == pytest.approx(0.4448544455919824, abs=1e-12)


def test_van_loan_is_deterministic_and_has_a_fixed_sign():
    weight = torch.randn(24, 16, dtype=torch.float64)
    first, second = (kron.van_loan(weight, (12, 8), (2, 2), 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    small = first[1].flatten(1)
    assert (small.gather(1, small.abs().argmax(1, keepdim=True)) > 0).all()
    # Split evenly: both factors of a term have the same norm.
    torch.testing.assert_close(first[0].flatten(1).norm(dim=1), small.norm(dim=1))


def test_van_loan_of_singular_and_zero_matrices_is_finite_and_trainable():
    flat = torch.ones(8, 8, dtype=torch.float64)
    for weight in (flat, torch.zeros_like(flat)):
        outer, inner = kron.van_loan(weight, (4, 4), (2, 2), 4)
        assert torch.isfinite(outer).all()
        assert torch.isfinite(inner).all()
        torch.testing.assert_close(kron.to_dense(outer, inner), weight)
        # No term has both factors at zero, where no gradient would reach it.
        assert ((outer.flatten(1).norm(dim=1) + inner.flatten(1).norm(dim=1)) > 0).all()


def test_van_loan_with_two_large_factors_is_seeded(monkeypatch):
    monkeypatch.setattr(kron, "EXACT_GRAM_SIDE", 8)
    weight = dense_sum(*factors((6, 4), (5, 4), 2))
    state = torch.get_rng_state()
    first, second = (kron.van_loan(weight, (6, 4), (5, 4), 2, seed=3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(state, torch.get_rng_state()), "the global generator was touched"
    torch.testing.assert_close(kron.to_dense(*first), weight)


@pytest.mark.parametrize(("outer", "inner"), SHAPES[:4])
def test_norm_scale_restores_the_norm(outer, inner):
    weight = torch.randn(outer[0] * inner[0], outer[1] * inner[1], dtype=torch.float64)
    a, b = kron.van_loan(weight, outer, inner, 1)
    alpha = kron.norm_scale(weight, a, b)
    assert alpha > 1
    assert kron.norm(a * alpha, b) == pytest.approx(float(weight.norm()))
    assert kron.norm_scale(weight, a * 0, b) == 1.0


@pytest.mark.parametrize(
    ("outer", "inner", "rows", "columns"),
    [
        ((6, 8), (2, 1), slice(None, None, 2), slice(None)),
        ((12, 4), (1, 2), slice(None), slice(None, None, 2)),
    ],
)
def test_prune_keeps_every_second_row_or_column(outer, inner, rows, columns):
    weight = torch.randn(12, 8, dtype=torch.float64)
    a, b = kron.prune(weight, outer, inner, small_is_outer=False)
    assert torch.equal(a[0], weight[rows, columns])
    assert b.flatten().tolist() == [1.0, 0.1]
    kept = kron.to_dense(a, b)
    assert torch.equal(kept[rows, columns], weight[rows, columns])
    b_first, a_first = kron.prune(weight, inner, outer, small_is_outer=True)
    assert torch.equal(a_first[0], weight[: outer[0], : outer[1]])
    assert torch.equal(b_first, b)


def test_shapes_and_terms_that_cannot_be():
    weight = torch.zeros(12, 8)
    with pytest.raises(KronyError, match="15x8 matrix, not 12x8"):
        kron.rearrange(weight, (5, 4), (3, 2))
    with pytest.raises(KronyError, match="between 1 and 4 terms"):
        kron.van_loan(weight, (6, 4), (2, 2), 5)
