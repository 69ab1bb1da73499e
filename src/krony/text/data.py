"""Texts to evaluate on, by name or by file."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from krony.errors import KronyError
from krony.text.docstrings import held_out_topics

# Rows are joined by a blank line, as in the paper's evaluation and in transformers' guide.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    name: str
    text: str
    origin: str


def data_folder() -> Path | None:
    """Where local copies of the public sets are: `KRONY_DATA`, else `../shared/data`, if there."""
    folder = Path(os.environ.get("KRONY_DATA", "../shared/data"))
    return folder if folder.is_dir() else None


def load_text(name: str) -> Text:
    """A named text, or a .txt or .jsonl file.

    Args:
        name: "wikitext2", "wikitext103" (test sets, the non-raw versions with <unk>), "lambada"
            (test set as OpenAI published it), "python-docs" (the language reference inside every
            Python), or a path. A .jsonl file has a "text" in every line.
    Raises:
        KronyError: an unknown name, a file that can't be read, an empty text.
    """
    if name in TEXTS:
        found = TEXTS[name](name)
    elif Path(name).suffix in (".txt", ".jsonl") or Path(name).is_file():
        found = _file(name)
    else:
        raise KronyError(
            f"no text {name!r}: give {', '.join(TEXTS)}, or the path of a .txt or .jsonl file"
        )
    if not found.text.strip():
        raise KronyError(f"the text {name} is empty; there is nothing to evaluate on")
    return found


def _file(name: str) -> Text:
    path = Path(name)
    try:
        if path.suffix == ".jsonl":
            return Text(path.name, SEPARATOR.join(_jsonl(path)), str(path))
        return Text(path.name, _read(path), str(path))
    except OSError as error:
        raise KronyError(f"can't read the text {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KronyError(f"{name} is not UTF-8 text ({error.reason}); convert it first") from error


def _read(path: Path) -> str:
    # Not in text mode: that would turn carriage returns into line feeds and change the tokens.
    return path.read_bytes().decode("utf-8")


def _jsonl(path: Path) -> list[str]:
    texts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                texts.append(json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise KronyError(
                    f'line {number} of {path} is no JSON object with a "text"; every line must be'
                ) from error
    return texts


def _wikitext(folder: str, configuration: str) -> Callable[[str], Text]:
    def load(name: str) -> Text:
        local = data_folder()
        path = local / folder / "wiki.test.tokens" if local else None
        if path and path.is_file():
            # The Hub's rows: one a line, its line feed kept, blank lines empty.
            lines = _read(path).split("\n")
            rows = [line + "\n" if line.strip() else "" for line in lines[:-1]]
            return Text(name, SEPARATOR.join(rows), f"{folder}/wiki.test.tokens")
        rows, origin = _hub(name, "Salesforce/wikitext", configuration)
        return Text(name, SEPARATOR.join(rows), origin)

    return load


def load_passages(name: str) -> tuple[list[str], str]:
    """The passages of LAMBADA ("lambada"), or the texts of a .jsonl, and where they came from.

    Raises:
        KronyError: what `load_text` raises, and a text that is not one of passages.
    """
    if name == "lambada":
        local = data_folder()
        path = local / "lambada" / "lambada_test.jsonl" if local else None
        if path and path.is_file():
            return _jsonl(path), "lambada/lambada_test.jsonl"
        return _hub(name, "EleutherAI/lambada_openai", "default")
    if Path(name).suffix != ".jsonl":
        raise KronyError(f"{name} has no passages; give lambada, or a .jsonl with one in each line")
    load_text(name)  # for its errors
    return _jsonl(Path(name)), name


def _lambada(name: str) -> Text:
    passages, origin = load_passages(name)
    return Text(name, SEPARATOR.join(passages), origin)


def _hub(name: str, repository: str, configuration: str) -> tuple[list[str], str]:
    import datasets

    try:
        rows = datasets.load_dataset(repository, configuration, split="test")["text"]
    except Exception as error:  # datasets raises many kinds, also its network library's own
        raise KronyError(
            f"can't load {name} ({repository}, {configuration}) from the Hugging Face Hub; check "
            "the network, or put the files in a folder that KRONY_DATA names"
        ) from error
    return list(rows), f"{repository} {configuration} test"


def _python_docs(name: str) -> Text:
    import platform

    return Text(name, held_out_topics(), f"pydoc_data.topics of Python {platform.python_version()}")


TEXTS: dict[str, Callable[[str], Text]] = {
    "wikitext2": _wikitext("wikitext-2", "wikitext-2-v1"),
    "wikitext103": _wikitext("wikitext-103", "wikitext-103-v1"),
    "lambada": _lambada,
    "python-docs": _python_docs,
}
