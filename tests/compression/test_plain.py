"""Ordinary, smaller models of least harm: sizes met, what is measured, and laws of the ranking."""

import itertools
import math

import pytest
import torch

import krony
from helpers import FAMILIES, logits, tiny
from krony import KronyError
from krony.compression import plain
from krony.compression.judge import Judge, influence
from krony.compression.plain import parameters_of, slim
from krony.compression.removal import Heads, Reader, Units
from krony.compression.settle import settle
from krony.compression.work import Work
from krony.hf.families import blocks, dense_weight
from krony.hf.provenance import dense_blocks, provenance
from krony.hf.smaller import Kept, Sizes, anatomy, columns_of, smaller
from krony.maths.fit import Metric

QUICK = ("gpt2", "llama", "phi3", "gpt_neox")
WINDOWS = torch.randint(0, 96, (16, 32), generator=torch.Generator().manual_seed(0))


def inner(model) -> int:
    return sum(p.numel() for _, _, block in blocks(model) for p in block.parameters())


def size(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "family",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_sizes_are_met_by_ordinary_models(family):
    model = tiny(family)
    wanted = size(model) - int(0.4 * inner(model))
    made = slim(model, WINDOWS[:8], parameters=wanted)
    assert wanted - 0.1 * inner(model) < size(made) <= wanted
    assert type(made) is type(model)
    assert made.dtype == model.dtype


def test_the_same_input_gives_the_same_bytes():
    made = [slim(tiny("llama"), WINDOWS, parameters=16_000) for _ in range(2)]
    assert torch.equal(logits(made[0]), logits(made[1]))


def test_what_is_finished_is_not_made_again(tmp_path, monkeypatch):
    model = tiny("llama")

    def made() -> torch.Tensor:
        work = Work.of(model, WINDOWS, 0, tmp_path / "work")
        return logits(slim(model, WINDOWS, parameters=16_000, work=work))

    first = made()
    monkeypatch.setattr(plain._Cut, "_made", None)  # whatever is not found there
    assert torch.equal(made(), first)


def test_a_target_leaves_the_rest_alone():
    model = tiny("llama")
    whole, config = size(model), model.config
    wanted = parameters_of(model, "mlp", share=0.7)
    assert wanted == whole - math.ceil(0.3 * 2 * 3 * 32 * 48)
    made = slim(model, WINDOWS, parameters=wanted, target="mlp")
    assert size(made) <= wanted
    assert made.config.intermediate_size < config.intermediate_size
    for name in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        assert getattr(made.config, name) == getattr(config, name)
    fewer = slim(model, WINDOWS, parameters=whole - 2_000, target="attention")
    assert fewer.config.intermediate_size == config.intermediate_size
    assert fewer.config.num_attention_heads < config.num_attention_heads


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "opt"])
def test_settling_brings_a_model_back(family):
    """Blocks that wrote too much write what they did, exactly, where nothing else was lost."""
    dense, model = tiny(family), tiny(family)
    body, nearer = anatomy(model), []
    with torch.no_grad():
        for part in body.parts:
            dense_weight(model.get_submodule(part.mlp.down.name)).mul_(3.0)
    before = (logits(model) - logits(dense)).abs().max()
    settle(model, dense, body, [0, 1], WINDOWS.repeat(32, 1), lambda *row: nearer.append(row))
    after = (logits(model) - logits(dense)).abs().max()
    assert after < 0.1 * before
    assert nearer == [(1, 2), (2, 2)]


def test_settling_makes_up_for_a_block_that_is_gone():
    dense = tiny("llama", num_hidden_layers=3)
    body = anatomy(dense)
    sizes = Sizes(48, 2, 2, 2)
    made = smaller(dense, body, sizes, {0: Kept(), 2: Kept()})
    before = Judge(dense, WINDOWS).harm(made)
    settle(made, dense, anatomy(made), [0, 2], WINDOWS)
    assert Judge(dense, WINDOWS).harm(made) < 0.5 * before


def test_how_it_was_made_goes_along(tmp_path):
    model = tiny("llama", num_hidden_layers=3)
    vars(text := WINDOWS.clone())["text"] = {"name": "t", "origin": "o", "sha256": "s"}
    made = slim(model, text, parameters=parameters_of(model, share=0.6))
    krony.save(made, tmp_path / "made")
    again = krony.load_model(tmp_path / "made")
    known = provenance(again)
    assert known["texts"] == [{"name": "t", "origin": "o", "sha256": "s", "use": "calibration"}]
    assert known["parameters"] == {"before": size(model), "after": size(again)}
    assert len(known["blocks"]) == again.config.num_hidden_layers
    assert dense_blocks(again, model)[-1] == "model.layers.2"
    assert dense_blocks(again, tiny("llama", num_hidden_layers=1)) is None


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
    units = Units(lambda: reader(32), list(range(4, 32, 4)))
    harms = [units.harm(w) for w in range(4, 33)]
    assert harms[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(harms))
    exact = reader(32).harm(units.kept(8)[0])
    assert units.harm(8) == pytest.approx(exact, rel=0.2)


def test_heads_stay_in_groups_of_the_same_number():
    sizes = Sizes(0, groups=3, heads=2, blocks=1)
    found = Heads(lambda: reader(3 * 2 * 4), sizes, 4).kept
    assert set(found) == {(g, h) for g in (1, 2, 3) for h in (1, 2)}
    for (groups, heads), (stay, its_groups, harm) in found.items():
        assert len(stay) == groups * heads
        assert len(its_groups) == groups
        assert {int(h) // 2 for h in stay} == {int(g) for g in its_groups}
        assert harm >= 0
    assert found[3, 2][2] == pytest.approx(0, abs=1e-9)
    columns = columns_of(found[1, 1][0], 4)
    assert found[1, 1][2] == pytest.approx(reader(24).harm(columns))


def test_what_is_refused():
    model = tiny("llama")
    with pytest.raises(KronyError, match="parameters can't be: without any of what may go"):
        slim(model, WINDOWS, parameters=100)
    with pytest.raises(KronyError, match="can lose all, mlp, attention, not 'embedding'"):
        slim(model, WINDOWS, parameters=16_000, target="embedding")
    with pytest.raises(KronyError, match="a plan and an init are of factors"):
        krony.compress(model, krony.make_plan(model, small=(2, 2)), structure="plain")
    with pytest.raises(KronyError, match="at least 2 windows"):
        slim(model, WINDOWS[:1], parameters=16_000)
    assert plain.CUT < 1
