"""The names of texts: those that `krony.texts` lists are those that are read."""

import pytest

import krony
from helpers import healing_inputs
from krony import KronyError
from krony.compression import calibrate
from krony.measure import evaluate
from krony.text import blocks, data


def test_the_names_are_those_that_are_known():
    assert set(krony.texts()) == {
        *data.TEXTS,
        *blocks.CORPORA,
        "python-docstrings",
        calibrate.SELF,
    }
    assert all(krony.texts().values())
    krony.texts().clear()
    assert krony.texts(), "a list of one's own"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return healing_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("as_path", [True, False])
def test_perplexity_of_a_file_is_that_of_its_tokens(inputs, as_path):
    model, tokenizer = krony.load(inputs / "dense")
    path = inputs / "text.txt"
    found = krony.perplexity(model, path if as_path else str(path), window=16)
    ids = evaluate.tokenize(tokenizer, data.load_text(str(path)))
    assert found.data == "text.txt"
    assert found.nats == krony.perplexity(model, ids, window=16).nats
    assert found.nats == evaluate.perplexity(model, ids, window=16).nats


def test_perplexity_of_a_named_text_starts_windows_as_the_command_does(inputs, run, monkeypatch):
    few = data.Text("python-docs", (inputs / "text.txt").read_text(), "few")
    monkeypatch.setitem(data.TEXTS, "python-docs", lambda *_: few)
    model, tokenizer = krony.load(inputs / "dense")
    for bos in ("auto", "always"):
        found = krony.perplexity(model, "python-docs", tokenizer, window=16, stride=8, bos=bos)
        record = inputs / f"{bos}.json"
        options = ["--data", "python-docs", "--window", 16, "--stride", 8, "--bos", bos]
        code, _, err = run("evaluate", inputs / "dense", *options, "--json", record)
        assert code == 0, err
        assert f'"nats": {found.nats}' in record.read_text()


def test_a_text_needs_a_tokenizer(gpt2):
    with pytest.raises(KronyError, match="give its tokenizer"):
        krony.perplexity(gpt2, "python-docs")
