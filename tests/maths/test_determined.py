"""Fits are determined whatever the data: few tokens, dead units, constants, denormals."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from krony.compression.calibrate import Inputs
from krony.compression.sequential import DataOptions, Pairing, fit_matrix
from krony.hf.plan import MatrixPlan
from krony.maths import fit, kron
from krony.maths.schemes import Factors

SIDES = st.integers(1, 4)
KINDS = ("full", "singular", "dead", "constant", "alike", "huge", "denormal", "zero")


def tokens_of(kind, count, width, seed):
    """(tokens, width) of float32, in one of the ways in which data are degenerate."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    if kind == "singular":
        x = x[:, :1] * torch.randn(width, generator=generator)
    elif kind == "dead":
        x[:, ::2] = 0
    elif kind == "constant":
        x[:, 0] = 7.0
    elif kind == "alike":
        x[:] = x[0].clone()
    elif kind == "huge":
        x[:, 0] = 100 + x[:, 0]
    elif kind == "denormal":
        x = x * 1e-41
    elif kind == "zero":
        x = torch.zeros(count, width)
    return x


def inputs_of(x, pieces=1):
    """Their moments, summed over so many batches."""
    found = Inputs.zeros(x.shape[1])
    for part in x.chunk(pieces):
        found.add(part)
    return found


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 40),
    width=st.integers(1, 24),
    centered=st.booleans(),
    seed=st.integers(0, 99),
)
@example(kind="alike", count=19, width=18, centered=True, seed=1)  # too small a ridge was not
def test_what_errors_are_weighed_by_is_positive_definite(kind, count, width, centered, seed):
    weighing = inputs_of(tokens_of(kind, count, width, seed)).weighing(centered)
    metric = fit.Metric.of(weighing, None, 1)
    assert torch.isfinite(metric.inputs).all()
    assert int(torch.linalg.cholesky_ex(metric.inputs).info) == 0
    # Each input's own weight stays; only what they say of each other is shrunk.
    moments = inputs_of(tokens_of(kind, count, width, seed))
    plain = (moments.covariance if centered else moments.second).diagonal()
    scale = float(moments.second.diagonal().max())
    assert torch.allclose(weighing.diagonal(), plain, atol=2e-5 * scale + 1e-60, rtol=0)


def test_many_tokens_leave_correlations_as_they_are_and_few_do_not():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator)

    def change(count):
        found = inputs_of(torch.randn(count, 32, generator=generator) @ mix)
        return float((found.weighing(True) - found.covariance).norm() / found.covariance.norm())

    changes = [change(count) for count in (16, 96, 160, 16_000)]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 0.1
    assert changes[-1] < 2e-3


def test_what_is_there_twice_stays_so_where_there_are_tokens_enough():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(16 * 32, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    found = inputs_of(torch.cat([half, half], 1)).weighing(False)
    once, twice, across = found[:16, :16], found[16:, 16:], found[:16, 16:]
    assert torch.allclose(once, twice, rtol=1e-6)
    apart = once.diagonal() - across.diagonal()
    assert (apart < 1e-4 * once.diagonal()).all()
    few = inputs_of(torch.cat([half, half], 1)[:40]).weighing(False)
    assert (few.diagonal()[:16] - few[:16, 16:].diagonal() > 0.01 * few.diagonal()[:16]).all()


def test_no_inputs_scale_matters():
    x = tokens_of("full", 12, 6, 0).double()
    scale = torch.tensor([1e-3, 1.0, 5.0, 1e3, 0.1, 7.0], dtype=torch.float64)

    def of(x):
        square = x.T @ x / len(x)
        return fit.determined(square, square.diagonal(), len(x))

    assert torch.allclose(of(x * scale), of(x) * scale[:, None] * scale, rtol=1e-9)


GROUPS = {
    "low rank": (Factors((16, 1), (1, 24), 3, "small-outer"),),
    "sum": (Factors((8, 12), (2, 2), 2, "small-outer"),),
    "dense": (),
}


@pytest.mark.parametrize("centered", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("count", [4, 20, 200])
@pytest.mark.parametrize("groups", GROUPS)
def test_few_tokens_determine_the_solution_whatever_the_order_of_sums(groups, count, centered):
    """Sums in another order, as another number of threads makes them, change rounding only."""
    if groups == "sum" and not centered:
        pytest.skip("its iterations stop in one of several valleys")
    x = tokens_of("huge", count, 24, 1)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    bias = torch.randn(16, generator=generator, dtype=torch.float64) if centered else None
    y = (x.double() @ weight.T).float() + torch.randn(count, 16, generator=generator) * 0.1
    matrix = MatrixPlan("w", (16, 24), GROUPS[groups], bias=centered, dense_shape=(16, 48))

    def solved(pieces):
        inputs = inputs_of(x, pieces)
        pairing = Pairing.zeros(16, inputs)
        for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            pairing.add(a, b)
        found = fit_matrix(matrix, weight, bias, inputs, None, DataOptions(), pairing)
        dense = kron.sum_to_dense(found.pairs) if found.pairs else found.weight
        return dense, found.bias

    (one, first), (two, second) = solved(1), solved(4)
    assert torch.isfinite(one).all()
    assert float((one - two).norm() / one.norm()) < 1e-2
    if centered:  # beside what it makes up for: the mean of an input of 100
        assert float((first - second).abs().max() / (one @ x[0].double()).abs().max()) < 1e-2
    # Where the sample says nothing, the dense weight stays: no number explodes.
    assert float(one.norm()) < 2 * float(weight.norm())


@settings(deadline=None, max_examples=60)
@given(
    sides=st.tuples(SIDES, SIDES, SIDES, SIDES),
    terms=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    inputs=st.sampled_from(KINDS),
    layout=st.sampled_from(["small-outer", "large-outer"]),
    seed=st.integers(0, 99),
)
@example(
    sides=(2, 4, 1, 3), terms=1, kind="denormal", inputs="singular", layout="small-outer", seed=0
)
def test_factors_of_any_matrix_on_any_data_are_finite_and_better_than_none(
    sides, terms, kind, inputs, layout, seed
):
    m1, n1, m2, n2 = sides
    m, n = m1 * m2, n1 * n2
    weight = tokens_of(kind, m, n, seed).double()
    factors = Factors((m1, n1), (m2, n2), min(terms, m1 * n1, m2 * n2), layout)
    found = inputs_of(tokens_of(inputs, 5, n, seed + 1))
    metric = fit.Metric.of(found.weighing(True), None, m)
    pairs, history = fit.groups(weight, metric, (factors,))
    dense = kron.sum_to_dense(pairs)
    assert torch.isfinite(dense).all()
    nothing = metric.harm(weight)
    assert metric.harm(weight - dense) <= nothing * (1 + 1e-6) + 1e-300
    assert history == sorted(history, reverse=True)
    harm = fit.low_rank_harm(weight, metric)
    assert torch.isfinite(harm).all()
    assert (harm.diff() <= 1e-9 * float(harm.max()) + 1e-300).all()
