"""Plans: shapes by orientation, layers, JSON, and everything they refuse."""

import json
import time

import pytest
import torch
import transformers as hf

from helpers import tiny
from krony import Factors, KronyError, MatrixPlan, Plan, make_plan


def test_shapes_are_hidden_by_model_and_turned_for_down_matrices(gpt2):
    plan = make_plan(gpt2, shape=(64, 16), terms=2)
    by_name = {m.name: m for m in plan.matrices}
    up, down = by_name["transformer.h.0.mlp.c_fc"], by_name["transformer.h.0.mlp.c_proj"]
    assert (up.shape, up.groups) == ((128, 32), (Factors((64, 16), (2, 2), 2),))
    assert (down.shape, down.groups) == ((32, 128), (Factors((16, 64), (2, 2), 2),))
    assert len(plan.matrices) == 4
    halved = make_plan(gpt2, small=(2, 1)).matrices
    assert [m.groups[0].small for m in halved[:2]] == [(2, 1), (1, 2)]


def test_attention_shapes_are_outputs_by_inputs(gpt2):
    plan = make_plan(gpt2, shape=(32, 16), target="attention")
    assert [m.groups[0].small for m in plan.matrices[:2]] == [(3, 2), (1, 2)]


def test_the_paper_model_counts():
    with torch.device("meta"):
        model = hf.GPT2LMHeadModel(hf.GPT2Config())
    total = sum(p.numel() for p in model.parameters())
    assert total == 124_439_808
    expected = {"96M": 96_128_304, "81M": 81_972_576, "80M-2": 80_400_048, "92M-4": 92_983_488}
    for scheme, count in expected.items():
        plan = make_plan(model, scheme=scheme)
        assert len(plan.matrices) == 24
        assert total - plan.dense_parameters + plan.parameters == count


def test_json_round_trip(gpt2):
    plan = make_plan(gpt2, shape=(64, 16), terms=3, scalars=True, layout="large-outer")
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    json.loads(plan.to_json())
    with pytest.raises(AttributeError):
        plan.matrices = ()


def test_layers(gpt2):
    assert {m.name.split(".")[2] for m in make_plan(gpt2, small=(2, 2), layers=[1]).matrices} == {
        "1"
    }
    with pytest.raises(KronyError, match=r"no layer \[2, 7\]: layers go from 0 to 1"):
        make_plan(gpt2, small=(2, 2), layers=[1, 2, 7])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "one of a scheme, a shape or a small shape"),
        ({"scheme": "81M", "shape": (64, 16)}, "only one"),
        ({"scheme": "81M"}, "for MLPs of 3072x768, and transformer.h.0.mlp.c_fc is 128x32.*2x2"),
        ({"scheme": "82M"}, "no scheme '82M'"),
        ({"shape": (60, 16)}, "60 is no divisor of 128; the nearest are 16, 32, 64, 128"),
        ({"shape": (0, 16)}, "0 is no divisor"),
        ({"shape": (64, 16), "terms": 5}, "c_fc: 5 terms .* between 1 and 4"),
        ({"shape": (64, 16), "terms": 0}, "0 terms"),
        ({"shape": (64, 16), "target": "*.nothing"}, "is named"),
        ({"shape": (64, 16), "layout": "sideways"}, "'sideways' is not one of"),
    ],
)
def test_plans_that_cannot_be(gpt2, wrong, message):
    with pytest.raises(KronyError, match=message):
        make_plan(gpt2, **wrong)


def test_a_damaged_plan_is_refused(tmp_path):
    matrix = MatrixPlan("a", (12, 8), (Factors((6, 4), (2, 3)),))
    with pytest.raises(KronyError, match="make 12x12, but the matrix is 12x8"):
        Plan.from_dict(Plan((matrix,)).to_dict())
    with pytest.raises(KronyError, match="not JSON"):
        Plan.from_json("{")
    with pytest.raises(KronyError, match="the name of matrix 0 of the plan is 3"):
        Plan.from_json('{"matrices": [{"name": 3}]}')
    with pytest.raises(KronyError, match=r"can't read .*nowhere\.json"):
        Plan.read(tmp_path / "nowhere.json")


def entry(**changes):
    """A good entry of a plan, but for some of its fields."""
    group = {"large": [6, 4], "small": [2, 2], "terms": 1, "layout": "small-outer"}
    group |= {k: v for k, v in changes.items() if k in group}
    whole = {"name": "a", "shape": [12, 8], "groups": [group], "scalars": False, "bias": True}
    return whole | {"conv1d": False} | {k: v for k, v in changes.items() if k not in group}


MILLION = 10**6
HOSTILE = {
    "a fraction of a term": {"terms": 1.5},
    "a text of a term": {"terms": "1"},
    "null terms": {"terms": None},
    "true terms": {"terms": True},
    "negative terms": {"terms": -1},
    "a million terms": {"terms": MILLION},
    "a huge number": {"terms": 10**4000},
    "one side": {"shape": [12]},
    "three sides": {"shape": [12, 8, 1]},
    "sides by name": {"shape": {"m": 12}},
    "a side of nothing": {"large": [0, 4]},
    "an unknown layout": {"layout": "inside-out"},
    "a layout of lists": {"layout": [[]]},
    "no groups": {"groups": None},
    "a million groups": {"groups": [entry()["groups"][0]] * MILLION},
    "groups of nothing": {"groups": [None]},
    "a name of numbers": {"name": 5},
    "a name without an end": {"name": "a" * MILLION},
    "scalars of text": {"scalars": "yes"},
    "parts of nothing": {"parts": 0, "dense_shape": [24, 8]},
    "a dense shape that is smaller": {"dense_shape": [6, 8]},
    "what a newer version wrote": {"future": 1},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_plan_that_can_not_be_is_refused_at_once(changes):
    started = time.process_time()
    with pytest.raises(KronyError) as found:
        Plan.from_dict({"matrices": [entry(**changes)]})
    assert time.process_time() - started < 2
    assert len(str(found.value)) < 400
    assert Plan.from_dict({"matrices": [entry()]})


@pytest.mark.parametrize(
    "text",
    [
        "[" * MILLION,
        '{"a":' * 500 + "1" + "}" * 500,
        '{"matrices": [], "matrices": []}',
        '{"matrices": NaN}',
        '{"matrices": [' + ",".join(["{}"] * 300_000) + "]}",
        '{"matrices": ' + "9" * 10_000 + "}",
        "null",
        "[]",
        "",
        '{"matrices": [' + ",".join([json.dumps(entry())] * 2) + "]}",
    ],
    ids=lambda text: text[:20],
)
def test_text_that_is_no_plan_is_refused_at_once(text, tmp_path):
    started = time.process_time()
    with pytest.raises(KronyError):
        Plan.from_json(text)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(KronyError, match=r"plan\.json"):
        Plan.read(tmp_path / "plan.json")
    assert time.process_time() - started < 4


def test_a_plan_leaves_the_model_alone():
    model = tiny("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    make_plan(model, small=(2, 2), target="all")
    assert {name: type(module) for name, module in model.named_modules()} == before
