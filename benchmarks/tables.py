"""docs/results.md out of benchmarks/results/*.json: the tables, put into docs/results.in.md.

A line `{{ name arguments }}` of the template becomes what the function of that name makes
(tables_quality.py, tables_speed.py). A test holds the two together.

python benchmarks/tables.py [--check]
"""

import argparse
import re
import shlex
import sys

import tables_quality
import tables_speed
from tabular import DOCS, TABLES

TEMPLATE, PAGE = DOCS / "results.in.md", DOCS / "results.md"
NOTE = "<!-- Made by `make docs` from results.in.md and benchmarks/results: edit those. -->\n\n"
PLACE = re.compile(r"^\{\{ (.+) \}\}$", re.MULTILINE)
__all__ = ["page", "tables_quality", "tables_speed"]


def page() -> str:
    """The text of docs/results.md."""

    def made(place: re.Match[str]) -> str:
        name, *arguments = shlex.split(place[1])
        if name not in TABLES:
            raise SystemExit(f"no table {name!r}; there are {', '.join(sorted(TABLES))}")
        return TABLES[name](*arguments)

    return NOTE + PLACE.sub(made, TEMPLATE.read_text(encoding="utf-8"))


def main() -> None:
    """Write the page, or with --check say whether it is what would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    text = page()
    if parser.parse_args().check:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == text else "docs/results.md is stale")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
