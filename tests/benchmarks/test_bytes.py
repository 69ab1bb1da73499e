"""What two versions wrote, compared: equal files are counted, others are told apart by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

import bytes as same_bytes


def written(folder, tensors, config):
    """One command's output and its hashes, as the program leaves them."""
    (folder / "out").mkdir(parents=True)
    save_file(tensors, folder / "out" / "model.safetensors")
    (folder / "out" / "config.json").write_text(json.dumps(config))
    (folder / "out" / "tokenizer.json").write_text("{}")
    files = {
        f"out/{path.name}": same_bytes.digest(path.read_bytes())
        for path in (folder / "out").iterdir()
    }
    hashes = folder.with_suffix(".json")
    hashes.write_text(json.dumps({"rows": [{"command": "compress", "files": files}]}))
    return hashes


def compared(tmp_path, tensors, config):
    base = {"a": torch.ones(4), "b": torch.arange(6.0)}
    old = written(tmp_path / "old", base, {"version": 1, "inner": {"kept": True}})
    (row,) = same_bytes.compared(written(tmp_path / "new", {**base, **tensors}, config), old)
    return row


def test_equal_files_are_equal(tmp_path):
    row = compared(tmp_path, {}, {"version": 1, "inner": {"kept": True}})
    assert row == {"command": "compress", "equal": 3, "differs": {}}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"b": torch.arange(6.0) * (1 + 1e-3)}, "2 tensors in both, all at most 1.0e-03 apart"),
        ({"c": torch.ones(1)}, "2 tensors in both, 1 new, all equal"),
        ({"b": torch.ones(7)}, "2 tensors in both, 1 of another shape or type, 1 equal"),
    ],
)
def test_tensors_are_compared_by_name(tensors, said, tmp_path):
    row = compared(tmp_path, tensors, {"version": 1, "inner": {"kept": True}})
    assert row["equal"] == 2
    assert row["differs"] == {"out/model.safetensors": said}


def test_keys_of_json_are_compared_by_name(tmp_path):
    row = compared(tmp_path, {}, {"version": 2, "inner": {"renamed": True}})
    assert row["differs"] == {
        "out/config.json": "gone: inner.kept; new: inner.renamed; other: version"
    }


def test_what_fails_is_kept_with_its_sentence(tmp_path):
    row = same_bytes.run("nothing", tmp_path)
    assert row["code"] == 2
    assert "No such command" in row["error"]
    assert list(row["files"]) == ["nothing.stdout"]
