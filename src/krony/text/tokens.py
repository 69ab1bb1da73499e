"""From text to token ids: the same for calibration, healing and evaluation.

A text is text: what looks like a control token in it (</s>, <|im_start|>) is read as the characters
that it is. Only lines that are the end-of-text token end a document. Where the tokenizer puts a
token in front of every text (BOS of Llama and Gemma), every window starts with it, as the model was
trained: `bos`, "auto", asks the tokenizer, "always" and "never" overrule it.
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from krony.errors import KronyError

Bos = Literal["auto", "always", "never"]
BOS: tuple[Bos, ...] = get_args(Bos)


def bos_of(tokenizer: PreTrainedTokenizerBase, bos: str = "auto") -> int | None:
    """The token that every window starts with; None: there is none.

    Raises:
        KronyError: "always", of a tokenizer that has no such token; another word.
    """
    if bos not in BOS:
        raise KronyError(f"--bos {bos!r} can't be; give {', '.join(BOS)}")
    if bos == "never" or (first := tokenizer.bos_token_id) is None:
        if bos == "always":
            raise KronyError("the tokenizer has no token that begins a text; give --bos auto")
        return None
    if bos == "always":
        return int(first)
    found = tokenizer("a", verbose=False)["input_ids"]
    return int(first) if found[:1] == [first] else None


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, nothing added, control tokens in it taken for text."""
    if not texts:
        return []
    found: Any = tokenizer(
        texts, add_special_tokens=False, verbose=False, split_special_tokens=True
    )["input_ids"]
    return list(found)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a whole text; a line that is the end-of-text token is that token."""
    end = tokenizer.eos_token
    if not end or f"\n{end}\n" not in f"\n{text}\n":
        return encode(tokenizer, [text])[0]
    rows = encode(tokenizer, [part.strip("\n") for part in f"\n{text}\n".split(f"\n{end}\n")])
    ids: list[int] = []
    for number, row in enumerate(rows):
        ids += row
        if number < len(rows) - 1:
            ids.append(int(tokenizer.eos_token_id))
    return ids


def check_ids(
    ids: Iterable[int], rows: int | None, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> None:
    """Raise `KronyError` for a token that the embedding, of so many rows, does not have."""
    most = max(ids, default=-1)
    if rows is None or most < rows:
        return
    word = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(most)!r})"
    raise KronyError(
        f"{name} has the token {most}{word}, and the model's embedding has {rows} rows: tokenizer "
        "and model do not belong together; resize the embedding, or take the model's own tokenizer"
    )
