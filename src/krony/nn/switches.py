"""Which kernels may be used: all, or those that `KRONY_KERNELS` names.

For looking into what a kernel does, and for users whose compiler is broken:
`KRONY_KERNELS=torch` takes plain torch for everything, `KRONY_KERNELS=decode,mix` these two and
torch. `krony.explain` shows what is taken.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from krony.errors import KronyError

VARIABLE = "KRONY_KERNELS"
# Those that `dispatch` chooses among, and what is element by element in them and beside them.
known = {
    "decode": "a few tokens through a layer or an MLP in one call on a CPU (decode.c)",
    "tiles": "an MLP in bfloat16 on the tile unit of a CPU (tiles.c)",
    "hidden": "the hidden axis of an MLP in one loop on a CPU (hidden.c)",
    "fewer": "fewer large products for several terms on a CPU",
    "triton": "Triton kernels on a GPU",
    "mix": "slices mixed by a small factor on a CPU (hidden.c)",
    "fill": "interpolative factors in full on a CPU (hidden.c)",
    "gelu": "GELU's tanh form on a CPU (hidden.c)",
    "torch": "plain torch; always there",
}


def _from_environment() -> frozenset[str] | None:
    names = {name.strip() for name in os.environ.get(VARIABLE, "").split(",")} - {""}
    return frozenset(names) or None


_only: frozenset[str] | None = _from_environment()
version = 0  # of what may be used: whoever kept a choice looks whether it is the same
_tables = 0  # how often rows came
_versions: dict[tuple[frozenset[str] | None, int], int] = {}


def allows(name: str) -> bool:
    """Whether a kernel may be used."""
    return _only is None or name in _only


def check() -> None:
    """Raise `KronyError` where a kernel is asked for that there is none of."""
    unknown = sorted((_only or frozenset()) - known.keys())
    if unknown:
        raise KronyError(
            f"{VARIABLE} names {', '.join(unknown)}, and there is no such kernel; there are "
            f"{', '.join(known)}"
        )


def changed() -> None:
    """Say that there are other rows than there were: nothing that was chosen holds any more."""
    global _tables
    _tables += 1
    _number()


def _number() -> None:
    """The same kernels have the same version, so that what was chosen among them holds again."""
    global version
    version = _versions.setdefault((_only, _tables), len(_versions))


@contextmanager
def restricted(*names: str) -> Iterator[None]:
    """Only these kernels, and torch, inside of a `with` block.

    Raises:
        KronyError: there is no kernel of that name.
    """
    global _only
    before, _only = _only, frozenset(names)
    _number()
    try:
        check()
        yield
    finally:
        _only = before
        _number()


_number()
