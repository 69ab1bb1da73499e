"""What failed after more than a minute says what was kept, and how to go on; by a clock of ours."""

import sys

import pytest

from helpers import healing_inputs
from krony.cli import main
from krony.cli.kept import NOTHING, run, work
from krony.healing.training import COMPLETE
from krony.text import data

SHORT = ["--window", "16", "--tokens", "512", "--batch-tokens", "64"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return healing_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def after(capsys, monkeypatch):
    """after(seconds, "command", ...) -> (exit code, out, err) of a command that takes so long."""

    def call(seconds: float, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["krony", *map(str, arguments)])
        times = iter([0.0])
        with pytest.raises(SystemExit) as stop:
            main(clock=lambda: next(times, seconds))
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


def test_a_compression_goes_on_from_its_work(after, inputs, tmp_path):
    # The text is written before the planner finds that the size can't be.
    command = ["compress", inputs / "dense", tmp_path / "out", "--params", "1k", "--windows", "2"]
    code, out, err = after(700, *command)
    assert (code, out) == (2, "")
    first, last = err.splitlines()[-2:]
    assert "can't be" in first
    assert last.startswith("krony: after 12 minutes: what is finished is kept in ")
    assert f"{tmp_path / '.out.work'} (0 MB): the same command goes on from there" in last
    code, _, err = after(59, *command)
    assert (code, "kept" in err) == (2, False), "sooner it says nothing"
    assert (tmp_path / ".out.work").is_dir(), "but what took longer stays"
    command[2] = tmp_path / "soon"
    after(59, *command)
    assert not (tmp_path / ".soon.work").exists(), "and what did not goes"


def test_a_plan_is_kept_beside_its_file_or_says_that_it_would_be(after, inputs, tmp_path):
    command = ["plan", inputs / "dense", "--params", "1k", "--windows", "2"]
    assert "nothing was kept: with --json FILE" in after(61, *command)[2]
    _, _, err = after(61, *command, "--json", tmp_path / "plan.json")
    assert f"after 1 minute: what is finished is kept in {tmp_path / '.plan.json.work'}" in err


def test_healing_names_its_run_and_its_last_checkpoint(after, inputs, tmp_path):
    source, folder = inputs / "small", tmp_path / "healed.run"
    command = ["heal", source, tmp_path / "healed", "--data", inputs / "text.txt", *SHORT]
    folder.mkdir()
    _, _, err = after(90, *command)  # there is an unfinished run: refused
    assert f"{folder} has no checkpoint yet" in err
    for step in (3, 12):
        checkpoint = folder / "stage-0" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / COMPLETE).touch()
    (folder / "stage-0" / "checkpoint-20").mkdir()  # a kill left it half-written
    _, _, err = after(90, *command)
    assert f"{folder} keeps everything up to step 12: the same command with --resume" in err


def test_other_commands_begin_again(after, inputs):
    _, _, err = after(90, "evaluate", inputs / "dense", "--data", "nothing.txt")
    assert err.splitlines()[-1] == f"krony: after 2 minutes: {NOTHING}"


def test_what_did_not_fail_says_nothing(after, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["krony", "schemes", "--json"])
    times = iter([0.0])
    with pytest.raises(SystemExit) as stop:
        main(clock=lambda: next(times, 900.0))
    assert not stop.value.code
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_and_a_crash_say_it_too(kind, inputs, monkeypatch, capsys):
    def load(*_: object) -> None:
        raise kind("stopped")

    monkeypatch.setitem(data.TEXTS, "python-docs", load)
    command = ["krony", "evaluate", str(inputs / "dense"), "--data", "python-docs"]
    monkeypatch.setattr(sys, "argv", command)
    times = iter([0.0])
    with pytest.raises((SystemExit, RuntimeError)):
        main(clock=lambda: next(times, 100.0))
    assert f"krony: after 2 minutes: {NOTHING}" in capsys.readouterr().err


def test_nothing_there_is_nothing_kept(tmp_path):
    assert work(tmp_path / "none")() is None
    assert run(tmp_path / "none")() is None
    (tmp_path / "empty").mkdir()
    assert work(tmp_path / "empty")() is None
