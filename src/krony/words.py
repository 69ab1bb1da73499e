"""Words and sizes that people write, on the command line and in Python.

The names stand here so that they can be offered without loading what they name.
"""

from typing import Literal

from krony.errors import KronyError

Bos = Literal["auto", "always", "never"]
Dtype = Literal["float32", "bfloat16", "float16"]
Init = Literal["van-loan", "van-loan-scaled", "prune", "random", "data"]
Layout = Literal["small-outer", "large-outer"]
Objective = Literal["size", "decode", "throughput"]
Recipe = Literal["default", "krony-pt", "lora"]
Freeze = Literal["none", "dense"]
Quantity = Literal["int8", "int8-dynamic", "int4"]

TARGETS = ("mlp", "attention", "embedding", "all", "everything")
TEXTS = ("wikitext2", "wikitext103", "lambada", "python-docs")
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
