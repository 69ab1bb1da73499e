"""A seeded fuzzer over what a model directory holds: every file is read, or refused in a sentence.

A short run here; `make fuzz` runs it long (KRONY_FUZZ examples a file; another
KRONY_FUZZ_SEED: other ones).
"""

import copy
import json
import os
import resource
import shutil
import time

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import krony
from family_matrix import tiny
from krony import KronyError, load_model, load_tokenizer, save_model
from krony.hf.plan import Plan

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("KRONY_FUZZ", "25"))
SEED = int(os.environ.get("KRONY_FUZZ_SEED", "0"))  # another one: other inputs
SECONDS, GROWTH = 2.0, 400 * 2**20  # beyond what a process with torch and transformers has
LONG = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 25,
    suppress_health_check=list(HealthCheck),
)
HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 10**6, 10**9, 10**12, 2**63, -(2**63), 10**400]),
    st.sampled_from([0.5, -1.5, 1e308, float("inf"), float("nan")]),
    st.sampled_from(["", "a" * 5000, "1", "../../etc/passwd", "float7", "\x00", "__class__"]),
    st.sampled_from([[], {}, [[]], [None] * 50, {"a": {"b": []}}, [-1], [10**9] * 9]),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A factored Llama in two shards, with the packaged tokenizer, and a plan beside it."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = tiny("llama")
    plan = krony.make_plan(model, small=(2, 2), target="everything")
    krony.compress(model, plan, init="van-loan")
    save_model(model, folder / "model", load_tokenizer("demo"), max_shard_size="20KB")
    assert (folder / "model" / "model.safetensors.index.json").is_file()
    load_model(folder / "model")  # so that nothing is imported while the clock runs
    return folder / "model"


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


@st.composite
def changed(draw, original):
    """JSON in which one to three places hold something else, are gone, or are there many times."""
    value = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            continue
        inner = value
        try:
            for key in path[:-1]:
                inner = inner[key]
            _ = inner[path[-1]]
        except (KeyError, IndexError, TypeError):  # an earlier change took it away
            continue
        what = draw(st.sampled_from(["other", "gone", "many"]))
        if what == "gone":
            del inner[path[-1]]
        elif what == "many":
            inner[path[-1]] = [inner[path[-1]]] * 100
        else:
            # A copy: a later change must not reach into what is drawn again.
            inner[path[-1]] = copy.deepcopy(draw(HOSTILE))
    return value


def refused_or_read(work):
    """Run it: nothing but KronyError, in one sentence, in time and within memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        work()
    except KronyError as error:
        said = str(error)
        assert said
        assert len(said) < 1500
        assert "above report" not in said
    assert time.process_time() - started < SECONDS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < GROWTH


def fuzzed(directory, tmp_path_factory, name, content, work):
    """The directory with other bytes in one file."""
    folder = tmp_path_factory.mktemp("case")
    try:
        for path in directory.iterdir():
            if path.name != name:
                os.link(path, folder / path.name)
        (folder / name).write_bytes(content)
        refused_or_read(lambda: work(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def dumped(value) -> bytes:
    return json.dumps(value).encode()


JSON_FILES = {
    "config.json": load_model,
    "model.safetensors.index.json": load_model,
    "generation_config.json": load_model,
    "tokenizer_config.json": load_tokenizer,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", JSON_FILES)
def test_values_of_other_kinds(directory, tmp_path_factory, name):
    original = json.loads((directory / name).read_text())

    @seed(SEED + 1)
    @LONG
    @given(changed(original))
    def run(value):
        fuzzed(directory, tmp_path_factory, name, dumped(value), JSON_FILES[name])

    run()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*JSON_FILES, "tokenizer.json"])
def test_bytes_that_were_changed(directory, tmp_path_factory, name):
    original = (directory / name).read_bytes()
    work = JSON_FILES.get(name, load_tokenizer)
    junk = st.sampled_from([b"", b"\x00", b"\xff\xfe", b"[" * 5000, b'{"a":' * 5000, b"NaN", b"}"])

    @seed(SEED + 2)
    @LONG
    @given(st.integers(0, len(original)), st.integers(0, 200), junk)
    def run(start, length, put):
        content = original[:start] + put + original[start + length :]
        fuzzed(directory, tmp_path_factory, name, content, work)

    run()


@pytest.mark.filterwarnings("ignore")
def test_plans(directory):
    plan = json.loads((directory / "config.json").read_text())["quantization_config"]["plan"]

    @seed(SEED + 3)
    @LONG
    @given(changed(plan))
    def run(value):
        refused_or_read(lambda: Plan.from_json(json.dumps(value)))

    run()


@pytest.mark.filterwarnings("ignore")
def test_headers_that_lie(directory, tmp_path_factory):
    path = sorted(directory.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    @seed(SEED + 4)
    @LONG
    @given(changed(header), st.sampled_from([0, 0, 0, -1, 1, 10**6, 2**40, -(2**20)]))
    def run(value, lie):
        text = dumped(value)
        said = max(0, len(text) + lie).to_bytes(8, "little")
        content = said + text + whole[8 + length :]
        fuzzed(directory, tmp_path_factory, path.name, content, load_model)

    run()


@pytest.mark.filterwarnings("ignore")
def test_numbers_that_are_none_in_any_tensor(directory, tmp_path_factory):
    path = sorted(directory.glob("*.safetensors"))[0]
    from safetensors.torch import load_file, save

    tensors = load_file(path)
    names = sorted(name for name, value in tensors.items() if value.numel())

    @seed(SEED + 5)
    @LONG
    @given(st.sampled_from(names), st.integers(0, 10**6), st.sampled_from(["nan", "inf", "-inf"]))
    def run(name, place, number):
        value = tensors[name].clone()
        value.view(-1)[place % value.numel()] = float(number)
        content = save({**tensors, name: value}, metadata={"format": "pt"})
        folder = tmp_path_factory.mktemp("case")
        for other in directory.iterdir():
            if other.name != path.name:
                os.link(other, folder / other.name)
        (folder / path.name).write_bytes(content)
        with pytest.raises(KronyError, match=r"NaN or Inf|is not what krony wrote"):
            load_model(folder)
        shutil.rmtree(folder)

    run()
    assert torch.isfinite(torch.cat([t.flatten() for t in tensors.values()])).all()
