"""Directories that load where krony is not installed, in plain torch."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from helpers import FAMILIES, healing_inputs, logits, tiny
from krony import Factors, KroneckerLinear, KronyError, compress, load_model, make_plan, runtime
from krony.export.quantize import quantize
from krony.export.self_contained import FILES, self_contained
from krony.hf.families import find_targets
from krony.hf.modeling import KroneckerQuantizer
from krony.hf.plan import Plan, matrix_plan
from krony.runtime import loader

pytestmark = pytest.mark.slow

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
    assert type(model.hf_quantizer).__module__.endswith(".loader")
    print(type(model).__module__.rpartition(".")[2], type(model).__name__)
del sys.modules["krony"], sys.modules["scipy"], sys.modules["triton"]
import krony
assert type(load(sys.argv[1]).hf_quantizer).__module__ == "krony.hf.modeling"
"""


def compressed(family, target="mlp", **changes):
    made = tiny(family, **changes)
    return compress(made, make_plan(made, small=(2, 2), terms=2, target=target), init="van-loan")


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
    made["interpolative"] = compress(tied, Plan(plans), init="van-loan")
    scalars = tiny("gpt2")
    plan = make_plan(scalars, small=(2, 2), scalars=True)
    made["half"] = compress(scalars, plan, init="van-loan").to(torch.bfloat16)
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
        self_contained(model, root / name)
        with pytest.MonkeyPatch.context() as patch:
            # The same code in this process, instead of the kernels.
            patch.setitem(loader.AUTO_QUANTIZER_MAPPING, "kronecker", loader.KroneckerQuantizer)
            plain = hf.AutoModelForCausalLM.from_pretrained(root / name).eval()
        expected[name] = logits(plain), logits(model)
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
    plain, fast = expected[name]
    assert torch.equal(found, plain)
    exact = name != "half"
    torch.testing.assert_close(plain, fast, rtol=0, atol=2e-5 if exact else 0.05)
    assert {p.suffix for p in (root / name).iterdir()} == {".py", ".json", ".safetensors"}


@pytest.mark.parametrize("name", ["interpolative", "int4"])
def test_it_loads_with_krony_imported(name, contained):
    root, expected = contained
    _, wanted = expected[name]
    for folder in (name, f"{name}-again"):
        model = hf.AutoModelForCausalLM.from_pretrained(root / folder, trust_remote_code=True)
        assert type(model).__module__.endswith("modeling_krony")
        assert torch.equal(logits(model.eval()), wanted)
        # krony's own loader, so that krony's functions know the model.
        assert type(model.hf_quantizer) is KroneckerQuantizer
        assert any(isinstance(m, KroneckerLinear) for m in model.modules())
        assert torch.equal(logits(load_model(root / folder)), wanted)
    self_contained(model, root / f"{name}-third")
    plain = load_model(root / f"{name}-third")
    assert torch.equal(logits(plain), wanted)
    plain.save_pretrained(root / f"{name}-plain")
    assert "auto_map" not in json.loads((root / f"{name}-plain" / "config.json").read_text())


def test_the_code_is_what_the_package_itself_imports(contained):
    root, _ = contained
    source = Path(runtime.__file__).parent
    assert {p.name for p in source.glob("*.py")} == {*FILES, "__init__.py"}
    for name in FILES:
        assert (root / "gpt2" / name).read_bytes() == (source / name).read_bytes()
    assert issubclass(KroneckerLinear, runtime.layers.KroneckerLinear)
    assert issubclass(KroneckerQuantizer, loader.KroneckerQuantizer)


@pytest.mark.parametrize("name", FILES)
def test_what_travels_needs_torch_and_transformers_alone(name):
    tree = ast.parse(Path(runtime.__file__).with_name(name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            # One dot and a name: what transformers finds, and copies.
            assert node.level == 1
            assert f"{node.module}.py" in FILES
            continue
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            top = str(module).partition(".")[0]
            assert top in {"torch", "transformers"} | sys.stdlib_module_names, module


def test_what_has_no_code_to_write(tmp_path):
    with pytest.raises(KronyError, match="the model is dense, and needs no code"):
        self_contained(tiny("gpt2"), tmp_path / "out")

    class Own(hf.PreTrainedModel):
        pass

    model = compressed("gpt2")
    model.__class__ = type("Own", (Own,), {"config_class": hf.GPT2Config})
    with pytest.raises(KronyError, match="Own is no class of transformers"):
        self_contained(model, tmp_path / "out")
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
