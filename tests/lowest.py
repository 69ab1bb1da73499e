"""Constraints for the lowest versions that pyproject.toml allows: `make lowest`."""

import re
import tomllib
from pathlib import Path

BOUND = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)")


def constraints(text: str) -> list[str]:
    """`name==version` for every dependency that a user gets, of a pyproject.toml."""
    found = []
    for requirement in tomllib.loads(text)["project"]["dependencies"]:
        match = BOUND.fullmatch(requirement)
        if match is None:
            raise ValueError(f"{requirement} has no lower bound, or more than one")
        name, version = match.groups()
        # A bound of two numbers is met by the first of its patches: 0.5 is 0.5.0.
        found.append(f"{name}=={version}" + ".0" * (2 - version.count(".")))
    return found


if __name__ == "__main__":
    print(*constraints((Path(__file__).parents[1] / "pyproject.toml").read_text()), sep="\n")
