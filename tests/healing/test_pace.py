"""Evaluations of a run: as many as a curve needs, and no tenth of a run more."""

import datasets
import pytest

from krony.healing.pace import EVALUATIONS, evaluations
from krony.healing.recipe import default

WINDOW = 256


def held_out(blocks):
    return datasets.Dataset.from_dict({"input_ids": [[i] * WINDOW for i in range(blocks)]})


@pytest.mark.parametrize("tokens", [50_000, 300_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("blocks", [3, 40, 1000])
def test_all_together_cost_about_a_tenth(tokens, blocks):
    some, every = evaluations(tokens, held_out(blocks), WINDOW)
    times = tokens // every
    assert 1 <= times <= EVALUATIONS
    assert len(some) <= blocks
    # A forward pass beside one forward and backward pass and the teacher's forward.
    assert times * len(some) * WINDOW / 4 <= 0.11 * tokens
    assert len(some) * WINDOW >= min(8192, blocks * WINDOW)


def test_a_long_run_has_a_curve_and_a_short_one_its_two_ends():
    assert evaluations(10_000_000, held_out(1000), WINDOW)[1] == 500_000
    assert evaluations(1000, held_out(1000), WINDOW)[1] == 1000


def test_a_stream_is_cut_too():
    stream = held_out(1000).to_iterable_dataset()
    some, _ = evaluations(300_000, stream, WINDOW)
    assert len(list(some)) == len(evaluations(300_000, held_out(1000), WINDOW)[0])


def test_a_step_has_two_tokens_for_each_of_the_width():
    assert default(256, 100_000).stages[0].batch_tokens == 512
    assert default(576, 100_000).stages[0].batch_tokens == 1152
    assert default(4096, 100_000_000).stages[0].batch_tokens == 50_000
