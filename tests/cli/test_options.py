"""What the commands share: progress without a terminal, sizes, names that are also paths."""

import os

import pytest
import torch

import krony
from krony import KronyError, words
from krony.cli import options
from krony.compression import calibrate, limits, prices
from krony.compression.limits import Candidate, choose
from krony.hf import checkpoints
from krony.maths import fit
from krony.text import data


def test_long_work_says_a_line_a_minute_where_there_is_no_terminal(capsys):
    clock = [1000.0]
    with options.progress_bar(clock=lambda: clock[0]) as bar:
        task = bar.add_task("load", total=None)
        for step in range(7):
            bar.update(task, description="Healing", completed=step, total=100)
            clock[0] += 30
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 3
    assert lines[0].startswith("krony: Healing, 2 of 100, about 49 min left, peak memory ")
    assert lines[2].startswith("krony: Healing, 6 of 100, about 47 min left")


@pytest.mark.parametrize(
    ("size", "found"),
    [(0.6, 600_000), ("60%", 600_000), ("0.6", 600_000), (81_000, 81_000), ("81k", 81_000)],
)
def test_a_size_is_a_share_or_a_number(size, found):
    assert words.parse_size(size, 1_000_000) == found


@pytest.mark.parametrize("size", ["0", "100%", "120%", 1_000_000, "2M", -0.5, "nan", "inf", "half"])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(KronyError, match=r"can't be|is no count"):
        words.parse_size(size, 1_000_000)


def test_a_size_and_nothing_else_makes_a_model_of_that_size(gpt2, monkeypatch):
    # Rough fits and few candidates, for speed.
    monkeypatch.setattr(prices, "LOW_RANK_PARTS", (0.1,))
    monkeypatch.setattr(prices, "PRICING_STEPS", 1)
    monkeypatch.setattr(fit, "STEPS", 2)
    before = sum(p.numel() for p in gpt2.parameters())
    windows = torch.randint(90, (16, 32))
    assert krony.compress(gpt2, size="70%", calibration=windows) is gpt2
    after = sum(p.numel() for p in gpt2.parameters())
    assert 0.6 * before < after <= 0.7 * before
    assert 0 < gpt2.config.quantization_config.provenance["predicted_harm"] < 9


@pytest.mark.parametrize("given", [{}, {"plan": krony.Plan(()), "size": 0.5}])
def test_compress_wants_a_plan_or_a_size(gpt2, given):
    with pytest.raises(KronyError, match="say how small"):
        krony.compress(gpt2, **given)


def test_the_command_says_what_to_give(run, tmp_path):
    code, _, err = run("compress", "demo", tmp_path / "small")
    assert code == 2
    assert "say how small: --size 60%" in err


def test_what_the_solver_prints_is_no_result(monkeypatch, capfd):
    solve = limits.milp

    def loud(*arguments, **options):
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution\n")
        os.write(1, b"of another thread\n")
        return solve(*arguments, **options)

    monkeypatch.setattr(limits, "milp", loud)
    small, large = Candidate((), 1, 1, 1.0), Candidate((), 3, 3, 0.0)
    assert choose([[small, large]], {"parameters": 2}) == [small]
    os.write(1, b"result\n")
    assert capfd.readouterr() == ("of another thread\nresult\n", "")


def test_demo_is_never_a_path_nor_a_path_the_demo_in_silence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KronyError, match="demo is the name of the packaged model"):
        checkpoints.check_destination("demo")
    assert checkpoints.resolve("demo")
    (tmp_path / "demo").mkdir()
    with pytest.raises(KronyError, match=r"write \./demo for the path"):
        checkpoints.resolve("demo")


def test_lambada_is_for_measuring_only():
    with pytest.raises(KronyError, match="lambada is a test set"):
        data.load_text("lambada", "train")


def test_the_folder_of_the_sets_is_named_or_there_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv("KRONY_DATA", raising=False)
    assert data.data_folder() is None
    monkeypatch.setenv("KRONY_DATA", str(tmp_path / "gone"))
    with pytest.raises(KronyError, match="is no folder"):
        data.data_folder()


@pytest.mark.parametrize(
    "budget", [("--budget", "1.5"), ("--size", "80%", "--budget", "0.5"), ("--flops", "nan")]
)
def test_a_budget_that_cannot_be_is_refused_before_a_text_is_written(
    budget, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(calibrate, "calibration_windows", None)  # a call would be a TypeError
    for command in (["plan", "demo"], ["compress", "demo", tmp_path / "x"]):
        code, _, err = run(*command, *budget)
        assert code == 2
        assert "is no share" in err or "not both" in err
    assert list(tmp_path.iterdir()) == []
