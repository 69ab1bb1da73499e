"""The same command writes the same bytes twice, and with one thread and two where it can.

What reads data multiplies thousands of tokens, and libraries add up products in another order with
another number of threads.
"""

import json
import os
from pathlib import Path

import pytest

from faults import trials

pytestmark = pytest.mark.slow

MORE = {
    "the packaged model": "compress demo out --small 2x2 --init van-loan",
    "a budget": "compress dense out --budget 0.6 --calibration text.txt --windows 4",
}
FIGURES = {
    "plan": "plan dense --small 2x2 --json out.json",
    "evaluate": "evaluate small --data text.txt --window 32 --json out.json",
    "generate": "generate small def --max-new-tokens 8 --temperature 0.7",
}
DATA = ("compress by data", "heal", "a budget", "plain", "compare")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("bytes"))
    trials.prepare()
    yield Path.cwd()
    os.chdir(before)


@pytest.mark.parametrize("name", [*trials.COMMANDS, *MORE])
def test_directories(name, here):
    if "onnx" in name:
        pytest.importorskip("onnxscript")
    command = {**trials.COMMANDS, **MORE}[name].split()
    found = []
    tried = (1, 1) if name in DATA else (1, 2) if "onnx" in name else (1, 1, 2)
    for threads in tried:
        code, said = trials.ended(*trials.run(command, threads=threads))
        assert code == 0, said
        found.append(trials.contents(trials.target(name)))
        trials.remove(trials.target(name))
    for again in found[1:]:
        assert again.keys() == found[0].keys()
        assert [path for path in again if again[path] != found[0][path]] == []


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name, here):
    found = []
    for threads in (1, 1, 2):
        code, said = trials.ended(*trials.run(FIGURES[name].split(), threads=threads))
        assert code == 0, said
        path = Path("out.json")
        found.append(trials.lasting(json.loads(path.read_text())) if path.exists() else said)
        path.unlink(missing_ok=True)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("name", "most"), [("heal", 1e-2), ("compress by data", 0.5)])
def test_what_another_number_of_threads_changes(name, most, here):
    """Rounding alone, which fits that stop early carry on."""
    assert trials.by_threads(name) < most
