"""Texts to evaluate on, by name or by file."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from krony.errors import KronyError
from krony.text import files, sources
from krony.text.docstrings import held_out_topics

# Rows are joined by a blank line, as in the paper's evaluation and in transformers' guide.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text, where it came from, and a SHA-256 by which it is known again."""

    name: str
    text: str
    origin: str
    sha256: str = ""

    def record(self) -> dict[str, str]:
        """What a model's provenance says about it."""
        return {"name": self.name, "origin": self.origin, "sha256": self.sha256}


def data_folder() -> Path | None:
    """Where local copies of the public sets are: the folder that `KRONY_DATA` names; None: nowhere.

    Raises:
        KronyError: `KRONY_DATA` names no folder.
    """
    if not (name := os.environ.get("KRONY_DATA")):
        return None
    if not Path(name).is_dir():
        raise KronyError(f"KRONY_DATA names {name}, which is no folder; correct it or unset it")
    return Path(name)


def load_text(name: str, split: str = "test") -> Text:
    """A named text, a file, a folder of files, or a data set of the Hub.

    Args:
        name: "wikitext2", "wikitext103" (the non-raw versions with <unk>), "wikitext2-raw",
            "lambada" (test set as OpenAI published it), "python-docs" (the language reference
            inside every Python), or what `sources.find` takes. Rows are joined by a blank line.
        split: "test" to measure on, "train" to calibrate on, where there are several.
    Raises:
        KronyError: nothing of that name, what can't be read, an empty text, a name that is also a
            path.
    """
    check_name(name, TEXTS)
    if name in TEXTS:
        found = TEXTS[name](name, split)
        found = replace(found, sha256=hashlib.sha256(found.text.encode()).hexdigest())
    elif not sources.is_local(name) and "/" not in name:
        raise KronyError(
            f"no text {name!r}: give {', '.join(TEXTS)}, the path of {files.KINDS}, a folder of "
            "these, or a data set of the Hub, owner/name"
        )
    else:
        source = sources.find(name, split)
        rows = sources.documents(source) if source.paths else _hub_texts(source)
        short = Path(name).name if source.paths else name
        text = SEPARATOR.join(rows)
        digest = sources.digest(source) or hashlib.sha256(text.encode()).hexdigest()
        found = Text(short, text, source.origin, digest)
    if not found.text.strip():
        raise KronyError(f"the text {name} is empty; there is nothing to evaluate on")
    return found


def check_name(name: str, known: Iterable[str]) -> None:
    """Raise `KronyError` for a name that krony knows and that is a path here too."""
    if name in known and Path(name).exists():
        raise KronyError(
            f"{name} is a text that krony knows and also a path here; write ./{name} for the path, "
            "or rename it"
        )


def _hub_texts(source: sources.Source) -> list[str]:
    return [text for text in sources.hub_rows(source)[files.COLUMN] if text]


def _wikitext(folder: str, configuration: str) -> Callable[[str, str], Text]:
    def load(name: str, split: str) -> Text:
        local = data_folder()
        path = local / folder / f"wiki.{split}.tokens" if local else None
        if path and path.is_file():
            # The Hub's rows: one a line, its line feed kept, blank lines empty. Not in text mode:
            # that would turn carriage returns into line feeds and change the tokens.
            lines = path.read_bytes().decode("utf-8").split("\n")
            rows = [line + "\n" if line.strip() else "" for line in lines[:-1]]
            return Text(name, SEPARATOR.join(rows), f"{folder}/{path.name}")
        rows, origin = _hub(name, "Salesforce/wikitext", configuration, split)
        return Text(name, SEPARATOR.join(rows), origin)

    return load


def _raw_wikitext(name: str, split: str) -> Text:
    """WikiText-2 as it was before rare words became <unk>, as most published figures have it."""
    local = data_folder()
    path = local / "wikitext-2" / f"wiki.{split}.raw.hfjoin.txt" if local else None
    if path and path.is_file():  # joined already
        return Text(name, path.read_bytes().decode("utf-8"), f"wikitext-2/{path.name}")
    rows, origin = _hub(name, "Salesforce/wikitext", "wikitext-2-raw-v1", split)
    return Text(name, SEPARATOR.join(rows), origin)


def load_passages(name: str) -> tuple[list[str], str]:
    """The passages of LAMBADA ("lambada"), or the texts of a .jsonl, and where they came from.

    Raises:
        KronyError: what `load_text` raises, and a text that is not one of passages.
    """
    if name == "lambada":
        local = data_folder()
        path = local / "lambada" / "lambada_test.jsonl" if local else None
        if path and path.is_file():
            return list(files.documents(path)), "lambada/lambada_test.jsonl"
        return _hub(name, "EleutherAI/lambada_openai", "default", "test")
    if not sources.is_local(name) or files.kind_of(name) in (None, "text"):
        raise KronyError(f"{name} has no passages; give lambada, or a .jsonl with one in each line")
    return list(sources.documents(sources.find(name))), name


def _lambada(name: str, split: str) -> Text:
    if split == "train":
        raise KronyError(
            "lambada is a test set and has no training split, so that what is calibrated on it "
            "can't be measured on it; give wikitext2, or a text of your own"
        )
    passages, origin = load_passages(name)
    return Text(name, SEPARATOR.join(passages), origin)


def _hub(name: str, repository: str, configuration: str, split: str) -> tuple[list[str], str]:
    import datasets

    try:
        rows = datasets.load_dataset(repository, configuration, split=split)["text"]
    except Exception as error:  # datasets raises many kinds, also its network library's own
        if split == "train":
            raise KronyError(
                f"{name} is what evaluate measures on, so that its training split is what to "
                f"calibrate on, and that can't be had ({repository}, {configuration}); give "
                "another text, or put wiki.train.tokens into the folder that KRONY_DATA names"
            ) from error
        raise KronyError(
            f"can't load {name} ({repository}, {configuration}) from the Hugging Face Hub; check "
            "the network, or put the files in a folder that KRONY_DATA names"
        ) from error
    return list(rows), f"{repository} {configuration} {split}"


def _python_docs(name: str, split: str) -> Text:
    import platform

    return Text(name, held_out_topics(), f"pydoc_data.topics of Python {platform.python_version()}")


TEXTS: dict[str, Callable[[str, str], Text]] = {
    "wikitext2": _wikitext("wikitext-2", "wikitext-2-v1"),
    "wikitext2-raw": _raw_wikitext,
    "wikitext103": _wikitext("wikitext-103", "wikitext-103-v1"),
    "lambada": _lambada,
    "python-docs": _python_docs,
}
