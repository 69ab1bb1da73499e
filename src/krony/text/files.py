"""One reader for texts in files: what a row holds is read, or refused by file and line.

.txt, .jsonl, .json and .parquet, each of them also compressed (gzip, bzip2, xz, zstandard: known by
their first bytes, not by their names), in UTF-8 or in UTF-16 with a byte order mark.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from krony.errors import KronyError

SUFFIXES = {".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "json"}
SUFFIXES |= {".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KINDS = "a .txt, .jsonl, .json or .parquet (also as .gz, .bz2, .xz, .zst)"
COLUMN = "text"
OTHERS = ("content", "document", "article", "body")  # taken where there is no "text"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_UTF32 = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")


def kind_of(path: str | Path) -> str | None:
    """What a file name promises: "text", "lines", "json" or "parquet"; None: something else."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def documents(
    path: str | Path, column: str | None = None, mark: str | None = None
) -> Iterator[str]:
    """The texts of one file, one at a time.

    Args:
        column: what holds the text in a file of rows; None finds "text", or the only other one.
        mark: a line of a .txt that separates documents; None: the file is one document.
    Raises:
        KronyError: no such file, another kind of file, nothing in it, bytes that are no text, a row
            without a text. It names the file, and the line or row.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind is None:
        raise KronyError(f"{path} is no text that can be read; give {KINDS}")
    count = 0
    try:
        reader = {"text": _text, "lines": _lines, "json": _json, "parquet": _parquet}[kind]
        for text in reader(path, column, mark):
            count += 1
            yield text
    except FileNotFoundError as error:
        raise KronyError(f"can't read the text {path}: no such file") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise KronyError(f"can't read the text {path}: {reason}") from error
    if not count:
        raise KronyError(f"the text {path} is empty")


def _open(path: Path) -> IO[bytes]:
    file = path.open("rb")
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(file)  # type: ignore[return-value]
    if start.startswith(b"BZh"):
        return bz2.open(file)
    if start == b"\xfd7zXZ\x00":
        return lzma.open(file)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # its reader takes frames one after the other, and says what is cut off

        file.close()
        return io.BufferedReader(_Stream(pyarrow.input_stream(str(path), compression="zstd")))
    return file


class _Stream(io.RawIOBase):
    """A stream of pyarrow's as one of Python's."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data: bytes = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _decoded(path: Path) -> Iterator[str]:
    """The lines with their ends as they are (carriage returns stay), without byte order marks."""
    with _open(path) as raw:
        file = raw if isinstance(raw, io.BufferedIOBase) else io.BufferedReader(raw)  # type: ignore[type-var]
        first = file.readline()
        wide = first.startswith(_UTF16) and not first.startswith(_UTF32)
        if not wide and first[:1000].count(0) * 10 > len(first[:1000]):
            raise KronyError(
                f"{path} is not UTF-8 text: it is full of zero bytes, as UTF-32, UTF-16 without a "
                "byte order mark and binary files are; convert it first"
            )
        if wide:
            try:
                yield from (first + file.read()).decode("utf-16").splitlines(keepends=True)
            except UnicodeDecodeError as error:
                raise KronyError(
                    f"{path} is not UTF-8 nor UTF-16 text; convert it first"
                ) from error
            return
        number, line = 1, first.removeprefix(b"\xef\xbb\xbf")
        while line:
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise KronyError(
                    f"line {number} of {path} is not UTF-8 (byte 0x{line[error.start]:02x}); "
                    "convert it first, for example: iconv -f latin1 -t utf-8"
                ) from error
            number, line = number + 1, file.readline()


def _text(path: Path, column: str | None, mark: str | None) -> Iterator[str]:
    if column is not None:
        raise KronyError(f"{path} is plain text and has no column {column!r}")
    if mark is None:
        whole = "".join(_decoded(path))
        if whole.strip():
            yield whole
        return
    part: list[str] = []
    for line in _decoded(path):
        if line.rstrip("\r\n") == mark:
            if text := "".join(part).strip("\n"):
                yield text
            part = []
        else:
            part.append(line)
    if (text := "".join(part).strip("\n")).strip():
        yield text


def _lines(path: Path, column: str | None, mark: str | None) -> Iterator[str]:
    for number, line in enumerate(_decoded(path), 1):
        if line.strip():
            name = f"line {number} of {path}"
            row = _object(_loads(line, name), name)
            column = column_of(row, column, name)  # the first row's, in all of them
            yield _row(row, column, name)


def _json(path: Path, column: str | None, mark: str | None) -> Iterator[str]:
    """A list of texts or rows, one row, or rows line by line, as many a .json is in truth."""
    whole = "".join(_decoded(path))
    try:
        found = json.loads(whole) if whole.strip() else []
    except (ValueError, RecursionError):
        yield from _lines(path, column, mark)
        return
    rows = found if isinstance(found, list) else [found]
    for number, row in enumerate(rows, 1):
        name = f"entry {number} of {path}" if isinstance(found, list) else str(path)
        if isinstance(row, str):
            yield _encodable(row, name)
            continue
        column = column_of(_object(row, name), column, name)
        yield _row(row, column, name)


def _loads(line: str, name: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "it is nested too deep")
        raise KronyError(f'{name} is no JSON object with a "text": {reason}') from error


def _object(row: Any, name: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise KronyError(f'{name} is {_kind(row)}, and must be a JSON object with a "text"')
    return row


def _row(row: dict[str, Any], column: str, name: str) -> str:
    found = row[column]
    if not isinstance(found, str):
        raise KronyError(f"the text in {name} is {_kind(found)}, and must be a text; leave it out")
    return _encodable(found, name)


def _encodable(text: str, name: str) -> str:
    """The text. Raises `KronyError` for escapes in JSON that are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise KronyError(
            f"the text in {name} has half of a surrogate pair (\\u{ord(text[error.start]):04x}), "
            "which is no character; leave it out"
        ) from error
    return text


def column_of(columns: Any, column: str | None, name: str) -> str:
    """The column that holds the text: the one asked for, "text", or the one that must be it.

    Raises:
        KronyError: there is none, or it is not clear which; it names those that are there.
    """
    present = list(columns)
    if column is not None and column in present:
        return column
    if column is None:
        likely = [c for c in (COLUMN, *OTHERS) if c in present][:1] or present
        if len(likely) == 1:
            return str(likely[0])
    there = ", ".join(map(str, present[:8])) or "nothing"
    raise KronyError(
        f'{name} has no column "{column or COLUMN}", only {there}; say which one holds the text '
        "by its name after a colon, file.jsonl:column"
    )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a bare text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _parquet(path: Path, column: str | None, mark: str | None) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            name = column_of(file.schema_arrow.names, column, str(path))
            number = 0
            for batch in file.iter_batches(columns=[name], batch_size=1000):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _row({name: value}, name, f"row {number} of {path}")
    except pyarrow.ArrowException as error:
        raise KronyError(f"can't read the text {path}: {str(error).splitlines()[0]}") from error
