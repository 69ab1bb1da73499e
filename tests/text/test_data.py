"""Texts by name and by file; token counts of the public sets."""

import json

import pytest
from transformers import GPT2TokenizerFast

from helpers import shared_data
from krony import KronyError
from krony.measure import evaluate
from krony.text import data


def need(*parts):
    path = shared_data().joinpath(*parts)
    if not path.exists():
        pytest.skip(
            f"{path.name} is not there; set KRONY_DATA to a folder that has {'/'.join(parts)}"
        )
    return path


@pytest.fixture
def gpt2_tokenizer():
    return GPT2TokenizerFast.from_pretrained(need("gpt2-tokenizer"))


@pytest.fixture
def public_sets(monkeypatch):
    monkeypatch.setenv("KRONY_DATA", str(shared_data()))


def test_tokenizer_check(gpt2_tokenizer):
    ids = gpt2_tokenizer("Hello, my dog is cute")["input_ids"]
    assert ids == [15496, 11, 616, 3290, 318, 13779]


def test_lambada_tokens(gpt2_tokenizer, public_sets):
    need("lambada", "lambada_test.jsonl")
    text = data.load_text("lambada")
    assert len(evaluate.tokenize(gpt2_tokenizer, text)) == 440_534


def test_raw_wikitext_tokens(gpt2_tokenizer, public_sets):
    need("wikitext-2", "wiki.test.raw.hfjoin.txt")
    text = data.load_text("wikitext2-raw")
    # The figure in transformers' guide to perplexity.
    assert len(evaluate.tokenize(gpt2_tokenizer, text)) == 287_644
    assert "<unk>" not in text.text


@pytest.mark.parametrize(
    ("name", "folder", "words"),
    [("wikitext2", "wikitext-2", 245_569), ("wikitext103", "wikitext-103", 245_569)],
)
def test_wikitext_rows_are_the_hub_rows(name, folder, words, public_sets):
    path = need(folder, "wiki.test.tokens")
    text = data.load_text(name)
    rows = text.text.split("\n\n")
    raw = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(raw) == 4_358
    assert len(text.text.split()) + len(raw) == words
    assert rows[1].strip() == raw[1].strip()
    assert "<unk>" in text.text


def test_rows_are_joined_as_in_the_raw_text_of_the_guide(public_sets):
    """Same article structure in both: the joined text differs from the raw one only in words."""
    need("wikitext-2", "wiki.test.tokens")
    raw = need("wikitext-2", "wiki.test.raw.hfjoin.txt").read_bytes().decode()
    mine = data.load_text("wikitext2").text
    assert mine[:12] == raw[:12]
    # The raw rows of that file end in a carriage return where the others end in a line feed.
    assert mine.count("\n") == raw.count("\n") + raw.count("\r")


def test_python_docs_need_no_network():
    text = data.load_text("python-docs")
    assert len(text.text) > 300_000
    assert text.origin.startswith("pydoc_data.topics of Python 3.")


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("One text.")
    assert data.load_text(str(tmp_path / "a.txt")).text == "One text."
    lines = [json.dumps({"text": word}) for word in ("one", "two")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    assert data.load_text(str(tmp_path / "a.jsonl")).text == "one\n\ntwo"


def test_texts_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(KronyError, match="no text 'wikitext3': give wikitext2, wikitext2-raw"):
        data.load_text("wikitext3")
    with pytest.raises(KronyError, match="can't load the text nobody/nothing en test"):
        data.load_text("nobody/nothing:en")
    with pytest.raises(KronyError, match=r"can't read the text .*gone\.txt"):
        data.load_text(str(tmp_path / "gone.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(KronyError, match="is empty"):
        data.load_text(str(tmp_path / "empty.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(KronyError, match="is not UTF-8"):
        data.load_text(str(tmp_path / "bytes.txt"))
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(KronyError, match=r"line 2 of .*a\.jsonl"):
        data.load_text(str(tmp_path / "a.jsonl"))
    monkeypatch.setenv("KRONY_DATA", str(tmp_path))
    with pytest.raises(KronyError, match="from the Hugging Face Hub; check the network"):
        data.load_text("lambada")


def test_passages_are_the_lines_of_the_text(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one two"}\n\n{"text": "three"}\n')
    assert data.load_passages(str(path)) == (["one two", "three"], str(path))
    assert data.load_text(str(path)).text == "one two\n\nthree"


def test_a_name_that_is_also_a_path_is_no_guess(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "a.txt").write_text("mine")
    with pytest.raises(KronyError, match=r"also a path here; write \./wikitext2"):
        data.load_text("wikitext2")
    assert data.load_text("./wikitext2").text == "mine"


def test_what_is_measured_on_is_not_what_is_calibrated_on(public_sets, monkeypatch, tmp_path):
    need("wikitext-2", "wiki.train.tokens")
    test, train = (data.load_text("wikitext2", split) for split in ("test", "train"))
    assert test.text[:200] not in train.text
    assert test.sha256 != train.sha256
    monkeypatch.setenv("KRONY_DATA", str(tmp_path))
    with pytest.raises(KronyError, match="its training split is what to calibrate on"):
        data.load_text("wikitext2", "train")


@pytest.mark.parametrize("name", ["wikitext2", "some.txt", "absent.jsonl"])
def test_texts_without_passages_are_refused(name):
    with pytest.raises(KronyError, match=name):
        data.load_passages(name)
