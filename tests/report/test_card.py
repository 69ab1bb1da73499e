"""The model card that is pushed: valid for the Hub, and true of the directory."""

import json
import shutil

import pytest
from huggingface_hub import HfApi, ModelCard

import krony
from helpers import tiny
from krony import KronyError
from krony.report.card import card, push


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "small"
    model = tiny("llama")
    plan = krony.make_plan(model, small=(2, 2))
    krony.save_model(krony.compress(model, plan, init="van-loan"), path)
    return path


def test_a_card_is_read_by_the_hub_and_says_what_was_done(folder):
    again = ModelCard(str(card(folder, "owner/dense", "apache-2.0")))
    assert again.data.base_model == "owner/dense"
    assert again.data.license == "apache-2.0"
    assert again.data.library_name == "transformers"
    assert "6 matrices, factors by van-loan" in again.text
    assert "import krony" in again.text


def test_a_healed_model_says_so(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "healed")
    settings = {"tokens": 9000, "loss": "kl", "recipe": "default", "seed": 3}
    record = {
        "settings": settings, "curve": [{"tokens": 0, "held_out": 4.5}], "best_held_out": 3.25,
        "data": ["corpus.txt"], "environment": {"torch": "2.13"},
    }  # fmt: skip
    (tmp_path / "healed" / "heal.json").write_text(json.dumps(record))
    text = str(card(tmp_path / "healed"))
    assert "9,000 tokens of corpus.txt, loss kl" in text
    assert "4.5000 before, 3.2500 at best" in text
    assert "torch 2.13" in text


def test_a_dry_run_pushes_nothing(folder, run, monkeypatch):
    for name in ("create_repo", "create_commit"):
        monkeypatch.setattr(HfApi, name, lambda *_, **__: pytest.fail("pushed"))
    before = {path.name for path in folder.iterdir()}
    code, out, err = run("push", folder, "owner/small", "--dry-run")
    assert code == 0, err
    assert "model.safetensors" in out
    assert "README.md" in out
    assert {path.name for path in folder.iterdir()} == before


def test_a_push_is_one_commit_of_all_files(folder, monkeypatch):
    done = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **more: done.update(more))

    def commit(self, name, operations, **_):
        done["files"] = {operation.path_in_repo for operation in operations}

    monkeypatch.setattr(HfApi, "create_commit", commit)
    push(folder, "owner/small", card(folder), private=True)
    assert done["private"] is True
    assert done["files"] == {*(p.name for p in folder.iterdir()), "README.md"}


def test_what_can_not_be_pushed_is_said(folder, tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise OSError("403 forbidden")

    monkeypatch.setattr(HfApi, "create_repo", refuses)
    with pytest.raises(KronyError, match="403 forbidden"):
        push(folder, "owner/small", card(folder))
    with pytest.raises(KronyError, match="no model directory"):
        card(tmp_path)
    with pytest.raises(KronyError, match="is no name of the Hub"):
        push(folder, "bad name/x y", card(folder), dry=True)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(KronyError, match="no safetensors file that can be read"):
        card(cut)
