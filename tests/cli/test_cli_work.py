"""`krony compress` after a kill, and `krony plan --curve`, on a tiny model that needs no text."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import tiny
from krony import save_model
from krony.compression.work import Work, beside

OPTIONS = ["--budget", "0.4", "--objective", "throughput", "--windows", "8", "--memory", "1GB"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_model(tiny("llama"), tmp_path_factory.mktemp("source") / "llama")


KILLED = """
import os, signal, sys
from krony.compression.work import Work
from krony.cli.app import main
put, left = Work.put, [int(sys.argv.pop(1))]
def dying(self, *arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    put(self, *arguments)
Work.put = dying
main()
"""


# Of text, moments, gradients and moments, the gradients are gone once they are used up.
@pytest.mark.slow
@pytest.mark.parametrize(("moment", "files"), [(1, 1), (4, 3)])
def test_the_same_command_goes_on_after_a_kill(source, run, tmp_path, moment, files):
    command = ["compress", str(source), str(tmp_path / "out"), *OPTIONS]
    script = [sys.executable, "-c", KILLED, str(moment)]
    done = subprocess.run([*script, *command], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out").exists()
    assert len(list(beside(tmp_path / "out").iterdir())) == files
    code, _, err = run(*command)
    assert code == 0, err
    assert "about" in err
    assert "GB in all" in err
    assert not beside(tmp_path / "out").exists()
    code, _, err = run("compress", source, tmp_path / "whole", *OPTIONS)
    assert code == 0, err
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole")]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


@pytest.mark.slow
def test_ten_sizes_from_one_calibration(source, run, tmp_path, monkeypatch):
    texts: list[str] = []
    put = Work.put
    monkeypatch.setattr(Work, "put", lambda self, *a: (texts.append(a[1]), put(self, *a)))
    path = tmp_path / "curve.json"
    code, out, err = run(
        "plan", source, "--curve", "--objective", "throughput", "--windows", "8", "--json", path
    )
    assert code == 0, err
    rows = json.loads(Path(path).read_text())
    assert texts.count("moments") == 2
    assert 8 <= len(rows) <= 10
    assert [r["harm"] for r in rows] == sorted(r["harm"] for r in rows)
    assert [r["parameters"] for r in rows] == sorted((r["parameters"] for r in rows), reverse=True)
    assert all(0 < r["decode"] <= 1 and 0 < r["prefill"] <= 1 for r in rows)
    assert f"{rows[0]['parameters']:,}" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--curve", "--budget", "0.5"], "leave the budget out"),
        (["--budget", "0.5", "--memory", "much"], "write for example 8GB"),
    ],
)
def test_what_is_refused(source, run, options, message):
    code, _, err = run("plan", source, "--windows", "8", *options)
    assert (code, message in err) == (2, True), err
