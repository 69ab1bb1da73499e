"""The pages on extending krony, run as they stand, from outside, by public names only."""

import ast
import re
from pathlib import Path

import pytest

import krony
from krony.nn import dispatch

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "docs" / "extending"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.stem != "index")
PUBLIC_MODULES = {"krony", "krony.nn.dispatch"}


def program(page: Path) -> str:
    return "\n".join(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )


@pytest.fixture(autouse=True)
def nothing_stays():
    before = dict(krony.INITS)
    yield
    krony.INITS.clear()
    krony.INITS.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page, capsys):
    names: dict = {"__name__": "outside"}
    exec(compile(program(page), page.name, "exec"), names)
    assert capsys.readouterr().out.strip(), "a page shows what it did"
    CHECKS[page.stem](names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_takes_public_names_only(page):
    tree = ast.parse(program(page))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("krony"):
            assert node.module in PUBLIC_MODULES, node.module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "krony":
                assert node.attr in krony.__all__, f"krony.{node.attr}"
            assert not node.attr.startswith("_")


def architecture(names: dict) -> None:
    assert len(names["plan"].matrices) == 4
    for block in names["model"].transformer.h:
        assert isinstance(block.mlp.read.matrix, krony.KroneckerLinear)
        assert isinstance(block.mlp.write.matrix, krony.KroneckerLinear)


def initialization(names: dict) -> None:
    found = names["model"].config.quantization_config.provenance
    assert found["init"] == "average"
    assert 0 < found["matrices"]["transformer.h.0.mlp.c_fc"]["relative_error"] < 1.01


def kernel(names: dict) -> None:
    # One matrix in each of four blocks met one token; the row is gone afterwards.
    assert names["calls"]
    assert all(shape[-2] == 1 for shape in names["calls"])
    assert "whole" not in [row.name for row in dispatch.table("layer")]


def rival(names: dict) -> None:
    assert names["parameters"](names["model"]) <= names["parameters"](names["rival"])


CHECKS = {f.__name__: f for f in (architecture, initialization, kernel, rival)}


def test_every_page_is_checked():
    assert set(CHECKS) == {page.stem for page in PAGES}
