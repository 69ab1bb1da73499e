"""One flipped bit is found, wherever it is; what was not changed is not accused."""

import json
import random
import shutil

import pytest
import torch

import krony
from helpers import tiny
from krony.errors import KronyError
from krony.hf import integrity
from krony.hf.checkpoints import load_model, load_tokenizer, save_model
from krony.hf.integrity import verify


def small(**options):
    model = tiny("llama")
    return krony.compress(model, krony.make_plan(model, small=(2, 2), **options), init="van-loan")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("integrity") / "model"
    return save_model(small(), folder, load_tokenizer("demo"))


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def header_bytes(path):
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("seed", range(6))
def test_one_flipped_bit_is_found_in_every_file(seed, saved, tmp_path, run):
    chosen = random.Random(seed)
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    names = sorted(p.name for p in folder.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        *names
    }
    for name in names:
        path = folder / name
        for _ in range(3):
            bit = chosen.randrange(8 * path.stat().st_size)
            flip(path, bit)
            with pytest.raises(KronyError):
                verify(folder)
            flip(path, bit)
    code, out, _ = run("verify", folder)
    assert code == 0
    assert "is what krony wrote" in out


@pytest.mark.parametrize("where", ["first", "last", "header"])
def test_the_ends_of_a_file_count_too(where, saved, tmp_path, run):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    path = folder / "model.safetensors"
    start, size = header_bytes(path), path.stat().st_size
    flip(path, 8 * {"first": start, "last": size - 1, "header": start // 2}[where])
    code, _, err = run("verify", folder)
    assert code == 2
    assert "is not what krony wrote" in err or "is no whole safetensors file" in err


def test_the_tensor_is_named_and_a_damaged_factor_does_not_load(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(header_bytes(path))[8:])
    name = "model.layers.1.mlp.up_proj.groups.0.large.weight"
    flip(path, 8 * (header_bytes(path) + header[name]["data_offsets"][0]))
    for judge in (verify, load_model):
        with pytest.raises(KronyError, match=f"the tensor {name} in .* is not what krony wrote"):
            judge(folder)


def test_large_models_are_left_to_verify(saved, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    path = folder / "model.safetensors"
    flip(path, 8 * (path.stat().st_size - 4))  # a low bit of a number that may be anything
    monkeypatch.setattr(integrity, "MOST", path.stat().st_size - 1)
    load_model(folder)
    with pytest.raises(KronyError, match="is not what krony wrote"):
        verify(folder)


def test_what_is_missing_or_swapped_is_found(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(KronyError, match=r"tokenizer\.json in .* is not what krony wrote"):
        verify(folder)
    shutil.copy(saved / "tokenizer.json", folder)
    model = load_model(saved)
    first, second = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in (0, 1))
    first.groups[0].large.weight, second.groups[0].large.weight = (
        second.groups[0].large.weight,
        first.groups[0].large.weight,
    )
    save_model(model, tmp_path / "swapped")
    shutil.copy(tmp_path / "swapped" / "model.safetensors", folder)
    with pytest.raises(KronyError, match="and so are 1 more"):
        verify(folder)


FORMS = {
    "half": lambda: small().to(torch.bfloat16),
    "everything": lambda: small(target="everything"),
    "int8": lambda: krony.quantize(small(), "int8"),
    "int4": lambda: krony.quantize(small(), "int4"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_verified_and_loads_in_every_dtype(form, tmp_path):
    if form.startswith("int"):
        pytest.importorskip("torchao")
    save_model(FORMS[form](), tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    found = verify(tmp_path / "model")
    assert found.tensors > 10
    for dtype in (None, torch.float32, torch.bfloat16):
        model = load_model(tmp_path / "model", dtype)
    save_model(model, tmp_path / "again")  # not the sums of the first, which differ now
    verify(tmp_path / "again")


def test_what_others_write_has_no_stale_sums_and_loads(saved, tmp_path):
    model = load_model(saved)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    model.save_pretrained(tmp_path / "model")
    load_model(tmp_path / "model")
    with pytest.raises(KronyError, match="has no checksums"):
        verify(tmp_path / "model")


def test_a_dense_model_has_no_sums_and_says_so(tmp_path, run):
    save_model(tiny("llama"), tmp_path / "dense")
    code, _, err = run("verify", tmp_path / "dense")
    assert code == 2
    assert "has no checksums" in err


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000, "[]", '{"quantization_config": {"checksums": {"algorithm": "xxh3_64", '
        '"tensors": {}, "files": {}}, "plan": {}}}',
    ],
)  # fmt: skip
def test_a_configuration_that_lies_is_refused(saved, tmp_path, run, text):
    shutil.copytree(saved, tmp_path / "it")
    (tmp_path / "it" / "config.json").write_text(text)
    assert run("verify", tmp_path / "it")[0] == 2


@pytest.mark.parametrize("header", [b"[]", b"[" * 200_000, b'{"x": 3}', b"{", b'{"x": {"a": 1}}'])
def test_a_header_that_lies_is_refused(saved, tmp_path, run, header):
    shutil.copytree(saved, tmp_path / "it")
    content = len(header).to_bytes(8, "little") + header
    (tmp_path / "it" / "model.safetensors").write_bytes(content)
    assert run("verify", tmp_path / "it")[0] == 2


def test_sums_do_not_lead_out_of_the_directory(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("../other", "/etc/hostname"):
        config["quantization_config"]["checksums"]["files"] = {name: "0" * 16}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(KronyError, match="name files outside of"):
            verify(folder)
