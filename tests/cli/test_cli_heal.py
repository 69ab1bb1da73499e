"""krony heal from the command line: what it writes, what it says, what it refuses."""

import json

import pytest
import torch
import transformers as hf

import krony
from helpers import healing_inputs, logits
from krony.healing.training import Stopped
from krony.text import blocks

SHORT = ["--window", "16", "--tokens", "512", "--batch-tokens", "64", "--eval-every", "128"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return healing_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def heal(inputs, run, tmp_path, monkeypatch):
    """heal("option", …) -> (exit code, out, err); writes to tmp_path / "healed"."""
    monkeypatch.setattr(blocks.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def call(*options: object, data: object = inputs / "text.txt"):
        source, destination = inputs / "small", tmp_path / "healed"
        return run("heal", source, destination, "--data", data, *SHORT, *options)

    return call


def test_the_result_loads_and_says_how_it_was_made(heal, inputs, tmp_path):
    code, out, err = heal("--teacher", inputs / "dense", "--lr", 0.01, "--reconstruct", 5)
    assert code == 0, err
    assert "krony: step 8 of 8: " in err
    assert "step 8" not in out, "evaluations are no results"
    assert code == 0, err
    figures = json.loads((tmp_path / "healed" / "heal.json").read_text())
    assert figures["settings"]["loss"] == "kl+features"
    assert figures["curve"][-1]["tokens"] == 512
    assert figures["best_held_out"] == min(p["held_out"] for p in figures["curve"])
    assert len(figures["reconstruction"]) == 2
    assert f"{figures['best_held_out']:.4f} at best" in out
    assert "transformer.h.0.mlp: error" in out
    picture = (tmp_path / "healed" / "heal.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert not torch.equal(logits(model), logits(krony.load_model(inputs / "small")))
    assert model.config.quantization_config.provenance["healed"]["loss"] == "kl+features"
    assert krony.load_tokenizer(tmp_path / "healed").vocab_size == 4096
    assert not (tmp_path / "healed.run").exists()


def test_it_says_when_it_did_not_help(heal, inputs, tmp_path):
    code, _, err = heal("--teacher", inputs / "dense", "--lr", 3)
    assert code == 0, err
    assert "healing did not help" in err
    before, after = (krony.load_model(p) for p in (inputs / "small", tmp_path / "healed"))
    assert torch.equal(logits(before), logits(after))


def test_data_free_on_text_of_the_teacher(heal, inputs, tmp_path):
    code, _, err = heal("--teacher", inputs / "dense", data="self")
    assert code == 0, err
    assert (tmp_path / "healed" / "model.safetensors").is_file()


def test_half_precision_stays_half_precision(heal, inputs, tmp_path, run):
    by_weights = ["--small", "2x2", "--init", "van-loan", "--dtype", "bfloat16"]
    code, _, err = run("compress", inputs / "dense", inputs / "half", *by_weights)
    assert code == 0, err
    options = ["--data", inputs / "text.txt", *SHORT]
    code, _, err = run("heal", inputs / "half", tmp_path / "healed", *options)
    assert code == 0, err
    assert krony.load_model(tmp_path / "healed").dtype == torch.bfloat16


def test_a_stopped_run_says_how_to_go_on(heal, inputs, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise Stopped("stopped by signal 15 after step 3 of 8", 15)

    monkeypatch.setattr("krony.healing.heal.heal", stop)
    code, _, err = heal()
    assert (code, "stopped by signal 15 after step 3 of 8" in err) == (143, True)
    assert not (tmp_path / "healed").exists()


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        (["--loss", "kl"], None, "the loss kl needs a teacher"),
        (["--loss", "mse"], None, "no loss 'mse'; give ce, kl, features"),
        (["--window", 64], None, "a window of 64 can't be; the model takes 2 to 32"),
        (["--batch-tokens", "1M"], None, "fewer than the 62500 of one step"),
        (["--tokens", "many"], None, "--tokens 'many' is no count"),
        (["--device", "tpu"], None, "--device 'tpu' can't be; give cpu or cuda"),
        ([], "missing.txt", "can't read the text missing.txt: no such file"),
        ([], "self", "--data self is text that the teacher writes"),
        (["--eval-data", "gone.jsonl"], None, "can't read the text gone.jsonl"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    options, data, message, heal, inputs, tmp_path
):
    code, out, err = heal(*options, data=data or inputs / "text.txt")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "healed").exists()
    assert not (tmp_path / "healed.run").exists()
