"""krony compress --structure plain: an ordinary directory, and what can't be asked of it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import krony
from helpers import healing_inputs
from krony.cli.app import app
from krony.healing.objective import Objective
from krony.hf.smaller import Kept, anatomy, smaller


def command(*arguments: object) -> None:
    """The command in this process; what it refuses is raised."""
    app([str(a) for a in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = healing_inputs(tmp_path_factory.mktemp("plain"))
    command(
        "compress", folder / "dense", folder / "plain", "--structure", "plain", "--budget", "0.6",
        "--calibration", folder / "text.txt", "--windows", "16",
    )  # fmt: skip
    return folder


def test_it_is_an_ordinary_directory(made):
    before, now = (json.loads((made / d / "config.json").read_text()) for d in ("dense", "plain"))
    assert (now["n_inner"] or 64) < 64 or now["n_layer"] < before["n_layer"]
    assert now["krony"]["texts"][0]["use"] == "calibration"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (made / "plain" / name).read_bytes() == (made / "dense" / name).read_bytes()
    assert not list(made.glob(".plain*")), "finished work stays behind"


@pytest.mark.slow
def test_it_loads_where_krony_is_not(made):
    with torch.inference_mode():
        wanted = krony.load_model(made / "plain")(torch.arange(8)[None]).logits
    torch.save(wanted, made / "wanted.pt")
    code = f"""
import sys, torch, transformers
sys.modules["krony"] = None
model = transformers.AutoModelForCausalLM.from_pretrained({str(made / "plain")!r})
found = model(torch.arange(8)[None]).logits
torch.testing.assert_close(found, torch.load({str(made / "wanted.pt")!r}), rtol=1e-4, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_heals_towards_the_blocks_that_it_stands_for(made):
    teacher, model = krony.load_model(made / "dense"), krony.load_model(made / "plain")
    objective = Objective(model, ("kl", "features"), teacher)
    model.train()
    loss = objective(model, torch.arange(64).reshape(2, 32))["loss"]
    loss.backward()
    assert loss.isfinite()
    body = anatomy(teacher)
    gone = smaller(teacher, body, replace(body.sizes, blocks=1), {0: Kept()})
    gone.config.krony = {"blocks": [0]}
    (end,) = Objective(gone, ("features",), teacher).teacher_layers.values()
    assert end is teacher.transformer.h[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "0.5", "--terms", "2"], "--terms: for factors"),
        (["--shape", "8x8"], "--shape: for factors"),
        ([], "say how small"),
        (
            ["--budget", "0.5", "--objective", "decode"],
            "--flops, --objective and --sums: for factors",
        ),
        (["--budget", "0.5", "--target", "embedding"], "can lose all, mlp, attention"),
        (["--budget", "1.5"], "is no share"),
        (["--budget", "0.5", "--windows", "0"], "0 calibration windows can't be"),
    ],
)
def test_what_it_refuses(made, options, words):
    with pytest.raises(krony.KronyError, match=words):
        command("compress", made / "dense", made / "no", "--structure", "plain", *options)
    assert not (made / "no").exists()
