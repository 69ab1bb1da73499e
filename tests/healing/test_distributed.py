"""Two processes with gloo on the CPU, DDP and FSDP2, against one process at the same batch."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import krony
from helpers import healing_inputs, logits
from krony.hf import ties

pytestmark = pytest.mark.slow

LAUNCHED = str(Path(__file__).parents[1] / "launched.py")
ALONE = [sys.executable, LAUNCHED]
TWO = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
TWO += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", LAUNCHED]
CPU = {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
FSDP2 = {
    "PRETEND_GPUS": "1",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block",
}
WAYS = {"ddp": {}, "fsdp2": FSDP2}
# In float32 on every machine: in bfloat16 the order of sums shows.
OPTIONS = ["--window", "16", "--tokens", "768", "--batch-tokens", "64", "--eval-every", "256"]
OPTIONS += ["--dtype", "float32"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return healing_inputs(tmp_path_factory.mktemp("inputs"))


def heal(
    inputs: Path, name: str, launcher: list[str], way: dict, *options: str, source: str = "small"
):
    """Run the command as a launcher would; the finished process."""
    command = [*launcher, "heal", str(inputs / source), str(inputs / name)]
    command += ["--data", str(inputs / "text.txt"), "--teacher", str(inputs / "dense")]
    command += [*OPTIONS, "--loss", "ce+kl", "--lr", "0.01", "--device", "cpu", *options]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **CPU, **way},
        timeout=240,
    )


def figures(inputs: Path, name: str, done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("with heal.json and heal.png") == 1  # only one process speaks
    assert not (inputs / f"{name}.run").exists()
    return json.loads((inputs / name / "heal.json").read_text())


@pytest.fixture(scope="module")
def alone(inputs):
    return figures(inputs, "alone", heal(inputs, "alone", ALONE, {}))


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_stopped_and_resumed_by_one_give_the_run_of_one(way, inputs, alone):
    stopped = heal(inputs, way, TWO, {**WAYS[way], "STOP_AFTER": "6"})
    assert stopped.returncode != 0
    assert f"stopped by signal {signal.SIGTERM.value} after step 6 of 12" in stopped.stderr
    assert not (inputs / way).exists()
    done = heal(inputs, way, ALONE, {}, "--resume")
    assert_same_run(inputs, way, figures(inputs, way, done), alone)


def test_two_processes_shard_the_model_and_write_it_whole(inputs, alone):
    found = figures(inputs, "sharded", heal(inputs, "sharded", TWO, FSDP2))
    assert (found["processes"], found["sharded"]) == (2, True)
    assert (alone["processes"], alone["sharded"]) == (1, False)
    assert_same_run(inputs, "sharded", found, alone)


def test_a_tied_factored_embedding_is_sharded(inputs):
    """Embedding and output matrix hold one set of factors, and stay in one group of FSDP2."""
    model, tokenizer = krony.load_model(inputs / "dense"), krony.load_tokenizer("demo")
    krony.compress(
        model, krony.make_plan(model, small=(2, 2), target="everything"), init="van-loan"
    )
    krony.save_model(model, inputs / "tied", tokenizer)
    alone = figures(inputs, "t1", heal(inputs, "t1", ALONE, {}, source="tied"))
    found = figures(inputs, "t2", heal(inputs, "t2", TWO, FSDP2, source="tied"))
    assert (found["processes"], found["sharded"]) == (2, True)
    for a, b in zip(found["curve"], alone["curve"], strict=True):
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-4)
    first, second = (krony.load_model(inputs / n) for n in ("t1", "t2"))
    assert ties.output_is_tied(second)
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-3, atol=1e-3)


def test_muon_on_sharded_matrices(inputs):
    """In bfloat16, where the order of sums shows: the same curve to a percent."""
    alone = figures(inputs, "m1", heal(inputs, "m1", ALONE, {}, "--dtype", "bfloat16"))
    found = figures(inputs, "m2", heal(inputs, "m2", TWO, FSDP2, "--dtype", "bfloat16"))
    assert (found["processes"], found["sharded"]) == (2, True)
    for a, b in zip(found["curve"], alone["curve"], strict=True):
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-2)
    assert found["best_held_out"] < found["curve"][0]["held_out"] - 0.1


def assert_same_run(inputs: Path, name: str, found: dict, wanted: dict) -> None:
    assert [p["tokens"] for p in found["curve"]] == [p["tokens"] for p in wanted["curve"]]
    for a, b in zip(found["curve"], wanted["curve"], strict=True):
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-4)
    assert found["best_held_out"] < found["curve"][0]["held_out"] - 0.1
    first, second = (krony.load_model(inputs / n) for n in (name, "alone"))
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-3, atol=1e-3)
