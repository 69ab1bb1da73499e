"""From texts to packed blocks of token ids, through `datasets`: cached, streamed, sharded there.

A block is a row {"input_ids": [window ids]}. Documents are tokenized one by one, each followed by
the end-of-text token, joined and cut; the tail of each batch of a thousand documents is dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from krony.errors import KronyError, first_line
from krony.text import data, docstrings, files, sources, tokens

DOCUMENTS = 1000  # tokenized and joined at a time
PIECE = 1_000_000  # characters; longer documents are tokenized in pieces, cut at line ends
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


def load_blocks(
    names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    *,
    streaming: bool = False,
    seed: int = 0,
    bos: str = "auto",
    vocabulary: int | None = None,
) -> Blocks:
    """Packed blocks of the given texts, in an order that depends on the seed only.

    Args:
        names: each "python-docstrings", "openwebtext", "wikitext103", "wikitext2" (training
            sets), or what `sources.find` takes: files, folders and data sets of the Hub. In a .txt,
            a line that is the end-of-text token ends a document.
        window: ids in a block.
        streaming: read while training, nothing stored; else everything is prepared first and
            cached by `datasets`, so that the same call is instantaneous the next time.
        bos: whether every block starts with the token that begins a text, see `tokens.bos_of`.
        vocabulary: rows of the model's embedding; a token beyond them is refused.
    Raises:
        KronyError: nothing found, no text in it, less than a block, or a tokenizer without an
            end-of-text token.
    """
    if not names:
        raise KronyError("no training text was given; name at least one")
    if tokenizer.eos_token_id is None:
        raise KronyError("the tokenizer has no end-of-text token to put between documents")
    mark = str(tokenizer.eos_token)
    first = tokens.bos_of(tokenizer, bos)
    parts = [
        pack(_documents(name, mark, streaming), tokenizer, window, first, vocabulary, name)
        for name in names
    ]
    if streaming:
        joined: Blocks = datasets.concatenate_datasets([_as_stream(p) for p in parts])
        return joined.shuffle(seed=seed, buffer_size=SHUFFLE)
    blocks = datasets.concatenate_datasets(parts)
    if not len(blocks):
        raise KronyError(f"{', '.join(names)} is shorter than one block of {window} tokens")
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


def describe(name: str) -> dict[str, str]:
    """What a model's provenance says about a training text: name, origin, SHA-256 where known."""
    if name in CORPORA:
        corpus = CORPORA[name]
        origin = " ".join(filter(None, (corpus.repository, corpus.configuration, corpus.split)))
        return {"name": name, "origin": origin, "sha256": ""}
    if name in data.TEXTS:
        return data.load_text(name, "train").record()
    if name == "python-docstrings" or not sources.is_local(name):
        return {"name": name, "origin": name, "sha256": ""}
    source = sources.find(name)
    return {"name": name, "origin": source.origin, "sha256": sources.digest(source) or ""}


def pack(
    documents: Blocks,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    bos: int | None = None,
    vocabulary: int | None = None,
    name: str = "the text",
) -> Blocks:
    """Documents, rows with a "text" only, to blocks of `window` token ids.

    Args:
        bos: the id that every block starts with; None: no such id.
        vocabulary: rows of the embedding; `name` is what the text is called if it has more.
    """
    end, size = tokenizer.eos_token_id, window - (bos is not None)

    def join(rows: dict[str, list[Any]]) -> dict[str, list[np.ndarray]]:
        pieces: list[str] = []
        last: list[bool] = []
        for text in rows["text"]:
            cut = list(_pieces(text or ""))
            pieces += cut
            last += [i == len(cut) - 1 for i in range(len(cut))]
        joined: list[int] = []
        for row, ends in zip(tokens.encode(tokenizer, pieces), last, strict=True):
            joined += row
            if ends:
                joined.append(end)
        tokens.check_ids(joined, vocabulary, tokenizer, name)
        count = len(joined) // size
        array = np.array(joined[: count * size], dtype=np.int32).reshape(count, size)
        if bos is not None:
            array = np.insert(array, 0, bos, axis=1)
        return {"input_ids": list(array)}

    options = {} if isinstance(documents, datasets.IterableDataset) else {"desc": "Tokenizing"}
    return documents.map(
        join, batched=True, batch_size=DOCUMENTS, remove_columns=["text"], **options
    )


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
    data.check_name(name, (*CORPORA, *data.TEXTS, "python-docstrings"))
    if name == "python-docstrings":
        # Reading every installed module takes a minute: kept by what is installed.
        return _made(datasets.Dataset, name, _docstrings, {"installed": docstrings.installed()})
    if name in data.TEXTS and name not in CORPORA:
        return datasets.Dataset.from_dict({"text": [data.load_text(name).text]})
    if name in CORPORA:
        corpus = CORPORA[name]
        source = sources.Source(corpus.repository, (), None, corpus.configuration, corpus.split)
    else:
        source = sources.find(name)
    if not source.paths:
        return sources.hub_rows(source, streaming)
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in source.paths]
    kwargs = {
        "paths": [str(path) for path in source.paths],
        "column": source.column,
        "mark": mark,
        "stamp": str(stamps),  # a file that changed is read anew, not taken from the cache
    }
    return _made(kind, name, _files, kwargs)


def _made(kind: Any, name: str, rows: Callable[..., Any], kwargs: dict[str, Any]) -> Blocks:
    """A data set of what a generator yields. Raises `KronyError`."""
    try:
        made: Blocks = kind.from_generator(rows, gen_kwargs=kwargs)
        return made
    except datasets.exceptions.DatasetGenerationError as error:
        # The library wraps what ended the generator, and what came of that, an interrupt too.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KronyError | KeyboardInterrupt):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        reason = first_line(error.__cause__ or error)
        raise KronyError(f"can't read the text {name}: {reason}") from error


def _files(paths: list[str], column: str | None, mark: str, stamp: str) -> Iterator[dict[str, str]]:
    for path in paths:
        for text in files.documents(path, column, mark):
            yield {"text": text}


def _docstrings(installed: str) -> Iterator[dict[str, str]]:
    for text in docstrings.python_docstrings("train"):
        yield {"text": text}


def _as_stream(blocks: Blocks) -> datasets.IterableDataset:
    if isinstance(blocks, datasets.IterableDataset):
        return blocks
    return blocks.to_iterable_dataset()
