"""Budgets in their currencies: what each allows, what contradicts, what the tables say."""

import itertools
from dataclasses import replace

import pytest
import torch

from helpers import tiny
from krony import Factors, KronyError, Plan, make_plan
from krony.cli import tables
from krony.compression.limits import READ, Candidate, candidate, choose, limits
from krony.compression.structures import ALIGNED, LOST, SHARES, low_rank, sized
from krony.hf.families import find_targets
from krony.hf.plan import matrix_plan

TARGETS = find_targets(tiny("gpt2"), "mlp")
DENSE = sum(t.shape[0] * t.shape[1] for t in TARGETS)


def test_a_budget_is_met_in_its_own_currency():
    assert limits(TARGETS, 50_000, share=0.25) == {"parameters": DENSE // 4}
    assert limits(TARGETS, 50_000, parameters=40_000) == {"parameters": DENSE - 10_000}
    assert limits(TARGETS, 50_000, flops=0.5) == {"multiply-adds": DENSE // 2}
    both = limits(TARGETS, 50_000, share=0.25, flops=1.5)
    assert both == {"parameters": DENSE // 4, "multiply-adds": DENSE * 3 // 2}


def test_the_objective_asks_for_the_same_share_in_another_currency():
    fast = limits(TARGETS, 50_000, share=0.25, objective="throughput")
    assert fast == {"parameters": DENSE // 4, "multiply-adds": DENSE / 4}
    decode = limits(TARGETS, 50_000, flops=0.5, objective="decode")
    assert decode["multiply-adds"] == DENSE // 2
    assert decode["decode"] == pytest.approx(0.5 * DENSE * (1 + 1 / READ))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "give a budget"),
        ({"share": 0.5, "parameters": 100}, "not both"),
        ({"flops": 1.5}, "--flops of 1.5 is no share; give a number between 0 and 1"),
        ({"share": 0.5, "flops": 0.0}, "--flops of 0.0 is no share"),
        ({"share": float("nan")}, "a budget of nan is no share"),
        ({"share": 0.5, "flops": 0.7, "objective": "throughput"}, "leave out --flops"),
        ({"share": 0.5, "objective": "beauty"}, "no objective 'beauty'"),
    ],
)
def test_contradictions_are_refused(wrong, message):
    with pytest.raises(KronyError, match=message):
        limits(TARGETS, 50_000, **wrong)


def test_a_lookup_alone_has_no_multiply_adds_to_save():
    lookup = find_targets(tiny("llama"), "embedding")[:1]
    with pytest.raises(KronyError, match="no multiply-adds to save"):
        limits(lookup, 50_000, flops=0.5)


@pytest.mark.parametrize("seed", range(6))
def test_several_limits_at_once_are_exact(seed):
    generator = torch.Generator().manual_seed(seed)

    def number(most):
        return int(torch.randint(1, most, (1,), generator=generator))

    rows = [
        [Candidate((), number(99), number(999), number(1000) / 7) for _ in range(5)]
        for _ in range(4)
    ]
    most = {"parameters": 220, "multiply-adds": 2200, "decode": 400.0}
    fits = [
        sum(c.harm for c in pick)
        for pick in itertools.product(*rows)
        if all(sum(c.cost(name) for c in pick) <= limit for name, limit in most.items())
    ]
    if not fits:
        with pytest.raises(KronyError, match="give more"):
            choose(rows, most)
        return
    chosen = choose(rows, most)
    assert all(sum(c.cost(name) for c in chosen) <= limit for name, limit in most.items())
    assert sum(c.harm for c in chosen) == pytest.approx(min(fits), rel=1e-3)


def test_decode_refuses_sums_whose_arithmetic_eats_what_their_bytes_save():
    target = TARGETS[0]
    groups = {
        "low rank": (Factors((128, 1), (1, 32), 6),),
        "sum": (Factors((32, 8), (4, 4), 3),),
    }
    made = {name: candidate(target, g, 1.0) for name, g in groups.items()}
    dense = candidate(target, (), 0.0)
    assert dense.cost("decode") == 4096 * (1 + 1 / READ)
    assert made["sum"].parameters < made["low rank"].parameters
    assert made["sum"].cost("decode") > 1.1 * made["sum"].parameters
    low = made["low rank"]
    assert low.cost("decode") / dense.cost("decode") == pytest.approx(low.parameters / 4096)


def test_the_costs_of_a_plan_in_every_currency():
    model = tiny("gpt2")
    plan = make_plan(model, small=(4, 4), terms=6, layers=[0])
    kept = [t for t in TARGETS if t.layer == 1]
    table = tables.costs_table(plan, kept, torch.bfloat16)
    assert "2 x sum with 4x4" in table.title
    assert "2 x dense" in table.title
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    after = plan.parameters + DENSE // 2
    assert rows[0][1:] == (f"{DENSE:,}", f"{after:,}", tables.percent(after / DENSE))
    assert rows[1][0] == "bytes (bfloat16)"
    adds = plan.multiply_adds + DENSE // 2
    assert rows[2][2:] == (f"{adds:,}", tables.percent(adds / DENSE))
    assert rows[3][2] == f"{DENSE:,} and {6 * 2 * 4096:,} a batch"
    fewer = make_plan(model, small=(4, 4), terms=3, layers=[0])
    names = list(tables.costs_table(fewer, kept, torch.bfloat16).columns[0].cells)
    assert "the same, W formed" not in names  # which would take more
    assert not any("kept" in name for name in names)
    narrow = [t.narrowed(t.hidden // 4) for t in TARGETS if t.layer == 0]
    sums = [Factors((t.shape[0] // 4, t.shape[1] // 4), (4, 4), 9) for t in narrow]
    matrices = [matrix_plan(t, (s,)) for t, s in zip(narrow, sums, strict=True)]
    table = tables.costs_table(Plan(tuple(matrices)), kept, torch.bfloat16)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows[2][2] == f"{sum(s.parameters for s in sums) + 2 * 1024 + DENSE // 2:,}"
    assert rows[3][2] == f"{2 * 1024 + DENSE // 2:,}"  # multiply-adds, of W
    assert tables.structure((Factors((128, 1), (1, 32), 6),)) == "low rank"


def test_ranks_are_what_processors_multiply_fast():
    for share in SHARES:
        for shape in ((3072, 768), (256, 1024), (64, 48)):
            exact = sized((shape[0], 1), (1, shape[1]), float(share))
            factors = low_rank(shape, float(share))
            lost = exact.terms - factors.terms
            assert 0 <= lost < max(1, exact.terms / LOST)
            assert replace(factors, terms=exact.terms) == exact
            if exact.terms >= LOST * max(ALIGNED):
                assert factors.terms % max(ALIGNED) == 0
            elif exact.terms >= LOST * 8:
                assert factors.terms % 8 == 0
