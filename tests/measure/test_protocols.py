"""Each protocol's figure by hand: a model whose loss of every token is known."""

import math

import pytest
import torch
from torch import nn

from helpers import tiny
from krony.measure import evaluate
from krony.text.data import Text


@pytest.fixture
def model():
    """Token t costs log(1 + seen) nats where `seen` tokens of the window stand before it.

    Its logits say the right answer nothing: they are zeros but for one place, so that the loss is
    known from the position alone.
    """
    made = tiny("gpt2")

    class Known(nn.Module):
        def forward(self, hidden):
            windows, length, _ = hidden.shape
            logits = torch.full((windows, length, 96), -1e9)
            for seen in range(1, length + 1):
                logits[:, seen - 1, : seen + 1] = 0.0  # tokens 0 to `seen` alike, no other
            return logits

    made.lm_head = Known()
    return made


def cost(*seen):
    return sum(math.log(1 + s) for s in seen)


IDS = torch.zeros(10, dtype=torch.long)  # token 0 is always among those that are possible
TEXT = Text("t", "five words are in here", "by hand")


def test_windows_side_by_side(model):
    """10 tokens in windows of 4: 0123 4567 89, the first of each not predicted."""
    found = evaluate.perplexity(model, IDS, TEXT, window=4)
    assert found.predicted == 7
    assert found.nats * 7 == pytest.approx(cost(1, 2, 3, 1, 2, 3, 1))
    means = (cost(1, 2, 3) / 3, cost(1, 2, 3) / 3, cost(1))
    assert found.chunk_mean == pytest.approx(math.exp(sum(means) / 3))  # the paper's figure


def test_windows_that_overlap(model):
    """Stride 2: every token but the first, those after the first window with 2 or 3 before them."""
    found = evaluate.perplexity(model, IDS, TEXT, window=4, stride=2)
    assert found.predicted == 9
    assert found.nats * 9 == pytest.approx(cost(1, 2, 3, 2, 3, 2, 3, 2, 3))
    assert found.chunk_mean is None


def test_windows_that_begin_with_bos(model):
    """BOS takes a place in every window, and every token of the text is predicted."""
    found = evaluate.perplexity(model, IDS, TEXT, window=4, bos=0)
    # Behind a BOS in front, the text is 9 tokens: 012 345 678.
    assert found.predicted == 9
    assert found.nats * 9 == pytest.approx(cost(1, 2, 3) * 3)
    assert found.tokens == 9
    assert found.protocol == "krony-pt with BOS"


def test_by_word_and_by_byte(model):
    """Unlike tokenizers are compared by what they share: the loss of the whole text."""
    found = evaluate.perplexity(model, IDS, TEXT, window=4)
    nats = cost(1, 2, 3, 1, 2, 3, 1) / 7 * 10  # unpredicted tokens at the mean of the others
    assert found.words == 5
    assert found.word_perplexity == pytest.approx(math.exp(nats / 5))
    assert found.bits_per_byte == pytest.approx(nats / 22 / math.log(2))
    assert found.to_dict()["bits_per_byte"] == found.bits_per_byte
    assert evaluate.perplexity(model, IDS, window=4).word_perplexity is None
