"""Texts to blocks: nothing lost, documents apart, the same order for the same seed."""

import gzip
import json

import datasets
import pytest

from krony import load_tokenizer
from krony.errors import KronyError
from krony.text import files
from krony.text.blocks import from_ids, hold_out, load_blocks

TEXTS = [f"Document {i}. It says {i * i}.\nIts second line.\n\nAnd more." for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(folder, kind, mark):
    path = folder / f"text.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in TEXTS))
    elif kind == "parquet":
        datasets.Dataset.from_dict({"text": TEXTS, "n": range(len(TEXTS))}).to_parquet(path)
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress(f"\n{mark}\n".join(TEXTS).encode()))
    else:
        path.write_text(f"\n{mark}\n".join(TEXTS))
    return str(path)


def stream(tokenizer):
    """The oracle: every document, then the end-of-text token."""
    ids = []
    for text in TEXTS:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return ids


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_reader_gives_the_same_blocks(kind, streaming, tokenizer, tmp_path):
    name = write(tmp_path, kind, tokenizer.eos_token)
    blocks = load_blocks([name], tokenizer, 32, streaming=streaming)
    rows = [tuple(row["input_ids"]) for row in blocks]
    ids = stream(tokenizer)
    wanted = [tuple(ids[i : i + 32]) for i in range(0, len(ids) - 31, 32)]
    assert sorted(rows) == sorted(wanted)
    assert rows != wanted  # shuffled


@pytest.mark.parametrize("after", [0, 2])
def test_an_interrupt_is_an_interrupt(after, tokenizer, tmp_path, monkeypatch):
    """The library makes an error of its own of it, with fifty lines of traceback."""
    name = write(tmp_path, "txt", tokenizer.eos_token)

    def documents(*_, **__):
        yield from TEXTS[:after]
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "documents", documents)
    with pytest.raises(KeyboardInterrupt):
        load_blocks([name], tokenizer, 32)


def test_the_order_follows_the_seed(tokenizer, tmp_path):
    name = write(tmp_path, "txt", tokenizer.eos_token)
    first, again, other = (
        load_blocks([name], tokenizer, 32, seed=seed)["input_ids"] for seed in (0, 0, 1)
    )
    assert list(first) == list(again) != list(other)


def test_held_out_blocks_are_apart(tokenizer, tmp_path):
    name = write(tmp_path, "txt", tokenizer.eos_token)
    blocks = load_blocks([name], tokenizer, 8)
    training, held_out = hold_out(blocks)
    assert len(held_out) == max(1, len(blocks) // 100)
    assert len(training) + len(held_out) == len(blocks)
    streamed = load_blocks([name], tokenizer, 8, streaming=True)
    training, held_out = hold_out(streamed)
    assert len(list(held_out)) + len(list(training)) == len(blocks)


def test_two_texts_are_joined_and_named_texts_known(tokenizer, tmp_path):
    name = write(tmp_path, "jsonl", tokenizer.eos_token)
    one, docs = load_blocks([name], tokenizer, 32), load_blocks(["python-docs"], tokenizer, 32)
    assert len(load_blocks([name, "python-docs"], tokenizer, 32)) == len(one) + len(docs)


def test_long_documents_are_tokenised_in_pieces(tokenizer, tmp_path, monkeypatch):
    from krony.text import blocks

    text = "\n".join(f"line {i} of a long document" for i in range(300))
    (tmp_path / "long.txt").write_text(text)
    whole = load_blocks([str(tmp_path / "long.txt")], tokenizer, 16)
    monkeypatch.setattr(blocks, "PIECE", 100)
    (tmp_path / "other.txt").write_text(text)
    pieces = load_blocks([str(tmp_path / "other.txt")], tokenizer, 16)
    assert list(whole["input_ids"]) == list(pieces["input_ids"])
    assert not any(tokenizer.eos_token_id in row for row in whole["input_ids"])


def test_own_samples():
    import torch

    blocks = from_ids(torch.arange(12).reshape(3, 4))
    assert list(blocks["input_ids"]) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("nobody/nothing", None, "can't load the text nobody/nothing"),
        ("short.txt", "a word", "shorter than one block of 32 tokens"),
        ("text.bin", "a word", "no text that can be read; give a .txt, .jsonl"),
        ("other.jsonl", '{"a": "a word", "b": 1}\n', 'has no column "text", only a, b'),
        ("broken.jsonl", '{"text": "a', r"line 1 of .*broken\.jsonl is no JSON object"),
    ],
)
def test_bad_input_is_named(name, content, message, tokenizer, tmp_path):
    path = name if "/" in name else str(tmp_path / name)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(KronyError, match=message):
        load_blocks([path], tokenizer, 32)
