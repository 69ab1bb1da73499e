"""docs/results.md and README's table out of benchmarks/results/*.json.

A line `{{ name arguments }}` of docs/results.in.md becomes what the function of that name makes
(tables_quality.py and its like). Tests hold the pages and the files together.

python benchmarks/tables.py [--check]
"""

import argparse
import re
import shlex
import sys

import tables_compare
import tables_healing
import tables_quality
import tables_speed
import tables_trust
from tabular import DOCS, TABLES

TEMPLATE, PAGE = DOCS / "results.in.md", DOCS / "results.md"
NOTE = "<!-- Made by `make docs` from results.in.md and benchmarks/results: edit those. -->\n\n"
README = DOCS.parent / "README.md"
MARKED = re.compile(r"(<!-- table -->).*?(<!-- /table -->)", re.DOTALL)
PLACE = re.compile(r"^\{\{ (.+) \}\}$", re.MULTILINE)
__all__ = [
    "page",
    "readme",
    "tables_compare",
    "tables_healing",
    "tables_quality",
    "tables_speed",
    "tables_trust",
]


def page() -> str:
    """The text of docs/results.md."""

    def made(place: re.Match[str]) -> str:
        name, *arguments = shlex.split(place[1])
        if name not in TABLES:
            raise SystemExit(f"no table {name!r}; there are {', '.join(sorted(TABLES))}")
        return TABLES[name](*arguments)

    return NOTE + PLACE.sub(made, TEMPLATE.read_text(encoding="utf-8"))


def readme() -> str:
    """README with its table as it should be."""
    text = README.read_text(encoding="utf-8")
    return MARKED.sub(lambda m: f"{m[1]}\n{TABLES['readme']()}\n{m[2]}", text)


def main() -> None:
    """Write both, or with --check say whether they are what would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    made = {PAGE: page(), README: readme()}
    check = parser.parse_args().check
    for path, text in made.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is stale; run make docs")


if __name__ == "__main__":
    main()
