"""Ordinary, smaller models of least harm: sizes met, what is measured, and laws of the ranking."""

import itertools

import pytest
import torch

from helpers import FAMILIES, logits, tiny
from krony import KronyError
from krony.compression import plain
from krony.compression.plain import Heads, Judge, Reader, Units, influence, slim
from krony.hf.families import blocks
from krony.hf.smaller import Sizes, columns_of
from krony.maths.fit import Metric

WINDOWS = torch.randint(0, 96, (16, 32), generator=torch.Generator().manual_seed(0))


def inner(model) -> int:
    return sum(p.numel() for _, _, block in blocks(model) for p in block.parameters())


def size(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_met_by_ordinary_models(family):
    model = tiny(family)
    wanted = size(model) - int(0.4 * inner(model))
    made = slim(model, WINDOWS, parameters=wanted)
    assert wanted - 0.1 * inner(model) < size(made) <= wanted
    assert type(made) is type(model)
    assert made.dtype == model.dtype


def test_the_same_input_gives_the_same_bytes():
    made = [slim(tiny("llama"), WINDOWS, parameters=16_000) for _ in range(2)]
    assert torch.equal(logits(made[0]), logits(made[1]))


def test_the_judge_knows_the_divergence():
    teacher, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with torch.inference_mode():
        p = teacher(input_ids=WINDOWS).logits.double().log_softmax(-1)
        q = other(input_ids=WINDOWS).logits.double().log_softmax(-1)
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    assert Judge(teacher, WINDOWS).harm(other) == pytest.approx(wanted, rel=1e-4)
    assert Judge(teacher, WINDOWS).harm(teacher) == pytest.approx(0, abs=1e-6)


def test_a_block_that_does_nothing_has_no_influence():
    model = tiny("llama")
    with torch.no_grad():
        for matrix in (model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn.o_proj):
            matrix.weight.zero_()
    found = influence(model, WINDOWS[:2])
    assert found[1] == pytest.approx(0, abs=1e-6)
    assert found[0] > 1e-3


def reader(columns: int, seed: int = 0) -> Reader:
    generator = torch.Generator().manual_seed(seed)
    weight, x = (
        torch.randn(n, columns, generator=generator, dtype=torch.float64) for n in (6, 200)
    )
    metric = Metric.of(x.T @ x / 200, None, 6)
    return Reader(weight, metric, x.mean(0), None)


def test_harm_grows_as_units_go():
    units = Units(reader(32), list(range(4, 32, 4)))
    harms = [units.harm(w) for w in range(4, 33)]
    assert harms[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(harms))
    exact = units.kept(8)[2]
    assert units.harm(8) == pytest.approx(exact, rel=0.2)


def test_heads_stay_in_groups_of_the_same_number():
    sizes = Sizes(0, groups=3, heads=2, blocks=1)
    found = Heads(reader(3 * 2 * 4), sizes, 4).kept
    assert set(found) == {(g, h) for g in (1, 2, 3) for h in (1, 2)}
    for (groups, heads), (stay, its_groups, harm) in found.items():
        assert len(stay) == groups * heads
        assert len(its_groups) == groups
        assert {int(h) // 2 for h in stay} == {int(g) for g in its_groups}
        assert harm >= 0
    assert found[3, 2][2] == pytest.approx(0, abs=1e-9)
    columns = columns_of(found[1, 1][0], 4)
    assert found[1, 1][2] == pytest.approx(reader(24).with_only(columns)[1])


def test_what_is_refused():
    model = tiny("llama")
    with pytest.raises(KronyError, match="parameters can't be: without any block"):
        slim(model, WINDOWS, parameters=100)
    with pytest.raises(KronyError, match="at least 2 windows"):
        slim(model, WINDOWS[:1], parameters=16_000)
    assert plain.CUT < 1
