"""A destination is claimed by one process, and nothing is left beside it however that ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers import tiny
from krony.errors import KronyError
from krony.hf.claims import claim, new_directory, write_error
from krony.hf.saving import save_model, write_json

HOLD = """
import sys, time
from krony.hf.claims import claim, new_directory
with claim(sys.argv[1]), new_directory(sys.argv[1]) as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print("claimed", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has claimed "out" and written half of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"claimed\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_a_kill_leaves_nothing(holder, tmp_path):
    with (
        pytest.raises(KronyError, match=r"another krony is writing .*out at this moment"),
        new_directory(tmp_path / "out"),
    ):
        raise AssertionError
    with claim(tmp_path / "other"):  # another destination in the same folder is free
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()  # to the end of its standard error, which the janitor holds
    assert list(tmp_path.iterdir()) == []
    with new_directory(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_left_without_a_janitor_goes_with_the_next_claim(tmp_path):
    stale = tmp_path / ".out.partial" / "new.123"
    stale.mkdir(parents=True)
    (stale / "weights").touch()
    with new_directory(tmp_path / "out"):
        assert not stale.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_claims_nest_and_the_last_one_lifts(tmp_path):
    hidden = tmp_path / ".out.partial"
    with claim(tmp_path / "out"):
        with claim(tmp_path / "out"):
            pass
        assert hidden.exists()
    assert not hidden.exists()


def test_a_folder_that_vanished_meanwhile_is_made_again(tmp_path):
    out = tmp_path / "deep" / "out"
    with claim(out) as hidden:
        for path in hidden.iterdir():
            path.unlink()
        hidden.rmdir()
        out.parent.rmdir()
        with new_directory(out) as folder:
            (folder / "file").touch()
    assert (out / "file").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_somebody_else_made_meanwhile_is_not_overwritten(tmp_path):
    def interrupted():
        with new_directory(tmp_path / "out") as folder:
            (folder / "file").touch()
            (tmp_path / "out").mkdir()

    with pytest.raises(KronyError, match="was made by somebody else meanwhile"):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_name_that_is_a_broken_link_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(KronyError, match="exists already"), new_directory(tmp_path / "out"):
        raise AssertionError


def test_half_written_files_of_the_dead_are_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".figures.{dead.pid}.json").touch()
    (tmp_path / f".figures.{os.getppid()}.json").touch()  # somebody who is alive
    (tmp_path / ".figures.mine.json").touch()
    write_json(tmp_path / "figures.json", {})
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(["figures.json", f".figures.{os.getppid()}.json", ".figures.mine.json"])


def test_refusals_of_the_system_are_known_whoever_meets_them():
    assert write_error(OSError(28, "No space left on device")) == "No space left on device"
    assert write_error(RuntimeError("[enforce fail] PytorchStreamWriter failed writing"))
    assert write_error(RuntimeError("No space left on device (os error 28)"))
    assert write_error(RuntimeError("shapes do not fit")) is None


def test_a_claim_costs_milliseconds(tmp_path):
    """The bound is a hundred times what it takes: a deadlock with the janitor would show."""
    started = time.perf_counter()
    with claim(tmp_path / "out"):
        pass
    assert time.perf_counter() - started < 5


def test_numbers_that_overflow_in_half_precision_are_not_written(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e6
    with pytest.raises(KronyError, match=r"lm_head.weight has 1 NaN or Inf .* in float16; write"):
        save_model(model.half(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
