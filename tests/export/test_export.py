"""Models for where krony is not installed: self-contained directories, and ONNX graphs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from helpers import FAMILIES, healing_inputs, logits, tiny
from krony import (
    Factors,
    KroneckerGroup,
    KroneckerLinear,
    KronyError,
    compress,
    load_model,
    make_plan,
)
from krony.export import export
from krony.export.quantize import quantize
from krony.hf.families import find_targets
from krony.hf.modeling import KroneckerQuantizer
from krony.hf.plan import Plan, matrix_plan

# A process without krony, scipy and Triton. It loads every directory, runs it, saves it, loads that
# again; without trust it stops instead of loading noise; krony, imported at last, takes over.
PROCESS = """
import sys
sys.modules["krony"] = sys.modules["scipy"] = sys.modules["triton"] = None
import torch, transformers as hf
hf.logging.disable_progress_bar()
ids = torch.arange(24).reshape(2, 12) % 90

def load(folder, trust=True):
    found = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    return found.eval()

try:
    load(sys.argv[1], trust=False)
except RuntimeError as error:
    assert "mismatch" in str(error)
else:
    raise SystemExit("it loaded noise")
for folder in sys.argv[1:]:
    model = load(folder)
    with torch.inference_mode():
        found = model(input_ids=ids).logits
    torch.save(found, folder + ".pt")
    assert model.generate(ids[:, :3], max_new_tokens=4, min_new_tokens=4).shape == (2, 7)
    model.save_pretrained(folder + "-again")
    with torch.inference_mode():
        assert torch.equal(load(folder + "-again")(input_ids=ids).logits, found)
    assert type(model.hf_quantizer).__module__.endswith(".krony_hf_modeling")
    print(type(model).__module__.rpartition(".")[2], type(model).__name__)
del sys.modules["krony"], sys.modules["scipy"], sys.modules["triton"]
import krony
assert type(load(sys.argv[1]).hf_quantizer).__module__ == "krony.hf.modeling"
"""


def compressed(family, target="mlp", **changes):
    made = tiny(family, **changes)
    return compress(made, make_plan(made, small=(2, 2), terms=2, target=target))


def variants():
    """Name to model: every family, and every form that a checkpoint can have."""
    made = {family: compressed(family, "all") for family in FAMILIES}
    made["tied"] = compressed("gpt2", "everything")
    made["untied"] = compressed("llama", "everything")
    tied = tiny("llama", tie_word_embeddings=True)
    low_rank = Factors((96, 1), (1, 32), 8, interpolative=True)
    matrix = Factors((16, 4), (3, 8), 5, "large-outer", interpolative=True)
    plans = (
        matrix_plan(find_targets(tied, "embedding")[0], (low_rank,)),
        matrix_plan(find_targets(tied, "mlp")[0], (matrix,)),
    )
    made["interpolative"] = compress(tied, Plan(plans))
    scalars = tiny("gpt2")
    plan = make_plan(scalars, small=(2, 2), scalars=True)
    made["half"] = compress(scalars, plan).to(torch.bfloat16)
    made["int4"] = quantize(compressed("gpt2"), "int4")
    fewer = tiny("phi3")  # gate and up fused, half of the hidden units gone
    units = tuple(matrix_plan(t.narrowed(24), ()) for t in find_targets(fewer, "mlp"))
    windows = torch.arange(96).view(6, 16)
    made["narrowed"] = compress(fewer, Plan(units), init="data", calibration=windows)
    return made


@pytest.fixture(scope="module")
def contained(tmp_path_factory):
    """Directories of all variants, and their logits."""
    root, expected, classes = tmp_path_factory.mktemp("contained"), {}, []
    for name, model in variants().items():
        export.self_contained(model, root / name)
        with pytest.MonkeyPatch.context() as patch:
            # What such a directory does without (layers.py), and what rounds in another way.
            patch.setattr(KroneckerGroup, "fused", None)
            expected[name] = logits(model)
        classes.append(f"modeling_krony {type(model).__name__}")
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *(str(root / name) for name in expected)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == classes
    return root, expected


@pytest.mark.parametrize(
    "name", [*FAMILIES, "tied", "untied", "interpolative", "half", "int4", "narrowed"]
)
def test_it_runs_where_krony_is_not_installed(name, contained):
    root, expected = contained
    found = torch.load(root / f"{name}.pt", weights_only=True)
    assert torch.equal(found, expected[name])
    assert {p.suffix for p in (root / name).iterdir()} == {".py", ".json", ".safetensors"}


@pytest.mark.parametrize("name", ["interpolative", "int4"])
def test_it_loads_with_krony_imported(name, contained):
    root, expected = contained
    for folder in (name, f"{name}-again"):
        model = hf.AutoModelForCausalLM.from_pretrained(root / folder, trust_remote_code=True)
        assert type(model).__module__.endswith("modeling_krony")
        assert torch.equal(logits(model.eval()), expected[name])
        # krony's own loader, so that krony's functions know the model.
        assert type(model.hf_quantizer) is KroneckerQuantizer
        assert any(isinstance(m, KroneckerLinear) for m in model.modules())
        assert torch.equal(logits(load_model(root / folder)), expected[name])
    export.self_contained(model, root / f"{name}-third")
    plain = load_model(root / f"{name}-third")
    assert torch.equal(logits(plain), expected[name])
    plain.save_pretrained(root / f"{name}-plain")
    assert "auto_map" not in json.loads((root / f"{name}-plain" / "config.json").read_text())


def test_the_code_is_the_package_s_own():
    modules = export._needed("hf.modeling")
    assert {"maths.kron", "nn.layers", "hf.modeling", "nn.packing", "hf.plan", "errors"} <= modules
    assert not {"cli.app", "healing.heal", "maths.fit", "hf.checkpoints"} & modules
    for module in modules:
        code = export._detached(module)
        compile(code, module, "exec")
        assert "from krony" not in code
        assert "import krony" not in code.replace("from . import krony_", "")


def test_what_has_no_code_to_write(tmp_path):
    with pytest.raises(KronyError, match="the model is dense, and needs no code"):
        export.self_contained(tiny("gpt2"), tmp_path / "out")

    class Own(hf.PreTrainedModel):
        pass

    model = compressed("gpt2")
    model.__class__ = type("Own", (Own,), {"config_class": hf.GPT2Config})
    with pytest.raises(KronyError, match="Own is no class of transformers"):
        export.self_contained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ONNX.


def test_no_token_count_is_fixed_in_an_exported_graph():
    """The factors of many terms, which a long batch would make one matrix of in eager mode."""
    layer = KroneckerLinear(
        32,
        32,
        [compressed("gpt2").transformer.h[0].mlp.c_fc.groups[0].__class__((8, 8), (4, 4), 9)],
    ).requires_grad_(False)
    assert layer.groups[0].forms_dense(10_000)
    batch, length = torch.export.Dim("batch", max=4096), torch.export.Dim("length", max=4096)
    program = torch.export.export(
        layer, (torch.randn(2, 600, 32),), dynamic_shapes=({0: batch, 1: length},)
    )
    for shape in ((1, 1), (3, 5), (2, 2000)):
        x = torch.randn(*shape, 32)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)
    assert layer.groups[0].forms_dense(10_000), "eager mode is as it was"


def test_onnx(run, tmp_path):
    """One export, the only one that is fast enough for a test; checked on other shapes."""
    inputs = healing_inputs(tmp_path)
    code, out, err = run("export", inputs / "small", inputs / "onnx", "--to", "onnx")
    assert code == 0, err
    assert "logits in onnxruntime and torch differ by" in out
    names = {p.name for p in (inputs / "onnx").iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= names
    import onnx
    import onnxruntime

    stored = onnx.load(inputs / "onnx" / "model.onnx")
    model = load_model(inputs / "small")
    sizes = sum(torch.Size(i.dims).numel() for i in stored.graph.initializer)
    assert sizes < 1.1 * model.num_parameters(), "the factors stay apart, tied weights one"
    session = onnxruntime.InferenceSession(inputs / "onnx" / "model.onnx")
    cached = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    given = ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in cached)]
    assert [i.name for i in session.get_inputs()] == given
    assert [i.name for i in session.get_outputs()] == ["logits", *(f"present.{n}" for n in cached)]
    for shape in ((1, 1), (1, 32), (5, 7)):
        ids = torch.randint(4096, shape)
        nothing = torch.zeros(shape[0], 2, 0, 8)
        feed = dict(zip(given, [ids, torch.ones_like(ids), *[nothing] * 4], strict=True))
        found, *_ = session.run(None, {name: x.numpy() for name, x in feed.items()})
        with torch.inference_mode():
            expected = model(input_ids=ids).logits
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    # The loop of docs/export.md, on a batch padded on the left, against transformers' own.
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    scope: dict = {}
    exec(re.search(r"```python\n(import numpy.*?)```", text, re.DOTALL)[1], scope)
    ids, mask = torch.randint(1, 4096, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    wanted = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    made = scope["generate"](session, ids.numpy(), mask.numpy(), 12)
    assert made.tolist() == wanted.tolist()


class Wrong:
    """A program that is not the model: its logits are all zero."""

    def save(self, path, **_):
        path.write_bytes(b"")


def test_an_onnx_graph_that_differs_is_not_written(monkeypatch, tmp_path):
    import onnxruntime

    class Session:
        def __init__(self, *_, **__):
            pass

        def run(self, _, feed):
            cached = [x for name, x in feed.items() if name.startswith("past")]
            return [torch.zeros(*feed["input_ids"].shape, 96).numpy(), *cached]

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Wrong())
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    model = compressed("gpt2")
    attention = model.config._attn_implementation
    with pytest.raises(KronyError, match=r"differ by .* on 2 x 12 tokens, and 1\.0e-04 is allowed"):
        export.onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert model.config._attn_implementation == attention


def test_what_onnx_refuses(monkeypatch, tmp_path):
    with pytest.raises(KronyError, match=r"in torch\.bfloat16; load it in float32"):
        export.onnx(compressed("gpt2").to(torch.bfloat16), tmp_path / "out")
    with pytest.raises(KronyError, match="quantised to int8, for which ONNX has other forms"):
        export.onnx(quantize(compressed("gpt2"), "int8"), tmp_path / "out")

    def fails(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("no such operation\nand more")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(KronyError, match="can't export this GPT2LMHeadModel to ONNX: no such oper"):
        export.onnx(compressed("gpt2"), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(KronyError, match=r"needs onnxruntime; install it with pip .*krony\[onnx\]"):
        export.onnx(compressed("gpt2"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_self_contained_from_the_command_line(run, tmp_path):
    inputs = healing_inputs(tmp_path)
    there = inputs / "contained"
    code, out, err = run("export", inputs / "small", there, "--to", "self-contained")
    assert code == 0, err
    assert "self-contained" in out
    config = json.loads((there / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_krony.GPT2LMHeadModel"}
    assert (there / "tokenizer.json").is_file()
    assert run("info", there)[0] == 0
    code, _, err = run("export", inputs / "dense", inputs / "dst", "--to", "self-contained")
    assert (code, "is a dense model already" in err) == (2, True)
    code, _, err = run("export", inputs / "small", inputs / "dst", "--to", "onnx", "--dtype",
                       "float16")  # fmt: skip
    assert (code, "load it in float32" in err) == (2, True)
    assert not (inputs / "dst").exists()
