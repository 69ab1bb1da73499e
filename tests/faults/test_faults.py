"""Kills, full disks and two runs at one destination: nothing is lost, nothing is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import krony
from faults import trials
from krony.text.blocks import load_blocks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("faults"))
    trials.prepare()
    yield Path.cwd()
    os.chdir(before)


def test_killed_at_random_moments_commands_leave_nothing_that_is_wrong(here):
    done = list(trials.trials(10, seed=11))
    assert [t for t in done if t.wrong] == []
    assert any(t.code for t in done)


@pytest.mark.parametrize("name", ["compress", "heal", "quantize", "export"])
def test_of_two_at_one_destination_one_is_refused(name, here):
    """Both are past their imports and start at once."""
    running = [trials.run(trials.COMMANDS[name].split()) for _ in range(2)]
    ends = [trials.ended(*one) for one in running]
    codes = sorted(code for code, _ in ends)
    said = "".join(text for _, text in ends)
    assert codes == [0, 2], said
    assert "another krony is writing" in said or "exists already" in said
    assert "Traceback" not in said
    assert [p.name for p in Path().iterdir() if "out" in p.name] == [trials.target(name).name]
    trials.remove(trials.target(name))


@pytest.mark.parametrize("name", trials.COMMANDS)
def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing_half_written(name, here):
    """Files can't grow beyond a few kilobytes, as on a disk that is full."""
    code, said = trials.ended(*trials.run(trials.COMMANDS[name].split(), disk=20_000))
    left = [p.name for p in Path().iterdir() if "out" in p.name]
    for path in left:
        trials.remove(Path(path))
    assert code == 2, said
    assert "can't keep unfinished work" in said or "can't write" in said
    assert "Traceback" not in said
    # What failed at once leaves no work: the same command is as quick again.
    assert left == [path for path in trials.RESUMED.get(name, []) if not path.startswith(".")]


def test_a_folder_that_can_not_be_written_is_refused_before_the_work(here, run):
    """In /proc nobody can make anything, not even root."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    for command in ("compress dense", "export small", "quantize small", "heal small"):
        more = trials.HEAL.split() if "heal" in command else []
        code, _, err = run(*command.split(), "/proc/krony-out", *more)
        assert code == 2
        assert "can't write beside /proc/krony-out" in err or "permission denied" in err


def test_runs_hold_no_pickles(here):
    kept = []

    def look(*_: object) -> None:  # after every step
        kept.extend(p.name for p in Path("out.run").rglob("*") if p.is_file())

    model, tokenizer = krony.load("small")
    blocks = load_blocks(["text.txt"], tokenizer, 16)
    config = krony.HealConfig(tokens=512, batch_tokens=64, save_minutes=0)
    krony.heal(model, blocks, config, run=Path("out.run"), evaluation=blocks, progress=look)
    trials.shutil.rmtree("out.run")
    suffixes = {Path(name).suffix for name in kept}
    assert suffixes <= {".json", ".safetensors", ""}
    assert "optimizer.safetensors" in kept


def test_a_process_of_its_own_that_gets_sigterm_says_so_by_its_code(here):
    code = (
        "import os, signal, transformers as t\n"
        "write = t.PreTrainedModel.save_pretrained\n"
        "def then(*a, **k):\n"
        "    write(*a, **k)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "t.PreTrainedModel.save_pretrained = then\n"
        "from krony.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *trials.COMMANDS["compress"].split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in done.stderr
    assert [p.name for p in Path().iterdir() if "out" in p.name] == []
