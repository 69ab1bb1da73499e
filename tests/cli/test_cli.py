"""The command line, end to end on the packaged model; and what it says to bad input."""

import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from helpers import healing_inputs, logits, tiny
from krony import KroneckerLinear, cli, load_tokenizer, save_model

BY_WEIGHTS = ["--init", "van-loan", "--layout", "small-outer"]  # seconds: no text is read


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The packaged model at a quarter."""
    folder = tmp_path_factory.mktemp("compressed") / "out"
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        command = ["krony", "compress", "demo", str(folder), "--shape", "512x128"]
        patch.setattr(sys, "argv", [*command, *BY_WEIGHTS, "--dtype", "float32"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    assert "8 matrices: 2,097,152 parameters become 524,320 (25.0 %)" in said.getvalue()
    return folder


def test_compress_then_from_pretrained_is_bit_equal(compressed):
    import krony

    loaded = hf.AutoModelForCausalLM.from_pretrained(compressed).eval()
    model = krony.load_model("demo")
    krony.compress(model, krony.make_plan(model, shape=(512, 128), terms=1), init="van-loan")
    assert torch.equal(logits(loaded), logits(model.float()))
    assert sum(isinstance(m, KroneckerLinear) for m in loaded.modules()) == 8
    tokenizer = hf.AutoTokenizer.from_pretrained(compressed)
    assert tokenizer("Return the")["input_ids"] == load_tokenizer("demo")("Return the")["input_ids"]
    assert (compressed / "generation_config.json").is_file()


def test_export_dense(compressed, run, tmp_path):
    code, out, err = run("export", compressed, tmp_path / "dense", "--to", "dense")
    assert code == 0, err
    assert "dense, 4,273,664 parameters" in out
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not any(isinstance(m, KroneckerLinear) for m in model.modules())
    factored = hf.AutoModelForCausalLM.from_pretrained(compressed).eval()
    # In float64, so that what differs is the folded weights, not how a CPU adds them up.
    found, wanted = logits(model.double()), logits(factored.double())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    code, _, err = run("export", tmp_path / "dense", tmp_path / "again")
    assert (code, "is a dense model already" in err) == (2, True)


def test_evaluate_against(compressed, run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Return the number of elements in the list, or None if it is empty.\n" * 40)
    record = tmp_path / "record.json"
    code, out, err = run(
        "evaluate",
        "demo",
        "--against",
        compressed,
        "--data",
        text,
        "--window",
        64,
        "--device",
        "cpu",
        "--json",
        record,
    )
    assert code == 0, err
    assert "protocol krony-pt, window 64, stride 64" in out
    results = json.loads(record.read_text())["results"]
    dense, factored = results["demo"], results[str(compressed)]
    assert factored["perplexity"] > dense["perplexity"]
    assert dense["dtype"] == "float32"
    assert {"torch", "date", "cpu"} <= json.loads(record.read_text())["environment"].keys()
    code, out, _ = run("evaluate", "demo", "--data", text, "--window", 64, "--stride", 32)
    assert "protocol sliding" in out


def test_info(compressed, run):
    code, out, _ = run("info", compressed)
    assert code == 0
    assert "factored by van-loan (seed 0)" in out
    assert "1 x 512x128 by 2x2" in out
    assert "36.8 % saved" in out
    code, out, _ = run("info", compressed, "--json")
    figures = json.loads(out)
    assert figures["dense_parameters"] == 4_273_664
    assert figures["parameters"] == 4_273_664 - 2_097_152 + 524_320
    assert figures["bytes"] == 4 * figures["parameters"]
    assert all(0 < row["norm_kept"] < 1 for row in figures["matrices"])
    code, out, _ = run("info", "demo", "--json")
    assert len(json.loads(out)["matrices"]) == 16


def test_plan_file_and_compress_with_it(run, tmp_path):
    plan = tmp_path / "plan.json"
    code, out, _ = run(
        "plan", "demo", "--small", "2x2", "--terms", 2, "--scalars", "--layers", "0,2-3",
        "--json", plan,
    )  # fmt: skip
    assert code == 0
    assert "6 matrices" in out
    code, out, err = run("compress", "demo", tmp_path / "out", "--plan", plan, "--init", "random")
    assert code == 0, err
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    assert not isinstance(model.transformer.h[1].mlp.c_fc, KroneckerLinear)
    assert model.transformer.h[3].mlp.c_fc.groups[0].scalars.shape == (2,)


@pytest.mark.slow
def test_flops_over_a_list_of_targets(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Return the number of elements in the list, or None if it is empty.\n" * 300)
    code, out, err = run(
        "compress", "demo", tmp_path / "out", "--flops", 0.5, "--objective", "throughput",
        "--target", "embedding,*.h.0.mlp.c_fc", "--calibration", text, "--windows", 8,
    )  # fmt: skip
    assert code == 0, err
    assert "What it costs: 2 x low rank" in out
    line = next(line for line in out.splitlines() if line.startswith("multiply-adds a token"))
    share = float(line.split()[-2])
    assert 40 < share <= 50
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.groups[0].small is model.transformer.wte.groups[0].small
    code, out, _ = run("info", tmp_path / "out")
    assert "transformer.wte" in out


def test_generate(compressed, run):
    code, out, _ = run("generate", compressed, "Return the", "--max-new-tokens", 5)
    assert code == 0
    assert out.startswith("Return the")


def test_schemes(run):
    code, out, _ = run("schemes", "--hidden", 3072, "--model", 768)
    assert code == 0
    assert "44 shapes of 3072x768 of full rank" in out
    assert "81,972,576" in out
    code, out, _ = run("schemes", "--json")
    assert json.loads(out)["gpt2"]["92M-4"] == 92_983_488
    code, out, _ = run("schemes", "--hidden", 12, "--model", 8, "--all")
    assert code == 0
    assert "12x1 by 1x8" in out


@pytest.mark.slow
def test_real_gpt2_shapes(run, tmp_path):
    """A random GPT-2 of the real size, by the paper's names."""
    hf.set_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config()).to(torch.bfloat16)
    save_model(model, tmp_path / "gpt2")
    code, out, err = run(
        "compress", tmp_path / "gpt2", tmp_path / "81M", "--scheme", "81M", *BY_WEIGHTS
    )
    assert code == 0, err
    assert "24 matrices" in out
    assert "124,439,808 become 81,972,576" in out


# Bad input: one sentence, exit code 2, no traceback, nothing written.


def damaged(folder, **tensors):
    model = tiny("gpt2")
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


BAD = {
    "unknown model": (["info", "no-such/model"], "can't find a model 'no-such/model'"),
    "no weights": (["info", "{bare}"], "but no *.safetensors weights"),
    "pickle": (["compress", "{pickle}", "{dst}", "--small", "2x2"], "only as a pickle"),
    "shape does not divide": (
        ["compress", "demo", "{dst}", "--shape", "500x128"],
        "500 is no divisor of 1024; the nearest are 128, 256, 512, 1024",
    ),
    "shape is no shape": (["plan", "demo", "--shape", "512"], "write two numbers"),
    "terms beyond the rank": (
        ["compress", "demo", "{dst}", "--shape", "512x128", "--terms", "5"],
        "between 1 and 4 terms",
    ),
    "pattern": (["plan", "demo", "--small", "2x2", "--target", "*.fc9"], "no linear layer of"),
    "layers": (["plan", "demo", "--small", "2x2", "--layers", "7"], "layers go from 0 to 3"),
    "layers are no list": (
        ["plan", "demo", "--small", "2x2", "--layers", "a"],
        "for example 0,2-5",
    ),
    "nothing chosen": (["plan", "demo"], "say how small: --size 60%"),
    "scheme of another size": (["plan", "demo", "--scheme", "81M"], "--small 2x2 --terms 1"),
    "nan": (["compress", "{nan}", "{dst}", "--small", "2x2"], "has 1 NaN or Inf among its 4,096"),
    "empty text": (["evaluate", "demo", "--data", "{empty}"], "is empty"),
    "short text": (["evaluate", "demo", "--data", "{short}"], "fewer than one window of 256"),
    "no such text": (["evaluate", "demo", "--data", "nothing"], "no text 'nothing'"),
    "window": (["evaluate", "demo", "--data", "{short}", "--window", "999"], "takes 2 to 256"),
    "destination exists": (["compress", "demo", "{there}", "--small", "2x2"], "exists already"),
    "destination in a file": (
        ["compress", "demo", "{short}/out", "--small", "2x2"],
        "can't make the folder",
    ),
    "plan and shape": (
        ["compress", "demo", "{dst}", "--plan", "{short}", "--small", "2x2"],
        "not two of them",
    ),
    "budget and shape": (
        ["compress", "demo", "{dst}", "--budget", "0.2", "--small", "2x2"],
        "not two of them",
    ),
    "budget and terms": (
        ["compress", "demo", "{dst}", "--budget", "0.2", "--terms", "3"],
        "finds its own terms",
    ),
    "objective without a budget": (
        ["compress", "demo", "{dst}", "--small", "2x2", "--objective", "decode"],
        "an objective needs a budget",
    ),
    "flops and throughput": (
        [
            "compress",
            "demo",
            "{dst}",
            "--budget",
            "0.2",
            "--flops",
            "0.5",
            "--objective",
            "throughput",
            "--calibration",
            "{long}",
        ],
        "leave out --flops",
    ),
    "embedding that does not divide": (
        ["plan", "demo", "--small", "3x3", "--target", "embedding"],
        "no divisor",
    ),
    "size that is no count": (
        ["compress", "demo", "{dst}", "--params", "few"],
        "write for example 81M",
    ),
    "budget too small": (
        ["compress", "demo", "{dst}", "--params", "1k", "--calibration", "{long}"],
        "a model of 1,000 parameters can't be",
    ),
    "plan is no plan": (
        ["compress", "demo", "{dst}", "--plan", "{short}"],
        "short.txt is not JSON",
    ),
    "no tokenizer": (["generate", "{mute}", "Hello"], "has no tokenizer"),
    "json into nowhere": (
        ["plan", "demo", "--small", "2x2", "--json", "{short}/x.json"],
        "can't write",
    ),
    "quantizing an unknown model": (["quantize", "no/model", "{dst}"], "can't find a model"),
    "quantizing into a place": (["quantize", "demo", "{there}"], "exists already"),
    "quantizing nan": (["quantize", "{nan}", "{dst}"], "h.1.mlp.c_fc.weight of"),
    "self-contained dense": (
        ["export", "demo", "{dst}", "--to", "self-contained"],
        "is a dense model already",
    ),
    "onnx into a place": (["export", "demo", "{there}", "--to", "onnx"], "exists already"),
    "onnx in half precision": (
        ["export", "demo", "{dst}", "--to", "onnx", "--dtype", "bfloat16"],
        "the graph is written in float32",
    ),
    "prune with terms": (
        ["compress", "demo", "{dst}", "--small", "2x2", "--terms", "2", "--init", "prune"],
        "use one term",
    ),
}


@pytest.fixture(scope="module")
def corner(tmp_path_factory):
    """Every broken thing that the commands below are given."""
    root = tmp_path_factory.mktemp("corner")
    for name in ("bare", "pickle"):
        tiny("gpt2").config.save_pretrained(root / name)
    (root / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    weight = torch.zeros(32, 128)
    weight[0, 0] = float(np.nan)
    damaged(root / "nan", **{"transformer.h.1.mlp.c_fc.weight": weight})
    tiny("gpt2").save_pretrained(root / "mute")
    (root / "empty").with_suffix(".txt").write_text(" ")
    (root / "short").with_suffix(".txt").write_text("Too short.")
    (root / "long").with_suffix(".txt").write_text("Return the number of elements. " * 300)
    (root / "there").mkdir()
    places = {"empty": "empty.txt", "short": "short.txt", "long": "long.txt"}
    names = ("bare", "pickle", "nan", "mute", "empty", "short", "long", "there", "dst")
    return {name: str(root / places.get(name, name)) for name in names}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence(what, corner, run):
    arguments, message = BAD[what]
    if "onnx" in what:
        pytest.importorskip("onnx")
    code, out, err = run(*(a.format(**corner) for a in arguments))
    assert code == 2
    assert message in err
    err = err.lstrip("\n")  # where older versions of rich have cleared a bar
    assert err.startswith("krony: ")
    assert err.count("\n") == 1, "one line"
    assert "Traceback" not in err + out
    root = Path(corner["there"]).parent
    assert not (root / "dst").exists()
    assert not [p for p in root.iterdir() if p.name.startswith(".")], "a temporary file was left"


@pytest.mark.slow
def test_in_a_real_process(corner, tmp_path):
    command = [sys.executable, "-m", "krony", "compress", "demo", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--small", "2x2", *BY_WEIGHTS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 matrices: 2,097,152 parameters become 524,320 (25.0 %)" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "krony", "info", corner["pickle"]], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("krony: ")
    assert "Traceback" not in done.stderr


def test_interrupt_leaves_nothing(run, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf.GPT2LMHeadModel, "save_pretrained", stop)
    code, _, _ = run("compress", "demo", tmp_path / "out", "--small", "2x2", *BY_WEIGHTS)
    assert code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_plan_found_for_a_budget_is_what_compress_makes_of_it(run, tmp_path):
    inputs = healing_inputs(tmp_path)
    given = ["--budget", 0.5, "--calibration", inputs / "text.txt", "--windows", 40]
    code, out, err = run("plan", inputs / "dense", *given, "--json", tmp_path / "plan.json")
    assert code == 0, err
    harm = re.search(r"Predicted harm of this plan: ([\d.]+) nats", out)
    assert harm
    code, direct, err = run("compress", inputs / "dense", tmp_path / "direct", *given)
    assert code == 0, err
    assert harm[0] in direct
    assert "narrowed" in direct  # so that the plan alone says that data must choose
    planned = ["--plan", tmp_path / "plan.json", *given[2:]]
    code, _, err = run("compress", inputs / "dense", tmp_path / "planned", *planned)
    assert code == 0, err
    one, two = (tmp_path / name / "model.safetensors" for name in ("direct", "planned"))
    assert one.read_bytes() == two.read_bytes()


def test_plan_takes_a_budget_or_a_shape_not_both(run):
    code, _, err = run("plan", "demo", "--budget", 0.5, "--small", "2x2")
    assert code == 2
    assert "not two of them" in err
