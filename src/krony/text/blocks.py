"""From texts to packed blocks of token ids, through `datasets`: cached, streamed, sharded there.

A block is a row {"input_ids": [window ids]}. Documents are tokenised one by one, each followed by
the end-of-text token, joined and cut; the tail of each batch of a thousand documents is dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from krony.errors import KronyError
from krony.text import data, docstrings

DOCUMENTS = 1000  # tokenised and joined at a time
PIECE = 1_000_000  # characters; longer documents are tokenised in pieces, cut at line ends
SHUFFLE = 10_000  # blocks in the shuffling buffer of a stream
HELD_OUT_SHARE, HELD_OUT_MOST = 0.01, 256

Blocks: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class Corpus:
    """A named training text on the Hub: repository, configuration, split."""

    repository: str
    configuration: str | None = None
    split: str = "train"


# The non-raw WikiText, as in the evaluation.
CORPORA = {
    "openwebtext": Corpus("Skylion007/openwebtext"),
    "wikitext103": Corpus("Salesforce/wikitext", "wikitext-103-v1"),
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-v1"),
}
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".xz", ".gz", ".zst", ".bz2")


def load_blocks(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    *,
    streaming: bool = False,
    seed: int = 0,
) -> Blocks:
    """Packed blocks of the given texts, in an order that depends on the seed only.

    Args:
        sources: each "python-docstrings", "openwebtext", "wikitext103", "wikitext2" (training
            sets), a .txt, .jsonl or .parquet file (also compressed) with a "text" column, or the
            name of a Hub data set with one. In a .txt, a line that is the end-of-text token ends a
            document.
        window: ids in a block.
        streaming: read while training, nothing stored; else everything is prepared first and
            cached by `datasets`, so that the same call is instantaneous the next time.
    Raises:
        KronyError: nothing found, no text in it, less than a block, or a tokenizer without an
            end-of-text token.
    """
    if not sources:
        raise KronyError("no training text was given; name at least one")
    if tokenizer.eos_token_id is None:
        raise KronyError("the tokenizer has no end-of-text token to put between documents")
    mark = str(tokenizer.eos_token)
    parts = [pack(_documents(name, mark, streaming), tokenizer, window) for name in sources]
    if streaming:
        joined: Blocks = datasets.concatenate_datasets([_as_stream(p) for p in parts])
        return joined.shuffle(seed=seed, buffer_size=SHUFFLE)
    blocks = datasets.concatenate_datasets(parts)
    if not len(blocks):
        raise KronyError(f"{', '.join(sources)} is shorter than one block of {window} tokens")
    return blocks.shuffle(seed=seed)


def from_ids(windows: Tensor) -> datasets.Dataset:
    """Blocks from token ids (blocks, window), the model's own samples for example."""
    return datasets.Dataset.from_dict({"input_ids": windows.tolist()})


def hold_out(blocks: Blocks) -> tuple[Blocks, Blocks]:
    """(training, held-out): one block in a hundred, at least one and at most 256.

    Of a stream the first 256 are held out. Raises `KronyError` if there is only one block.
    """
    if isinstance(blocks, datasets.IterableDataset):
        return blocks.skip(HELD_OUT_MOST), blocks.take(HELD_OUT_MOST)
    if len(blocks) < 2:
        raise KronyError("one block is too little to hold any out; give more text, or --eval-data")
    count = min(HELD_OUT_MOST, max(1, int(len(blocks) * HELD_OUT_SHARE)))
    return blocks.select(range(count, len(blocks))), blocks.select(range(count))


def pack(documents: Blocks, tokenizer: PreTrainedTokenizerBase, window: int) -> Blocks:
    """Documents, rows with a "text" only, to blocks of `window` token ids."""
    end = tokenizer.eos_token_id

    def join(rows: dict[str, list[Any]]) -> dict[str, list[np.ndarray]]:
        pieces: list[str] = []
        last: list[bool] = []
        for text in rows["text"]:
            cut = list(_pieces(text or ""))
            pieces += cut
            last += [i == len(cut) - 1 for i in range(len(cut))]
        ids = (
            tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
            if pieces
            else []
        )
        joined: list[int] = []
        for row, ends in zip(ids, last, strict=True):
            joined += row
            if ends:
                joined.append(end)
        count = len(joined) // window
        array = np.array(joined[: count * window], dtype=np.int32).reshape(count, window)
        return {"input_ids": list(array)}

    options = {} if isinstance(documents, datasets.IterableDataset) else {"desc": "Tokenising"}
    return documents.map(
        join, batched=True, batch_size=DOCUMENTS, remove_columns=["text"], **options
    )


def _splitter(mark: str) -> Callable[[dict[str, list[Any]]], dict[str, list[str]]]:
    """Splits whole files into documents at lines that are the end-of-text token."""

    def split(rows: dict[str, list[Any]]) -> dict[str, list[str]]:
        texts = [t for text in rows["text"] for t in f"\n{text}\n".split(f"\n{mark}\n")]
        return {"text": [t.strip("\n") for t in texts if t.strip()]}

    return split


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about a million characters, cut after line feeds if it has any."""
    start = 0
    while start < len(text):
        stop = min(start + PIECE, len(text))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _documents(name: str, mark: str, streaming: bool) -> Blocks:
    """Rows with a "text" only, a document each; `mark` is a line that separates them in a file."""
    if name == "python-docstrings":
        # Reading every installed module takes a minute: kept by what is installed.
        return datasets.Dataset.from_generator(
            _docstrings, gen_kwargs={"installed": docstrings.installed()}
        )
    if name in data.TEXTS and name not in CORPORA:
        return datasets.Dataset.from_dict({"text": [data.load_text(name).text]})
    suffixes = [s for s in Path(name).suffixes if s not in COMPRESSED]
    kind = READERS.get(suffixes[-1]) if suffixes else None
    if kind is not None or Path(name).exists():
        return _file(name, kind, mark, streaming)
    corpus = CORPORA.get(name, Corpus(name))
    try:
        rows = datasets.load_dataset(
            corpus.repository, corpus.configuration, split=corpus.split, streaming=streaming
        )
    except Exception as error:  # datasets raises many kinds, also its network library's own
        raise KronyError(
            f"can't load the training text {name} ({corpus.repository}) from the Hugging Face Hub: "
            f"it is no file, and none of {', '.join((*CORPORA, 'python-docstrings', *data.TEXTS))};"
            " check the name and the network"
        ) from error
    return _with_text(rows, name)


def _docstrings(installed: str) -> Iterator[dict[str, str]]:
    for text in docstrings.python_docstrings("train"):
        yield {"text": text}


def _file(name: str, kind: str | None, mark: str, streaming: bool) -> Blocks:
    if kind is None:
        raise KronyError(f"{name} is no text that can be read; give a .txt, .jsonl or .parquet")
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    try:
        rows = datasets.load_dataset(
            kind, data_files=name, split="train", streaming=streaming, **options
        )
        rows = _with_text(rows, name)
    except FileNotFoundError as error:
        raise KronyError(f"can't read the text {name}: no such file") from error
    except (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError, OSError) as error:
        raise KronyError(f"can't read the text {name}: {error.__cause__ or error}") from error
    return rows if kind != "text" else rows.map(_splitter(mark), batched=True)


def _with_text(rows: Blocks, name: str) -> Blocks:
    columns = rows.column_names or list(next(iter(rows), {}))
    if "text" not in columns:
        raise KronyError(f'{name} has no column "text", only {", ".join(columns) or "nothing"}')
    return rows.select_columns("text")


def _as_stream(blocks: Blocks) -> datasets.IterableDataset:
    if isinstance(blocks, datasets.IterableDataset):
        return blocks
    return blocks.to_iterable_dataset()
