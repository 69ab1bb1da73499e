"""Data-aware fits: laws on small matrices, against dense linear algebra."""

import itertools

import pytest
import torch

from krony import Factors
from krony.maths import fit
from krony.maths.kron import to_dense, van_loan

M, N = 24, 16


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spd(side, seed, rank=None):
    x = torch.randn(rank or 3 * side, side, generator=generator(seed), dtype=torch.float64)
    scale = torch.logspace(-1, 1, side, dtype=torch.float64)
    return (x * scale).T @ (x * scale) / len(x)


@pytest.fixture
def metric():
    return fit.Metric.of(spd(N, 1), spd(M, 2), M)


@pytest.fixture
def weight():
    return torch.randn(M, N, generator=generator(3), dtype=torch.float64)


def dense(pairs):
    return sum(to_dense(*pair) for pair in pairs)


def low_rank(terms, layout="small-outer"):
    return Factors((M, 1), (1, N), terms, layout)


KRONECKER = Factors((6, 4), (4, 4), 3)


def test_harm_is_half_the_mean_squared_first_order_change(weight):
    x = torch.randn(5000, N, generator=generator(4), dtype=torch.float64)
    g = torch.randn(5000, M, generator=generator(5), dtype=torch.float64)
    metric = fit.Metric(g.T @ g / 5000, x.T @ x / 5000)
    direct = 0.5 * float(((g @ weight) * x).sum(1).square().mean())
    # x and g are independent here, which is what the product of moments assumes.
    assert metric.harm(weight) == pytest.approx(direct, rel=0.1)


@pytest.mark.parametrize("rank", [1, 3, 8, N])
def test_low_rank_is_optimal_and_priced_by_the_spectrum(weight, metric, rank):
    columns, rows = fit.low_rank(weight, metric, rank)
    error = weight - columns @ rows
    price = fit.low_rank_harm(weight, metric)
    assert len(price) == min(weight.shape) + 1
    assert float(price[-1]) == 0
    assert metric.harm(error) == pytest.approx(float(price[rank]), abs=1e-9)
    # Optimal: the gradient G Δ C vanishes along both factors.
    image = metric.apply(error)
    assert float((columns.T @ image).abs().max()) < 1e-8
    assert float((image @ rows.T).abs().max()) < 1e-8


def test_without_gradients_low_rank_is_the_whitened_svd(weight):
    inputs = spd(N, 1)
    metric = fit.Metric.of(inputs, None, M)
    columns, rows = fit.low_rank(weight, metric, 4)
    half = torch.linalg.cholesky(metric.inputs)
    u, s, vh = torch.linalg.svd(weight @ half, full_matrices=False)
    expected = (u[:, :4] * s[:4]) @ vh[:4] @ torch.linalg.inv(half)
    torch.testing.assert_close(columns @ rows, expected)


def test_in_the_identity_metric_kronecker_is_van_loan(weight):
    eye = fit.Metric(torch.eye(M, dtype=torch.float64), torch.eye(N, dtype=torch.float64))
    pairs, history = fit.groups(weight, eye, (KRONECKER,))
    expected = to_dense(*van_loan(weight, KRONECKER.small, KRONECKER.large, 3))
    torch.testing.assert_close(dense(pairs), expected, rtol=1e-6, atol=1e-6)
    assert history[-1] == pytest.approx(history[0])


@pytest.mark.parametrize("layout", ["small-outer", "large-outer"])
def test_a_true_kronecker_sum_is_recovered_under_any_metric(metric, layout):
    shape = Factors((6, 4), (4, 4), 2, layout)
    sides = (shape.small, shape.large) if layout == "small-outer" else (shape.large, shape.small)
    a, b = (torch.randn(2, *s, generator=generator(6), dtype=torch.float64) for s in sides)
    true = to_dense(a, b)
    pairs, history = fit.groups(true, metric, (shape,))
    torch.testing.assert_close(dense(pairs), true)
    # And from a start that is not already the answer.
    noisy = [(a + 0.1 * torch.randn_like(a), b + 0.1 * torch.randn_like(b))]
    pairs, history = fit.refine(true, metric, noisy, steps=100, tolerance=0.0)
    assert history[-1] < 1e-6 * history[0]


@pytest.mark.parametrize(
    "shapes",
    [
        (KRONECKER,),
        (low_rank(2), KRONECKER),
        (KRONECKER, Factors((12, 8), (2, 2), 1, "large-outer")),
    ],
)
def test_the_harm_never_rises_and_is_that_of_the_result(weight, metric, shapes):
    pairs, history = fit.groups(weight, metric, shapes)
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(history))
    assert metric.harm(weight - dense(pairs)) == pytest.approx(history[-1], rel=1e-6)
    assert history[-1] < 0.9 * history[0]


def test_the_gradient_vanishes_at_convergence(weight, metric):
    start = [van_loan(weight, *KRONECKER.sides, KRONECKER.terms)]
    ((outer, inner),), history = fit.refine(weight, metric, start, steps=300, tolerance=0.0)
    outer, inner = outer.clone().requires_grad_(), inner.clone().requires_grad_()
    error = weight - to_dense(outer, inner)
    (0.5 * (metric.apply(error) * error).sum()).backward()
    size = history[-1] / float(outer.detach().norm())
    assert float(outer.grad.abs().max()) < 1e-3 * size
    assert float(inner.grad.abs().max()) < 1e-3 * size


@pytest.mark.parametrize("rank", [0, 1, 5, N])
@pytest.mark.parametrize("turned", [False, True])
def test_what_the_best_low_rank_leaves_and_its_gradient(weight, metric, rank, turned):
    if turned:  # wide instead of tall
        weight, metric = weight.T, fit.Metric(metric.inputs, metric.outputs)
    harm, gradient = metric.rest(weight, rank)
    left = weight
    if rank:
        columns, rows = fit.low_rank(weight, metric, rank)
        left = weight - columns @ rows
    assert float(harm) == pytest.approx(metric.harm(left), abs=1e-9)
    direction = torch.randn(weight.shape, generator=generator(8), dtype=torch.float64)
    step = 1e-5 * direction
    slope = (metric.rest(weight + step, rank)[0] - metric.rest(weight - step, rank)[0]) / 2e-5
    expected = float((gradient * direction).sum())
    assert float(slope) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_low_rank_group_frees_the_others_of_stiff_directions(weight, metric):
    """One direction a thousand times heavier than all others: one rank takes it whole."""
    heavy = 1e3 * torch.outer(weight[:, 0], weight[0])
    shapes = (low_rank(1), KRONECKER)
    alone = fit.groups(weight, metric, (KRONECKER,))[1][-1]
    assert fit.groups(weight + heavy, metric, shapes)[1][-1] < alone
    assert fit.groups(weight + heavy, metric, (KRONECKER,))[1][-1] > 10 * alone


def test_two_groups_beat_either_alone_at_its_own_size(weight, metric):
    together = fit.groups(weight, metric, (low_rank(2), KRONECKER))[1][-1]
    for alone in (low_rank(2), KRONECKER):
        assert together < fit.groups(weight, metric, (alone,))[1][-1]


def test_singular_moments_are_no_obstacle(weight):
    for inputs in (spd(N, 1, rank=2), torch.zeros(N, N, dtype=torch.float64)):
        for outputs in (spd(M, 2, rank=2), torch.zeros(M, M, dtype=torch.float64), None):
            metric = fit.Metric.of(inputs, outputs, M)
            for shapes in ((low_rank(3),), (KRONECKER,)):
                pairs, history = fit.groups(weight, metric, shapes)
                assert torch.isfinite(dense(pairs)).all()
                assert history[-1] >= 0


def test_an_indefinite_matrix_still_has_a_root():
    matrix = torch.diag(torch.tensor([1.0, -1e-12, 2.0], dtype=torch.float64))
    half = fit.root(matrix)
    torch.testing.assert_close(half @ half.T, matrix, atol=1e-9, rtol=0)


def test_equal_input_gives_equal_bytes(weight, metric):
    first, second = (fit.groups(weight, metric, (low_rank(2), KRONECKER))[0] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("power", [-60, -8, 8, 60])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_fit_does_not_depend_on_units(weight, metric, power, rank):
    """Powers of four round nothing: the factors are the same, in whatever unit the weights are, and
    those of a denormal matrix no worse."""
    pairs = [van_loan(weight, *KRONECKER.sides, KRONECKER.terms)]
    found, history = fit.refine(weight, metric, pairs, rank=rank, dtype=torch.float32)
    unit = 4.0**power
    start = [(a * unit**0.5, b * unit**0.5) for a, b in pairs]
    again, harms = fit.refine(weight * unit, metric, start, rank=rank, dtype=torch.float32)
    assert history[-1] < 0.9 * history[0]
    assert harms == pytest.approx([h * unit**2 for h in history], rel=1e-9)
    for (a, b), (c, d) in zip(found, again, strict=True):
        assert torch.equal(a * unit**0.5, c)
        assert torch.equal(b * unit**0.5, d)
