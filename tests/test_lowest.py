"""Every dependency has one lower bound, which `make lowest` can install."""

from pathlib import Path

import pytest

from lowest import constraints


def test_every_dependency_has_a_lower_bound():
    found = constraints((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert any(line.startswith("torch==") for line in found)
    assert all(line.count(".") >= 2 for line in found)


def test_one_without_a_bound_is_named():
    with pytest.raises(ValueError, match="numpy has no lower bound"):
        constraints('[project]\ndependencies = ["numpy"]\n')
