"""JSON from files that nobody vouches for: read whole and unambiguous, or refused in a sentence."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from krony.errors import KronyError

MOST_BYTES = 16 * 2**20  # of a configuration or a plan; the largest that exist take about one
MOST_DEPTH = 64
_TOO_DEEP = f"is nested more than {MOST_DEPTH} deep, which nothing needs"


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """What a JSON file holds; see `parse_json`. Raises `KronyError`, also without a file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise KronyError(f"can't read {path}: {error.strerror or error}") from error
    if len(raw) > most:
        raise KronyError(f"{path} has more than {most:,} bytes, too many for what it should be")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise KronyError(f"{path} is not UTF-8 at byte {error.start}, so it is no JSON") from error
    return parse_json(text, str(path))


def parse_json(text: str, name: str) -> Any:
    """What a JSON text says; `name` is what it is called in errors.

    Infinity is let through, since configurations of some state-space models have it.

    Raises:
        KronyError: not JSON, a key twice in one object, NaN, or nested deeper than `MOST_DEPTH`.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
        _check_depth(found)
    except _Refused as error:
        raise KronyError(f"{name} {error}") from error
    except RecursionError as error:
        raise KronyError(f"{name} {_TOO_DEEP}") from error
    except ValueError as error:  # also numbers of thousands of digits
        raise KronyError(f"{name} is not JSON ({_short(error)})") from error
    return found


class _Refused(Exception):  # noqa: N818  what json.loads must not take for an error of its own
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise _Refused(f"has {twice!r} twice in one object, so it is not clear what it says")
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise _Refused("has a NaN, which is no number")
    return math.inf if name == "Infinity" else -math.inf


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MOST_DEPTH + 1):
        inner = [v for v in level if isinstance(v, dict | list)]
        if not inner:
            return
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
    raise _Refused(_TOO_DEEP)


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def integer(value: Any, name: str, least: int = 1, most: int = 2**31 - 1) -> int:
    """A whole number within bounds. Raises `KronyError` that names it."""
    if type(value) is not int or not least <= value <= most:
        raise KronyError(f"{name} is {shown(value)}, and must be a whole number, {least} to {most}")
    return value


def number(value: Any, name: str) -> float:
    """A finite number. Raises `KronyError` that names it."""
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise KronyError(f"{name} is {shown(value)}, and must be a finite number")
    return float(value)


def boolean(value: Any, name: str) -> bool:
    """true or false. Raises `KronyError` that names it."""
    if type(value) is not bool:
        raise KronyError(f"{name} is {shown(value)}, and must be true or false")
    return value


def string(value: Any, name: str, most: int = 512) -> str:
    """A text that is not too long. Raises `KronyError` that names it."""
    if type(value) is not str or not 0 < len(value) <= most:
        raise KronyError(f"{name} is {shown(value)}, and must be a text of 1 to {most} characters")
    return value


def choice(value: Any, name: str, among: Iterable[str]) -> str:
    """One of some texts. Raises `KronyError` that names it."""
    known = list(among)
    if type(value) is not str or value not in known:
        raise KronyError(f"{name} is {shown(value)}, and must be one of {', '.join(known)}")
    return value


def array(value: Any, name: str, most: int) -> list[Any]:
    """A list of at most so many entries. Raises `KronyError` that names it."""
    if not isinstance(value, list | tuple):
        raise KronyError(f"{name} is {shown(value)}, and must be a list")
    if len(value) > most:
        raise KronyError(
            f"{name} has {len(value):,} entries, and {most:,} is the most there can be"
        )
    return list(value)


def mapping(value: Any, name: str) -> dict[str, Any]:
    """A JSON object. Raises `KronyError` that names it."""
    if not isinstance(value, dict):
        raise KronyError(f"{name} is {shown(value)}, and must be a JSON object")
    return value


def shown(value: Any) -> str:
    """A value in an error: its beginning, or what kind it is of."""
    if value is None:
        return "null"
    if isinstance(value, dict | list | tuple):
        return "an object" if isinstance(value, dict) else "a list"
    try:
        return repr(value)[:40]
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
