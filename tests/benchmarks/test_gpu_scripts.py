"""Every script for a rented GPU, at toy size on the CPU: that it runs, and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "benchmarks/gpu").glob("[0-9]*.sh"))
# Which of the results, beside the settings, have figures.
PARTS = {
    "01-tests": ["checks.json: perplexity", "checks.json: tests"],
    "02-training": ["mixing.json: rows", "training-135m.json: rows"],
    "03-heal": ["study/dense.json: after"],
    "04-rivals": ["study/0.8-layers-dropped.json: after"],
    "05-kernels": ["decode-135m.json: runs", "forward.json: rows"],
    "06-paper": ["paper-training.json: rows"],
    "07-compression": ["compression-1.5b.json: moments"],
}


def run(script, out, **more):
    environment = os.environ | {
        "SMALL": "1",
        "OUT": str(out),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(out / "cache"),
        "LIMIT": "3000",
        "COMMIT": "of the test",
        **more,
    }
    return subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, check=False
    )


def test_the_scripts_are_those_that_are_tested():
    assert [s.stem for s in SCRIPTS] == list(PARTS)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_it_runs_at_toy_size(script, tmp_path):
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout + done.stderr
    assert "not done" not in done.stdout, done.stdout
    for wanted in PARTS[script.stem]:
        file, part = wanted.split(": ")
        found = json.loads((tmp_path / file).read_text())
        assert found[part], f"{file} has no {part}"
        assert found["environment"]["commit"] == "of the test"
        assert {"date", "torch", "transformers", "gpu", "cpu"} <= found["environment"].keys()


def test_without_time_nothing_is_begun_and_that_is_said(tmp_path):
    done = run(ROOT / "benchmarks/gpu/05-kernels.sh", tmp_path, LIMIT="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not done, no time left") == 2
    assert not list(tmp_path.glob("*.json"))


def test_what_was_not_carried_is_named(tmp_path):
    done = run(ROOT / "benchmarks/gpu/03-heal.sh", tmp_path, SMALL="", DATA=str(tmp_path))
    assert done.returncode == 2
    assert "smollm2/config.json is missing" in done.stderr
    assert "README.md" in done.stderr
