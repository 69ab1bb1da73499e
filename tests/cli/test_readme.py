"""README's and the guide's commands and Python, run as they stand, and what they name."""

import re
import shlex
from pathlib import Path

import datasets
import pytest

import krony
from krony.cli import heal as cli_heal
from krony.compression import calibrate, prices
from krony.maths import fit
from krony.maths.schemes import SCHEMES
from krony.measure import bench
from krony.text import data, docstrings
from krony.words import parse_count

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of every block of code, in order."""
    return re.findall(rf"```({'|'.join(languages)})\n(.*?)```", page, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, GUIDE], ids=["README", "guide"])
def test_page_runs_in_order(page, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The head of the text, few candidates, rough fits: the commands still run.
    full = data.load_text("python-docs")
    head = data.Text(full.name, full.text[:20_000], full.origin)
    monkeypatch.setattr(prices, "LOW_RANK_PARTS", (0.1,))
    monkeypatch.setattr(prices, "PRICING_STEPS", 1)
    monkeypatch.setattr(fit, "STEPS", 2)
    windows = calibrate.calibration_windows
    monkeypatch.setattr(calibrate, "calibration_windows", lambda *a, **k: windows(*a, **k)[:16])
    monkeypatch.setitem(data.TEXTS, "python-docs", lambda *_: head)
    # A step of healing instead of five hundred, on a few docstrings.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    few = docstrings.python_docstrings("train", ("asyncio", "email"))
    monkeypatch.setattr(docstrings, "python_docstrings", lambda *_: few)
    monkeypatch.setattr(cli_heal, "parse_count", lambda *a: parse_count(*a) and 4096)
    for name, value in (("MOST", 1), ("NEW", 2), ("PREFILLS", (16,))):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 1)
    commands = 0
    for language, text in blocks(page, "bash", "python"):
        if language == "python":
            exec(compile(text, "page", "exec"), {})
            continue
        for command in filter(None, text.splitlines()):
            program, *arguments = shlex.split(command)
            assert program == "krony"
            code, out, err = run(*arguments)
            assert code == 0, f"{command}: {err}"
            assert out.strip(), f"{command} printed nothing"
            commands += 1
    assert commands >= 5


@pytest.mark.parametrize("name", [*krony.INITS, *SCHEMES])
def test_every_initialisation_and_scheme_is_named(name):
    assert f"`{name}`" in GUIDE
