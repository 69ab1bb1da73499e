"""Runtimes against a decode without a cache, the roofline against torch's count, the command."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import krony
from helpers import FAMILIES, tiny
from krony.cli import tables
from krony.errors import KronyError
from krony.measure import bench, footprint, memory, roofline
from krony.measure.runtimes import Runner


def factored(family):
    """A tiny model whose MLPs are two terms each, in both contraction orders."""
    model = tiny(family)
    krony.compress(model, krony.make_plan(model, small=(4, 2), terms=2), init="random")
    return model


@torch.inference_mode()
def uncached(model, ids, new):
    """The oracle: the whole text through the model for every token."""
    start = ids.shape[1]
    for _ in range(new):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, start:]


@pytest.mark.parametrize("make", [tiny, factored])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_both_runtimes_make_the_greedy_tokens(family, make):
    model, ids = make(family), torch.randint(96, (3, 5))
    expected = uncached(model, ids, 6)
    runner = Runner(model)
    for seconds, made in (runner.loop(ids, 6), runner.generate(ids, 6)):
        assert torch.equal(made, expected)
        assert seconds > 0


def test_generate_neither_stops_nor_samples(gpt2):
    ids = torch.randint(96, (1, 5))
    first = int(uncached(gpt2, ids, 1))
    gpt2.generation_config.update(eos_token_id=first, do_sample=True, repetition_penalty=9.0)
    assert torch.equal(Runner(gpt2).generate(ids, 8)[1], uncached(gpt2, ids, 8))


@pytest.mark.slow
def test_the_compiled_loop_has_a_static_cache_and_the_same_tokens(gpt2, monkeypatch):
    asked = []
    # What torch.compile does to a forward is torch's to test, and takes a minute.
    monkeypatch.setattr(torch, "compile", lambda f, **how: asked.append(how) or f)
    ids = torch.randint(96, (2, 5))
    runner = Runner(gpt2, compiled=True)
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}]
    assert torch.equal(runner.loop(ids, 6)[1], uncached(gpt2, ids, 6))
    assert runner.compile_seconds > 0


@pytest.mark.slow
def test_compiling_that_fails_is_said(gpt2, monkeypatch):
    def fail(**_):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(torch, "compile", lambda f, **_: fail)
    with pytest.raises(KronyError, match=r"no compiler.*leave out --compile"):
        Runner(gpt2, compiled=True).loop(torch.randint(96, (1, 5)), 2)


@pytest.mark.parametrize("make", [tiny, factored])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_multiply_adds_are_those_torch_counts(family, make):
    model, tokens = make(family), 12
    model.set_attn_implementation("eager")  # two plain products, and every pair of positions
    ids = torch.randint(96, (1, tokens))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=ids, logits_to_keep=1)
    counted = counter.get_total_flops() / 2
    work = roofline.prefill_work(model, tokens)
    heads = model.config.num_attention_heads
    causal_saves = 2 * 2 * 32 * (tokens * (tokens - 1) // 2)  # layers, products, width
    assert heads == 4
    # Rotary angles are products too, a few.
    assert work.multiply_adds + causal_saves == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize(
    ("family", "looked_up"), [("gpt2", 64 * 32), ("llama", 96 * 32), ("opt", 66 * 32)]
)
def test_bytes_read_leave_out_what_is_only_looked_up(family, looked_up):
    model = tiny(family)
    tied = model.config.tie_word_embeddings
    assert tied == (family != "llama")
    total = sum(p.numel() for p in model.parameters())
    assert roofline.read_bytes(model) == 4 * (total - looked_up)
    assert roofline.read_bytes(model.bfloat16()) == 2 * (total - looked_up)


def test_decode_work_counts_keys_and_values():
    model = tiny("llama")  # two key heads of width 8, two layers
    work = roofline.decode_work(model, batch=3, prompt=4, new=2)
    cached = 2 * 2 * 2 * 8 * 4 * (5 + 6) * 3
    assert work.bytes == 2 * roofline.read_bytes(model) + cached
    assert work.multiply_adds == (
        2 * roofline.matrix_multiply_adds(model, 3, 3) + 2 * 2 * 4 * 8 * (5 + 6) * 3
    )


def test_the_slower_of_the_two_rates_sets_the_limit(monkeypatch):
    monkeypatch.setattr(roofline, "BUFFER_BYTES", 2**16)
    monkeypatch.setattr(roofline, "PRODUCT_SECONDS", 0.0)
    gauge = roofline.Gauge(torch.device("cpu"), torch.float32)
    gauge.read()
    assert gauge.bandwidth > 0
    assert gauge.rate > 0
    gauge.bandwidth, gauge.rate = 10.0, 100.0
    assert gauge.seconds(roofline.Work(30, 200)) == (3.0, "memory")
    assert gauge.seconds(roofline.Work(30, 400)) == (4.0, "arithmetic")


def test_jobs_take_turns_and_turn_round(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    order = []

    def job(name, seconds):
        return lambda: order.append(name) or seconds

    taken = bench.in_turn({"a": job("a", 1.0), "b": job("b", 2.0)})
    assert "".join(order) == "ab" + "abbaab"
    assert taken == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_speed_is_the_median_of_ratios_in_a_round():
    seconds = {"small": [1.0, 2.0, 4.0], "dense": [2.0, 2.0, 12.0]}
    row = bench.summary("x", seconds, "dense", tokens=10)
    small = row["models"]["small"]
    assert (small["speed"], small["speed_spread"]) == (2.0, [1.0, 3.0])
    assert (small["seconds"], small["spread"], small["tokens_per_second"]) == (2.0, [1.0, 4.0], 5.0)
    assert "speed" not in row["models"]["dense"]


def record_of(speed_, spread, peak):
    takes = {"factored": False, "source": "gpt2", "disk_bytes": 100, "peak_bytes": 100}
    row = {"name": "decode at batch 8, generate"}
    row["models"] = {"model": {"speed": speed_, "speed_spread": spread}, "against": {}}
    return {"models": {"model": takes | {"peak_bytes": peak}, "against": takes}, "rows": [row]}


@pytest.mark.parametrize(
    ("speed_", "spread", "peak", "expected"),
    [
        (1.2, [0.9, 1.3], 90, []),
        (1.0, [1.0, 1.0], 100, []),
        (0.93, [0.9, 0.95], 90, ["slower than dense, 0.93x (0.90 to 0.95)"]),
        (0.998, [0.9, 1.1], 90, ["slower than dense, 0.99x (0.90 to 1.10), though not in every"]),
        (1.2, [1.1, 1.3], 150, ["peak memory: more than dense, 1.50x"]),
    ],
)
def test_verdicts(speed_, spread, peak, expected):
    said = bench.verdicts(record_of(speed_, spread, peak))
    assert len(said) == len(expected)
    assert all(part in whole for part, whole in zip(expected, said, strict=True))


@pytest.fixture
def quick(monkeypatch):
    """Two tokens, a round each way, no processes."""
    for name, value in (("LEAST", 2), ("MOST", 2), ("NEW", 2), ("BATCHES", (1, 2))):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 1000)
    monkeypatch.setattr(roofline, "BUFFER_BYTES", 2**16)
    monkeypatch.setattr(roofline, "PRODUCT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of a dense and a factored tiny GPT-2, and of one with another vocabulary."""
    folder = tmp_path_factory.mktemp("bench")
    krony.save_model(tiny("gpt2"), folder / "dense")
    krony.save_model(factored("gpt2"), folder / "small")
    krony.save_model(tiny("gpt2", vocab_size=64), folder / "other")
    krony.save_model(tiny("gpt2").half(), folder / "half")
    return folder


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_step_that_is_one_cuda_graph_makes_the_same_tokens():
    model, ids = tiny("gpt2").cuda(), torch.randint(96, (2, 5), device="cuda")
    expected = Runner(model).loop(ids, 12)[1]
    recorded = Runner(model, compiled=True)
    for _ in range(2):
        assert torch.equal(recorded.loop(ids, 12)[1], expected)
    assert recorded.compile_seconds > 0


@pytest.mark.slow
def test_command(quick, saved, run, tmp_path):
    threads = torch.get_num_threads()
    command = ["bench", saved / "small", "--against", saved / "dense"]
    command += ["--threads", 2, "--device", "cpu"]
    code, out, err = run(*command, "--seed", 5, "--json", tmp_path / "b.json")
    assert code == 0, err
    record = json.loads((tmp_path / "b.json").read_text())
    names = [row["name"] for row in record["rows"]]
    # A context of 64 tokens leaves one length of prefill.
    assert names == [
        *(f"decode at batch {b}, {r}" for b in (1, 2) for r in ("bare loop", "generate")),
        "prefill of 64 tokens",
        "first token after 63",
        "load",
    ]
    for row in record["rows"]:
        assert row["name"] in out
        assert row["models"]["model"]["speed"] > 0
    assert record["settings"]["seed"] == 5
    assert record["settings"]["threads"] == 2
    assert record["environment"]["cpu"].startswith("2 threads")
    assert torch.get_num_threads() == threads
    small, dense = record["models"]["model"], record["models"]["against"]
    assert small["disk_bytes"] < dense["disk_bytes"]
    assert "ms" not in out.split("\n")[1]
    for sentence in record["verdicts"]:
        assert sentence in out
    columns = [c.header for c in tables.bench_table(record, absolute=True).columns]
    assert columns[1:4] == ["small, ms", "small, tokens/s", "dense, ms"]


def test_command_alone(quick, saved, run):
    code, out, err = run("bench", saved / "small")
    assert code == 0, err
    assert "speed" not in out
    assert "slower" not in out


def test_command_says_what_compiling_did(quick, saved, run, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    code, out, err = run("bench", saved / "small", "--compile")
    assert code == 0, err
    # How many graphs and breaks is up to whatever else this process has compiled.
    assert "The bare loop ran over a static cache, compiled into" in out
    assert "generate and prefill ran as they are." in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small", "--device", "warp"], "'warp' is no device of this machine"),
        (["small", "--device", "cuda:99"], "'cuda:99' is no device of this machine"),
        (["small", "--threads", "0"], "0 threads can't be"),
        (["small", "--against", "other"], "a vocabulary of 96 tokens, other one of 64"),
        (["small", "--against", "nowhere"], "can't find a model 'nowhere'"),
    ],
)
def test_bad_input(arguments, message, saved, run, monkeypatch, tmp_path):
    monkeypatch.chdir(saved)
    code, _, err = run("bench", *arguments, "--json", tmp_path / "b.json")
    assert code == 2
    assert message in err
    assert not (tmp_path / "b.json").exists()


def test_dtypes_must_agree():
    models = {"a": tiny("gpt2"), "b": tiny("gpt2").half()}
    with pytest.raises(KronyError, match="give one --dtype"):
        bench.check_comparable(models)


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(saved):
    # This process holds hundreds of megabytes; the tiny model's own must hold none of them.
    peak = footprint.peak_memory(saved / "dense", "float32", "cpu", 1)
    assert 4 * krony.load_model(saved / "dense").num_parameters() < peak
    assert peak < memory.peak_resident_bytes() / 2


def test_a_process_that_dies_is_said(saved, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(KronyError, match=r"memory of .*dense in a process of its own: exit code 1"):
        footprint.peak_memory(saved / "dense", None, "cpu", 1)


PROCESS = """
import resource, sys
import torch
from krony.measure.memory import keep_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kept = sys.argv[1] == "keep" and keep_memory()
for _ in range(20):  # small blocks settle first
    torch.ones(16_000_000)
before = faults()
torch.ones(16_000_000)
print(int(kept), faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told to glibc")
def test_freed_memory_is_kept_for_the_next_tensor():
    found = {}
    for way in ("keep", "leave"):
        command = [sys.executable, "-c", PROCESS, way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kept, found[way] = map(int, done.stdout.split())
        if way == "keep" and not kept:
            pytest.skip("another C library")
    assert found["keep"] < found["leave"] / 4  # 64 MB anew are 15,625 pages of 4 KB
