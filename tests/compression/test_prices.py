"""Prices of all widths at once against each on its own, and sums that are fitted where they pay."""

import math

import pytest
import torch

from helpers import tiny
from krony.compression import width
from krony.compression.budget import Catalogue
from krony.compression.calibrate import calibrate
from krony.compression.limits import choose, limits
from krony.compression.prices import Matrix, price_widths
from krony.compression.structures import widths
from krony.compression.work import Work
from krony.hf.families import dense_weight, find_targets, mlps
from krony.maths import fit

WINDOWS = torch.randint(96, (48, 16), generator=torch.Generator().manual_seed(1))


def matrices(model, mlp, moments):
    return [
        Matrix(t, dense_weight(model.get_submodule(t.name)), moments[t.name]) for t in mlp.targets
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_all_widths_at_once_are_those_of_each_alone(family):
    """Against units taken out, solved for and decomposed anew at each width."""
    model = tiny(family)
    targets = find_targets(model, "mlp")
    moments = calibrate(model, WINDOWS, [t.name for t in targets])
    mlp = mlps(model, targets)[0]
    whole = matrices(model, mlp, moments)
    found = price_widths(mlp, lambda: whole, widths(mlp.down.hidden), Work())
    down = whole[-1]
    metric = down.metric
    order = width.elimination(down.weight, metric)
    for each in found:
        units = width.narrow(down.weight, metric, order, each.hidden)
        assert each.harm == pytest.approx(units.harm, rel=1e-6, abs=1e-12)
        for matrix, row in zip(whole, each.rows, strict=True):
            mine = matrix.metric
            if matrix is down:
                inputs = mine.inputs[units.kept][:, units.kept]
                harms = fit.low_rank_harm(units.down, fit.Metric(mine.outputs, inputs))
            else:
                rows = width.rows_of(units.kept, mlp.down.hidden, matrix.target.parts)
                outputs = mine.outputs[rows][:, rows]
                harms = fit.low_rank_harm(matrix.weight[rows], fit.Metric(outputs, mine.inputs))
            for candidate in row[1:]:
                (factors,) = candidate.groups
                harm = float(harms[factors.terms])
                assert candidate.harm == pytest.approx(harm, rel=1e-4, abs=1e-9 * float(harms[0]))


def catalogue(model, target="mlp"):
    targets = find_targets(model, target)
    moments = calibrate(model, WINDOWS, [t.name for t in targets])
    return targets, Catalogue.of(model, targets, moments, Work(), narrow=False)


def test_what_a_plan_takes_of_sums_was_fitted():
    """Every chosen sum has about the harm of a fit of its own; tiny matrices have few ranks."""
    targets, priced = catalogue(tiny("gpt2"))
    most = limits(targets, 10**6, share=0.4)
    found = priced.at(most, sums=True)
    taken = [c for c in choose(found.rows, most) if len(c.groups) == 2]
    assert taken
    for target, row in zip(found.targets, found.rows, strict=True):
        matrix = priced.matrices[target.name]()
        for candidate in (c for c in row if any(c is t for t in taken)):
            _, history = fit.groups(matrix.weight, matrix.metric, candidate.groups, steps=3)
            assert candidate.harm == pytest.approx(history[-1], rel=0.3)


def test_sums_that_cannot_win_are_not_fitted(monkeypatch):
    targets, priced = catalogue(tiny("gpt2"))
    most = limits(targets, 10**6, share=0.4)
    fits = []
    fitting = fit.groups
    monkeypatch.setattr(fit, "groups", lambda *a, **k: (fits.append(a), fitting(*a, **k))[1])
    plain = priced.at(most)
    assert not priced_sums(priced.at(most, sums=True, below=0.0))
    assert not fits
    assert not priced_sums(plain)
    priced.at(most, sums=True, below=math.inf)
    assert 0 < len(fits) < 4 * 2 * 3  # of matrices, parts and sizes


def priced_sums(prices):
    return [c for row in prices.rows for c in row if len(c.groups) == 2]
