"""Perplexity against a plain loop, window by window."""

import math

import pytest
import torch

from helpers import tiny
from krony import KronyError, load_model, load_tokenizer
from krony.measure import evaluate


def plain(model, ids, window, stride):
    """transformers' guide to perplexity, one window at a time: (losses by token, window means)."""
    losses, means, previous = [], [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        piece = ids[begin:end][None]
        with torch.inference_mode():
            logits = model(input_ids=piece).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none")
        kept = loss[-min(end - previous, len(loss)) :].tolist() if len(loss) else []
        if kept:
            losses += kept
            means.append(sum(kept) / len(kept))
        previous = end
        if end == len(ids):
            break
    return losses, means


@pytest.mark.parametrize("length", [64, 97, 129])
@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 8), (32, 31), (64, 64), (8, 2)])
def test_equals_a_plain_loop(gpt2, monkeypatch, window, stride, length):
    ids = torch.randint(96, (length,), generator=torch.Generator().manual_seed(length))
    losses, means = plain(gpt2, ids, window, stride)
    for logit_bytes in (1, 2**28):
        monkeypatch.setattr(evaluate, "LOGIT_BYTES", {"cpu": logit_bytes})
        result = evaluate.perplexity(gpt2, ids, window=window, stride=stride)
        check(result, losses, means, length, window, stride)


def check(result, losses, means, length, window, stride):
    assert result.predicted == len(losses)
    assert result.nats == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats))
    assert result.tokens == length
    if stride == window:
        assert result.protocol == "krony-pt"
        assert result.chunk_mean == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-5)
        assert result.predicted == length - math.ceil(length / window)
    else:
        assert result.protocol == "sliding"
        assert result.chunk_mean is None
        assert result.predicted == length - 1


def test_the_two_means_differ_by_the_short_last_window(gpt2):
    ids = torch.randint(96, (70,), generator=torch.Generator().manual_seed(3))
    result = evaluate.perplexity(gpt2, ids, window=64)
    assert result.windows == 2
    assert result.perplexity != pytest.approx(result.chunk_mean, rel=1e-6)


def test_defaults_follow_the_model(gpt2):
    result = evaluate.perplexity(gpt2, torch.arange(90))
    assert (result.window, result.stride, result.dtype) == (64, 64, "float32")


def test_progress_reaches_the_end(gpt2):
    calls = []
    evaluate.perplexity(gpt2, torch.arange(90), window=16, progress=lambda *c: calls.append(c))
    assert calls[-1] == (6, 6)


def test_measurements_that_cannot_be(gpt2):
    ids = torch.arange(90)
    with pytest.raises(KronyError, match="a window of 100 tokens can't be"):
        evaluate.perplexity(gpt2, ids, window=100)
    with pytest.raises(KronyError, match=r"a stride of 33 tokens can't be: .* the window, 32"):
        evaluate.perplexity(gpt2, ids, window=32, stride=33)
    with pytest.raises(KronyError, match="the text has 5 tokens, fewer than one window of 64"):
        evaluate.perplexity(gpt2, ids[:5])
    with torch.no_grad():
        gpt2.transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(KronyError, match="the loss is nan"):
        evaluate.perplexity(gpt2, ids)


@pytest.mark.slow
def test_packaged_model_golden():
    """Origin: the packaged model itself, float32, 2 threads, on the sentence below."""
    from krony import load_model

    model, tokenizer = load_model("demo", torch.float32), load_tokenizer("demo")
    ids = torch.tensor(tokenizer(SENTENCE)["input_ids"])
    result = evaluate.perplexity(model, ids, window=32)
    assert (result.tokens, result.nats) == (GOLDEN[0], pytest.approx(GOLDEN[1], abs=2e-3))


SENTENCE = (
    "Return a new list with the elements of the sequence in sorted order. If the key argument is "
    "given, it must be a function of one argument that is used to extract a comparison key from "
    "each element. The default value is None, and then the elements are compared directly."
)
GOLDEN = (57, 3.4007)


def test_generate_is_seeded_and_bounded():
    from krony import load_model

    model, tokenizer = load_model("demo", torch.float32), load_tokenizer("demo")
    one, two, other = (
        evaluate.generate(model, tokenizer, "Return the", 12, 1.0, seed) for seed in (0, 0, 1)
    )
    assert one == two != other
    assert one.startswith("Return the")
    greedy = evaluate.generate(model, tokenizer, "Return the", 4)
    assert greedy == evaluate.generate(model, tokenizer, "Return the", 4, seed=9)
    with pytest.raises(KronyError, match="the model's context leaves 1 to"):
        evaluate.generate(model, tokenizer, "Return the", 300)
    with pytest.raises(KronyError, match="the prompt is empty"):
        evaluate.generate(model, tokenizer, "", 3)
    with pytest.raises(KronyError, match="a temperature of -1"):
        evaluate.generate(model, tokenizer, "Return", 3, -1)


def test_environment_names_versions():
    assert evaluate.environment()["torch"] == torch.__version__
    assert tiny("gpt2").config.model_type == "gpt2"


PASSAGES = [
    "the end of the list",
    "return True if the value is a number, and False if the value is a string",
    "one two",
    "Return the number of elements in the " + "very " * 300 + "list",  # beyond the context
]


@pytest.mark.parametrize("logit_bytes", [1, 2**28])
def test_last_word_equals_one_passage_at_a_time(monkeypatch, logit_bytes):
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", {"cpu": logit_bytes})
    model, tokenizer = load_model("demo", torch.float32), load_tokenizer("demo")
    nats, right = [], []
    for passage in PASSAGES:
        context, _, word = passage.rpartition(" ")
        ids = [tokenizer(part)["input_ids"] for part in (context, f" {word}")]
        row = torch.tensor(ids[0] + ids[1])[-256:]
        with torch.inference_mode():
            logs = model(row[None]).logits[0].log_softmax(-1)[-len(ids[1]) - 1 : -1]
        nats.append(-sum(float(log[i]) for log, i in zip(logs, ids[1], strict=True)))
        right.append(logs.argmax(-1).tolist() == ids[1])
    found = evaluate.last_word(model, tokenizer, PASSAGES, "some")
    assert found.nats == pytest.approx(sum(nats) / 4, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nats))
    assert found.accuracy == sum(right) / 4
    assert found.passages == 4


def test_last_word_of_its_own_words_is_right():
    model, tokenizer = load_model("demo", torch.float32), load_tokenizer("demo")
    passage = evaluate.generate(model, tokenizer, "Return the number of", 12).strip()
    passage = passage.rpartition(" ")[0]  # the last word may be cut short
    ids = tokenizer(passage)["input_ids"]
    cut = tokenizer(passage.rpartition(" ")[0])["input_ids"]
    assert ids[: len(cut)] == cut
    assert evaluate.last_word(model, tokenizer, [passage], "own").accuracy == 1.0


@pytest.mark.parametrize("passages", [[], ["word"], ["two words", "word"]])
def test_passages_of_one_word_are_refused(gpt2, passages):
    with pytest.raises(KronyError, match="single word"):
        evaluate.last_word(gpt2, load_tokenizer("demo"), passages, "some")
