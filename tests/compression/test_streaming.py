"""Moments block by block against those of the whole model, and what is left after a stop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import FAMILIES, scaled_logits, tiny
from krony import KronyError, compress
from krony.compression import calibrate, streaming
from krony.compression.budget import make_budget_plan, make_curve
from krony.compression.work import Work, beside
from krony.hf.families import find_targets
from krony.hf.replay import fast_products

WINDOWS = torch.randint(96, (24, 16), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


def names(model, target="all"):
    return [t.name for t in find_targets(model, target)]


def same(left, right):
    assert set(left) == set(right)
    for name, entry in right.items():
        mine = left[name]
        assert torch.equal(mine.inputs.second, entry.inputs.second)
        assert torch.equal(mine.gradient, entry.gradient)
        assert mine.inputs.tokens == mine.tokens == WINDOWS.numel()


@pytest.mark.slow
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "scaled logits"])
def test_block_by_block_they_are_those_of_the_whole_model(family, folder, tmp_path):
    model = scaled_logits() if family == "scaled logits" else tiny(family)
    work = Work.of(model, WINDOWS, 0, tmp_path / "work") if folder else Work()
    found = streaming.collect(model, WINDOWS, names(model), work)
    assert isinstance(found, streaming.Kept)
    same(found, calibrate.calibrate(model, WINDOWS, names(model), batch=8))
    assert all(p.requires_grad for p in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def test_matrices_outside_of_blocks_go_the_whole_way():
    model = tiny("llama")
    wanted = [*names(model), "lm_head"]
    found = streaming.collect(model, WINDOWS, wanted, Work())
    assert "lm_head" in found
    same(found, calibrate.calibrate(model, WINDOWS, wanted, batch=8))


def test_memory_does_not_change_a_byte(tmp_path):
    model = tiny("gpt2")
    held, put_aside = (
        streaming.collect(model, WINDOWS, names(model), work, room=room)
        for work, room in ((Work(), 10**9), (Work(tmp_path), 0))
    )
    same(put_aside, held)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


class Killed(Exception):  # noqa: N818  not an error of ours
    pass


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0, 1, 2, 3, 5, 8])
def test_killed_at_any_moment_the_same_command_goes_on_to_the_same_bytes(moment, tmp_path):
    """Every file that is written is a moment at which a run can end."""
    put, left = Work.put, [moment]

    def dying(self, *arguments):
        if not left[0]:
            raise Killed
        left[0] -= 1
        put(self, *arguments)

    def run(patch=None):
        model = tiny("llama")
        work = Work.of(model, WINDOWS, 0, tmp_path / "work") if patch is not None else Work()
        found = make_budget_plan(model, WINDOWS, share=0.4, work=work, memory=0)
        compress(
            model, found.plan, init="data", calibration=WINDOWS, moments=found.moments, work=work
        )
        return model.state_dict()

    whole = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "put", dying)
        with pytest.raises(Killed):
            run(patch)
    count = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "put", lambda self, *a: (count.append(a[1]), put(self, *a)))
        again = run(patch)
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    assert count.count("moments") == max(0, 2 - _finished(moment))


def _finished(files: int) -> int:
    """Blocks whose moments are among the first files: moments, gradient, moments, ..."""
    return (files >= 1) + (files >= 3)


def test_another_budget_uses_what_is_known_and_another_text_does_not(tmp_path, monkeypatch):
    model = tiny("llama")
    work = Work.of(model, WINDOWS, 0, tmp_path)
    make_budget_plan(model, WINDOWS, share=0.5, objective="throughput", work=work)
    made = []
    put = Work.put
    monkeypatch.setattr(Work, "put", lambda self, *a: (made.append(a[1]), put(self, *a)))
    again = Work.of(model, WINDOWS, 0, tmp_path)
    make_budget_plan(model, WINDOWS, share=0.3, objective="throughput", work=again)
    assert not made
    other = Work.of(model, WINDOWS.flip(0), 0, tmp_path)
    make_budget_plan(model, WINDOWS.flip(0), share=0.3, objective="throughput", work=other)
    assert made.count("moments") == 2


@pytest.mark.slow
def test_a_curve_is_its_points():
    model = tiny("llama")
    curve = make_curve(model, WINDOWS, (0.8, 0.5, 0.2))
    for share, point in zip((0.8, 0.5, 0.2), curve, strict=True):
        alone = make_budget_plan(model, WINDOWS, share=share)
        assert alone.plan == point.plan
        assert alone.harm == point.harm
    assert [p.harm for p in curve] == sorted(p.harm for p in curve)


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(KronyError, match="it goes on from here"):
        Work(file / "work").put({"x": torch.zeros(1)}, "stage")
    assert beside("a/b") == Path("a/.b.work")


def test_a_damaged_file_is_made_again(tmp_path):
    work = Work(tmp_path)
    assert torch.equal(work.once(lambda: {"x": torch.ones(2)}, "stage", 1)["x"], torch.ones(2))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert torch.equal(work.once(lambda: {"x": torch.zeros(2)}, "stage", 1)["x"], torch.zeros(2))
    work.remove()
    assert not tmp_path.exists()


def test_products_are_as_they_were_afterwards():
    before = torch.backends.mkldnn.matmul.fp32_precision
    model = tiny("gpt2")
    model.config.hidden_size = 4096
    with fast_products(model):
        pass
    assert torch.backends.mkldnn.matmul.fp32_precision == before


SCRIPT = """
import sys, torch
from accelerate import PartialState
from helpers import tiny
from krony import compress
from krony.compression.budget import make_budget_plan
PartialState(cpu=True)
windows = torch.randint(96, (24, 16), generator=torch.Generator().manual_seed(1))
model = tiny("llama")
found = make_budget_plan(model, windows, share=0.4, objective="throughput")
compress(model, found.plan, init="data", calibration=windows, moments=found.moments)
if PartialState().is_main_process:
    torch.save(model.state_dict(), sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    where = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    found = []
    for number, start in enumerate(([sys.executable], launch)):
        path = tmp_path / f"{number}.pt"
        command = [*start, str(script), str(path)]
        done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(path, weights_only=True))
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        torch.testing.assert_close(found[1][name], one, rtol=2e-2, atol=2e-3)
