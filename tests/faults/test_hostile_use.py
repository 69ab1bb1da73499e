"""What people do by accident, with tiny models: refused in a sentence, nothing of theirs lost."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import krony
from helpers import healing_inputs
from krony import KronyError

UP = "transformer.h.0.mlp.c_fc.weight"
SHORT = ["--tokens", "512", "--batch-tokens", "64", "--window", "16", "--dtype", "float32"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return healing_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def damaged(inputs, tmp_path):
    """damaged("dense", change): a copy whose tensors `change` has had."""

    def call(name, change):
        folder = tmp_path / f"damaged-{name}"
        shutil.copytree(inputs / name, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return call


def not_a_number(tensors):
    tensors[next(name for name in tensors if "mlp" in name)].view(-1)[0] = float("nan")


def one_less(tensors):
    del tensors[next(name for name in tensors if "mlp" in name)]


@pytest.mark.parametrize("name", ["dense", "small"])
@pytest.mark.parametrize("change", [not_a_number, one_less])
@pytest.mark.parametrize(
    "command",
    [
        "info {}", "push {} a/b --dry-run", "evaluate {} --data text.txt", "quantize {} out",
        "export {} out --to onnx", "export {} out.gguf --to gguf",
        "heal {} out --data text.txt --tokens 512",
        "compare {} -o out --budget 0.5 --data text.txt --methods svd",
        "compress {} out --structure plain --budget 0.5",
    ],
)  # fmt: skip
def test_no_command_takes_a_damaged_model(
    inputs, damaged, run, tmp_path, monkeypatch, name, change, command
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(inputs / "text.txt", "text.txt")
    folder = damaged(name, change)
    code, _, err = run(*command.format(folder).split())
    said = " ".join(err.split())
    assert code == 2, said
    assert any(word in said for word in ("NaN", "lacks", "not what krony wrote")), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["dense", "small"])
def test_a_report_reads_what_it_reports_on(inputs, damaged, run, tmp_path, name):
    folder = damaged(name, not_a_number)
    code, _, err = run("report", folder, "-o", tmp_path / "page.html")
    assert (code, "NaN or Inf" in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "page.html").exists()


def test_what_a_program_packed_is_not_taken_for_weights(damaged, run):
    def packed(tensors):
        tensors[UP] = (tensors[UP] * 100).to(torch.int8)

    code, _, err = run("info", damaged("dense", packed))
    assert (code, "stored as whole numbers (I8)" in " ".join(err.split())) == (2, True)


def test_scales_of_quantized_weights_are_numbers(damaged, inputs, tmp_path):
    pytest.importorskip("torchao")
    krony.save(krony.quantize(krony.load_model(inputs / "dense")), tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    tensors[next(n for n in tensors if n.endswith(".scale"))].view(-1)[0] = float("inf")
    save_file(tensors, tmp_path / "int8" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KronyError, match=r"scale.* has 1 NaN or Inf|not what krony wrote"):
        krony.load_model(tmp_path / "int8")


@pytest.mark.parametrize("content", [b"GGUF junk", b""])
def test_a_gguf_file_is_said_to_be_one(run, tmp_path, content):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    for command in (["report", path, "-o", tmp_path / "p.html"], ["push", path, "a/b"]):
        code, _, err = run(*command)
        assert (code, "is a GGUF file" in " ".join(err.split())) == (2, True)


@pytest.mark.parametrize(
    "command",
    [
        "report {dense} -o {file}",
        "evaluate {dense} --data {text} --json {file}",
        "plan {dense} --small 2x2 --json {file}",
        "bench {dense} --json {file}",
    ],
)
def test_a_file_of_somebody_else_stays(inputs, run, tmp_path, command):
    mine = tmp_path / "mine"
    mine.write_text('{"architectures": ["mine"]}')
    given = {"dense": inputs / "dense", "text": inputs / "text.txt", "file": mine}
    for place, said in ((mine, "exists and is not what"), (tmp_path, "is a folder")):
        code, _, err = run(*command.format(**{**given, "file": place}).split())
        assert (code, said in " ".join(err.split())) == (2, True), err
    assert mine.read_text() == '{"architectures": ["mine"]}'
    if "/proc" in command or "bench" in command:
        return
    for _ in range(2):  # its own is made anew
        code, _, err = run(*command.format(**{**given, "file": tmp_path / "own"}).split())
        assert code == 0, err


@pytest.mark.parametrize(
    ("section", "value"),
    [("krony", 3), ("krony", {"texts": 5}), ("krony", {"texts": [3]}), ("plan", {"texts": [3]})],
)
def test_what_is_said_of_a_model_has_a_form(inputs, run, tmp_path, section, value):
    folder = tmp_path / "model"
    shutil.copytree(inputs / ("small" if section == "plan" else "dense"), folder)
    config = json.loads((folder / "config.json").read_text())
    if section == "plan":
        config["quantization_config"]["provenance"] = value
    else:
        config[section] = value
    (folder / "config.json").write_text(json.dumps(config))
    for command in ("info {}", "report {} -o {}.html", "push {} a/b --dry-run"):
        code, _, err = run(*command.format(folder, folder).split())
        assert (code, "must be" in " ".join(err.split())) == (2, True), err


@pytest.mark.parametrize(
    "option",
    [
        "--lr -1", "--lr 0", "--lr nan", "--batch-tokens 0", "--eval-every 0", "--window 0",
        "--save-minutes nan", "--temperature 0", "--seed -1", "--tokens 0",
    ],
)  # fmt: skip
def test_numbers_of_healing_that_can_not_be(inputs, run, tmp_path, option):
    """Zero is none of them: it is not what is taken where nothing is given."""
    command = ["heal", inputs / "small", tmp_path / "h", "--data", inputs / "text.txt", *SHORT]
    code, _, _ = run(*command, *option.split())
    assert code == 2
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_temperature_is_a_number(inputs, run):
    assert run("generate", inputs / "dense", "the", "--temperature", "nan")[0] == 2


@pytest.mark.parametrize("name", ["self", "python-docstrings", "python-docs"])
def test_a_known_text_never_hides_a_path(inputs, run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("mine")
    code, _, err = run("compress", inputs / "dense", "out", "--small", "2x2", "--calibration", name)
    assert (code, "also a path here" in " ".join(err.split())) == (2, True), err


def test_a_push_takes_folders_inside_along(inputs, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    from krony.report.card import card, push

    folder = tmp_path / "model"
    shutil.copytree(inputs / "small", folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").touch()
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("pushed"))
    sizes = push(folder, "a/b", card(folder), dry=True)
    assert "additional_chat_templates/tool.jinja" in sizes
    assert not any(".cache" in name for name in sizes)
