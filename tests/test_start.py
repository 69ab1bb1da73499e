"""What an import and a command load: modules are counted, not seconds."""

import importlib
import json
import pickle
import subprocess
import sys
from typing import get_args

import pytest

import krony
from krony import moved, words
from krony.compression import factorise, limits
from krony.healing import recipe
from krony.hf import checkpoints, families
from krony.maths import shapes
from krony.nn import packing
from krony.text import data, tokens

COMMANDS = ["plan", "compress", "heal", "evaluate", "bench", "export", "quantize", "generate"]


def loaded(code: str) -> set[str]:
    """The packages in a fresh process after that code, krony's modules in full."""
    code += "\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout.splitlines()[-1])
    return {n if n.startswith("krony.") else n.split(".")[0] for n in names}


def command(*arguments: str) -> str:
    """The code of a command line."""
    return f"""import sys
sys.argv = ["krony", *{arguments!r}]
from krony.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code"""


HEAVY = {"torch", "transformers", "numpy", "scipy", "datasets", "accelerate", "matplotlib"}


def test_the_import_loads_neither_torch_nor_transformers():
    found = loaded("import krony")
    assert not found & HEAVY
    assert {name for name in found if name.startswith("krony.")} == {
        "krony.errors",
        "krony.heal",  # the modules of 0.1, nothing in them yet
        "krony.quantize",
        "krony.hf",
        "krony.hf.register",
        "krony.moved",
    }


def test_help_and_schemes_load_neither_torch_nor_transformers():
    """One after the other in one process, which says with which of them something came."""
    lines = [["--help"], ["schemes"], *([name, "--help"] for name in COMMANDS)]
    seen = "assert not {heavy!r} & set(sys.modules), {line!r}"
    code = "\n".join(command(*line) + "\n" + seen.format(heavy=HEAVY, line=line) for line in lines)
    assert not loaded(code) & HEAVY


@pytest.mark.slow
def test_info_loads_nothing_heavy_beyond_torch_and_transformers():
    # What every command needs that loads a model: part of transformers brings more, by what else
    # is installed (torchao brings torch._dynamo).
    loaded(f"""import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
import transformers.models.gpt2.modeling_gpt2
before = set(sys.modules)
{command("info", "demo")}
found = set(sys.modules) - before
heavy = ("scipy", "datasets", "accelerate", "matplotlib", "pandas", "triton", "torch", "torchao")
assert not [name for name in found if name.startswith(heavy)], sorted(found)""")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A factored model, and one of its modules in a pickle."""
    folder = tmp_path_factory.mktemp("small")
    model = krony.load_model("demo")
    krony.compress(model, krony.make_plan(model, small=(2, 2), layers=[0]), init="van-loan")
    (folder / "group.pickle").write_bytes(pickle.dumps(krony.KroneckerGroup((4, 4), (2, 2))))
    return krony.save_model(model, folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "import krony",
        "import transformers.quantizers.auto, krony",
        # A worker gets a module, and with it krony, without ever importing it by name.
        "import pickle; pickle.load(open('../group.pickle', 'rb'))",
    ],
)
def test_the_loader_is_registered_whichever_is_imported_first(before, small, monkeypatch):
    monkeypatch.chdir(small)
    loaded(f"""{before}
from transformers import AutoModelForCausalLM
layer = AutoModelForCausalLM.from_pretrained(".").transformer.h[0].mlp.c_fc
assert type(layer).__module__ == "krony.nn.layers", layer""")


def test_every_public_name_is_there_and_typed_as_what_it_is():
    assert set(krony.__all__) == {*krony._MODULES, "KronyError"}
    for name in krony.__all__:
        assert name in dir(krony)
        assert getattr(krony, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = krony.nothing


@pytest.mark.parametrize("old", sorted(moved.MODULES))
def test_modules_that_moved_are_found_under_their_old_names(old):
    if old == "triton_kernels":
        pytest.importorskip("triton")
    code = f"""import importlib, warnings
new = importlib.import_module({moved.MODULES[old]!r})
spec = new.__spec__
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import krony.{old}
    from krony import {old}
assert {old} is new and new.__spec__ is spec
assert {{w.category for w in seen}} == {{DeprecationWarning}}
assert {moved.MODULES[old]!r} in str(seen[0].message)"""
    exec(code, {"__name__": "somewhere"})


def test_functions_that_were_modules_are_both():
    with pytest.warns(DeprecationWarning, match=r"krony\.heal is krony\.healing\.heal now"):
        from krony.heal import HealConfig
    from krony import heal

    assert HealConfig is krony.HealConfig
    assert heal is krony.heal
    assert callable(heal)


def test_a_module_that_is_gone_says_what_there_is_instead():
    with pytest.raises(ModuleNotFoundError, match=r"krony\.nn\.dispatch has the table"):
        importlib.import_module("krony.kernels")
    with pytest.raises(AttributeError, match=r"krony\.nn\.dispatch has the table"):
        _ = krony.kernels


def test_names_that_options_offer_are_those_that_there_are():
    assert set(get_args(words.Init)) == {*factorise.INITS, factorise.DATA}
    assert get_args(words.Bos) == tokens.BOS
    assert get_args(words.Layout) == shapes.LAYOUTS
    assert get_args(words.Objective) == limits.OBJECTIVES
    assert get_args(words.Dtype) == tuple(checkpoints.DTYPES)
    assert get_args(words.Recipe) == tuple(recipe.RECIPES)
    assert get_args(words.Quantity) == packing.FORMS
    assert tuple(families.SETS) == words.TARGETS
    assert tuple(data.TEXTS) == words.TEXTS
