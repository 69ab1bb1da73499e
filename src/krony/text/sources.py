"""From a name to documents: files, folders of files, and data sets of the Hub.

A name is a path or the name of a data set, and after colons what is to be read of it:
    file.jsonl:column        a column of a file of rows
    folder:configuration     of a folder whose README.md lists configurations, as the Hub's do
    owner/set:configuration:split
"""

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krony.errors import KronyError
from krony.text import files

# In the name of a file or of a folder above it, as `datasets` takes them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Source:
    """What a name stands for.

    Attributes:
        paths: the files, in order; none: a data set of the Hub.
        column: of files of rows; None: to be found.
        configuration, split: of a data set.
    """

    name: str
    paths: tuple[Path, ...] = ()
    column: str | None = None
    configuration: str | None = None
    split: str = "train"

    @property
    def origin(self) -> str:
        """Where it comes from, for the record."""
        if self.paths:
            return self.name
        return " ".join(filter(None, (self.name, self.configuration, self.split)))


def is_local(name: str) -> bool:
    """Whether a name means a file or a folder: there is one, or it ends like one."""
    head = _head(name)
    return Path(head).exists() or files.kind_of(head) is not None


def _head(name: str) -> str:
    """The path or the name of a data set, without what follows its colons."""
    if Path(name).exists():
        return name
    head = name
    while ":" in head:
        head = head.rpartition(":")[0]
        if Path(head).exists():
            return head
    return name.partition(":")[0]


def find(name: str, split: str = "train") -> Source:
    """What a name stands for.

    Args:
        split: of data sets that have several, unless the name says which.
    Raises:
        KronyError: a path that is not there or is no text; a folder without texts, without that
            configuration or that split. It names what there is.
    """
    head = _head(name)
    parts = [part or None for part in name.removeprefix(head).split(":")[1:]]
    first, second = (*parts, None, None)[:2]
    path = Path(head)
    if path.is_dir():
        found = _folder(path, first, second or split, second is not None)
        return Source(name, found, configuration=first, split=second or split)
    if path.exists() or files.kind_of(head) is not None:
        if files.kind_of(head) is None:
            raise KronyError(f"{head} is no text that can be read; give {files.KINDS}")
        if not path.exists():
            raise KronyError(f"can't read the text {head}: no such file")
        return Source(name, (path,), column=first)
    return Source(head, configuration=first, split=second or split)


def documents(source: Source, mark: str | None = None) -> Iterator[str]:
    """The documents of files, one after the other; see `files.documents`."""
    for path in source.paths:
        yield from files.documents(path, source.column, mark)


def digest(source: Source) -> str | None:
    """SHA-256 of all files, so that the same text is known again; None for one of the Hub."""
    if not source.paths:
        return None
    total = hashlib.sha256()
    for path in source.paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _folder(folder: Path, configuration: str | None, split: str, asked: bool) -> tuple[Path, ...]:
    listed = _configurations(folder)
    if configuration is None and listed:
        if len(listed) > 1 and "default" not in listed:
            raise KronyError(
                f"{folder} has the configurations {', '.join(listed)}; say which one, for example "
                f"{folder}:{next(iter(listed))}"
            )
        configuration = "default" if "default" in listed else next(iter(listed))
    if configuration is not None:
        if configuration not in listed:
            there = ", ".join(listed) or "none"
            raise KronyError(f"{folder} has no configuration {configuration!r}; there are: {there}")
        by_split = {s: _matching(folder, patterns) for s, patterns in listed[configuration].items()}
    else:
        by_split = _by_name(folder)
    if not any(by_split.values()):
        raise KronyError(f"{folder} has no texts in it; there must be {files.KINDS}")
    chosen = by_split.get(split) or (
        (by_split.get("") or by_split.get("train")) if not asked else None
    )
    if split == "test" and not asked:
        chosen = by_split.get("test") or by_split.get("validation") or chosen
    if not chosen:
        there = ", ".join(s for s in by_split if s) or "none"
        raise KronyError(f"{folder} has no split {split!r}; there are: {there}")
    return tuple(chosen)


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """All texts in a folder by split; under "" where no name says one."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if hidden or not path.is_file() or files.kind_of(path) is None:
            continue
        words = set(re.split(r"[^a-z]+", str(inner.with_suffix("")).lower()))
        split = next((s for s, names in SPLITS.items() if words & set(names)), "")
        found.setdefault(split, []).append(path)
    return found


def _configurations(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Configurations, splits and patterns of files, from the head of a data set's README.md."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    import yaml

    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
    try:
        content = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, RecursionError) as error:
        raise KronyError(f"the head of {card} is no YAML; it should list configurations") from error
    found: dict[str, dict[str, list[str]]] = {}
    entries = content.get("configs") if isinstance(content, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        given = entry.get("data_files")
        if given is None and isinstance(entry.get("data_dir"), str):
            inside = _by_name(folder / entry["data_dir"])
            found[str(entry.get("config_name", "default"))] = {
                split: [path.relative_to(folder).as_posix() for path in paths]
                for split, paths in inside.items()
            }
            continue
        given = given if isinstance(given, list) else [given]
        splits: dict[str, list[str]] = {}
        for item in given:
            pair = (
                (item.get("split"), item.get("path")) if isinstance(item, dict) else ("train", item)
            )
            paths = pair[1] if isinstance(pair[1], list) else [pair[1]]
            splits.setdefault(str(pair[0]), []).extend(str(p) for p in paths if p)
        found[str(entry.get("config_name", "default"))] = splits
    return found


def _matching(folder: Path, patterns: list[str]) -> list[Path]:
    """Files of the folder, and of nowhere else, that match."""
    inside = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return [
        path
        for path in inside
        if any(fnmatch.fnmatchcase(path.relative_to(folder).as_posix(), p) for p in patterns)
    ]


def hub_rows(source: Source, streaming: bool = False) -> Any:
    """The rows of a data set of the Hub, with a column "text" only.

    Raises:
        KronyError: what there is instead, where the Hub answers; else that it can't be had.
    """
    import datasets

    name = ":".join(filter(None, (source.name, source.configuration)))
    try:
        rows = datasets.load_dataset(
            source.name, source.configuration, split=source.split, streaming=streaming
        )
    except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        # The set is there, and has no such configuration or split: datasets says which it has.
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, datasets.exceptions.DatasetNotFoundError) or "offline" in reason:
            raise _unreachable(source) from error
        raise KronyError(f"{name} ({source.split}) is not there: {reason}") from error
    except Exception as error:  # datasets raises many kinds, also its network library's own
        raise _unreachable(source) from error
    columns = rows.column_names or list(next(iter(rows), {}))
    column = files.column_of(columns, source.column, name)
    rows = rows.select_columns([column])
    return rows if column == files.COLUMN else rows.rename_column(column, files.COLUMN)


def _unreachable(source: Source) -> KronyError:
    return KronyError(
        f"can't load the text {source.origin}: it is no file, and no data set of that name could "
        "be had from the Hugging Face Hub; check the name and the network"
    )
