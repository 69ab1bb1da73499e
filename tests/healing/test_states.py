"""States of a run: whole through files, and no pickle among them."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import tiny
from krony.errors import KronyError
from krony.healing.states import load_state, random_state, save_state, set_random_state

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nests = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40)
@given(state=nests)
def test_every_nest_comes_back(state, tmp_path_factory):
    stem = tmp_path_factory.mktemp("state") / "state"
    save_state(state, stem)
    assert load_state(stem) == state


def test_tensors_keep_their_bits_and_dtypes(tmp_path):
    base = torch.arange(6, dtype=torch.float32)
    state = {
        "half": base.bfloat16(),
        "view": base[::2],
        "twice": [base, base],
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
    }
    save_state(state, tmp_path / "optimizer")
    found = load_state(tmp_path / "optimizer")
    for name in ("half", "view", "scalar", "empty"):
        assert found[name].dtype == state[name].dtype
        assert found[name].equal(state[name])
    assert found["twice"][1].equal(base)


def test_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    draw()
    save_state(random_state(), tmp_path / "random-0")
    wanted = draw()
    draw()
    set_random_state(load_state(tmp_path / "random-0"))
    assert draw() == wanted


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_goes_on_where_it_was(make, tmp_path):
    def step(model, optimizer):
        model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = tiny("gpt2")
    optimizer = make(model.parameters(), lr=1e-2)
    step(model, optimizer)
    save_state(optimizer.state_dict(), tmp_path / "optimizer")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    step(model, optimizer)
    again = tiny("gpt2")
    again.load_state_dict(weights)
    fresh = make(again.parameters(), lr=1e-2)
    fresh.load_state_dict(load_state(tmp_path / "optimizer"))
    step(again, fresh)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert a.equal(b)


def test_a_state_that_is_damaged_or_of_an_older_form_is_named(tmp_path):
    with pytest.raises(KronyError, match="remove that checkpoint's folder"):
        load_state(tmp_path / "optimizer")
