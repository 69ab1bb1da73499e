"""Words and sizes that people write, on the command line and in Python.

The names stand here so that they can be offered without loading what they name.
"""

from math import isfinite
from typing import Literal

from krony.errors import KronyError

Bos = Literal["auto", "always", "never"]
Dtype = Literal["float32", "bfloat16", "float16"]
Init = Literal["van-loan", "van-loan-scaled", "prune", "random", "data"]
Layout = Literal["small-outer", "large-outer"]
Objective = Literal["size", "decode", "throughput"]
Recipe = Literal["default", "krony-pt", "lora"]
Freeze = Literal["none", "dense"]
Structure = Literal["factored", "plain"]
Quantity = Literal["int8", "int8-dynamic", "int4"]

TARGETS = ("mlp", "attention", "embedding", "all", "everything")
TEXTS = ("wikitext2", "wikitext2-raw", "wikitext103", "lambada", "python-docs")
DATA: Init = "data"
SELF = "self"  # text that the model itself writes


def parse_count(text: str | None, option: str = "--params") -> int | None:
    """81,972,576 from "81972576" or 81 million from "81M". Raises `KronyError`."""
    if text is None:
        return None
    units = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
    number, unit = text[:-1], units.get(text[-1:].lower())
    try:
        return int(float(number) * unit) if unit else int(text)
    except ValueError:
        raise KronyError(f"{option} {text!r} is no count; write for example 81M") from None


def parse_size(size: float | int | str | None, total: int) -> int | None:
    """Parameters of the whole model, from a share of `total` (0.6, "60%") or a count ("81M").

    Raises:
        KronyError: no share and no count, or not between nothing and `total`.
    """
    if size is None:
        return None
    text = str(size).strip()
    number = _number(text.removesuffix("%"))
    if text.endswith("%"):
        wanted = int(number / 100 * total)
    elif 0 < number < 1:
        wanted = int(number * total)
    else:
        wanted = int(number) or parse_count(text, "a size of") or 0
    if not 0 < wanted < total:
        raise KronyError(
            f"a size of {text} can't be: the model has {total:,} parameters; give a share of them "
            "(60%) or a number below (81M)"
        )
    return wanted


def _number(text: str) -> float:
    """0 for what is no finite number."""
    try:
        found = float(text)
    except ValueError:
        return 0.0
    return found if isfinite(found) else 0.0
