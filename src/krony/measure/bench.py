"""How fast models are against one of them: the work behind `krony bench`.

The models take turns in one process, so that a machine whose speed drifts drifts for all; ratios
are taken within a round. Absolute times are those of the machine, its neighbors and its weather.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.hf import checkpoints
from krony.hf.modeling import config_of
from krony.measure import evaluate, info
from krony.measure.footprint import disk_bytes, peak_memory
from krony.measure.roofline import Gauge, Work, decode_work, prefill_work, timed
from krony.measure.runtimes import Runner, compile_report

# Rounds of one measurement: at least LEAST, then more until SECONDS are over, at most MOST.
LEAST, MOST, SECONDS = 3, 15, 2.0
PROMPT, NEW = 16, 64
BATCHES, PREFILLS, FIRST = (1, 8), (128, 1024), 128
MODEL, AGAINST = "model", "against"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Workload:
    """One thing to time.

    Attributes:
        tokens: made or read in one run, for tokens a second.
        run: the runner's seconds for one run.
        work: what the model must do for it.
    """

    name: str
    tokens: int
    run: Callable[[Runner], float]
    work: Callable[[PreTrainedModel], Work]


def decode(ids: Tensor, new: int, runtime: str) -> Workload:
    """Greedy decoding after a prompt (b, t); `runtime` is "bare loop" or "generate"."""
    batch, prompt = ids.shape
    run = (lambda r: r.loop(ids, new)[0]) if runtime == "bare loop" else _generated(ids, new)
    name = f"decode at batch {batch}, {runtime}"
    return Workload(name, batch * new, run, lambda m: decode_work(m, batch, prompt, new))


def prefill(ids: Tensor) -> Workload:
    """A prompt (1, t) at once."""
    length = ids.shape[1]
    name = f"prefill of {length:,} tokens"
    return Workload(name, length, lambda r: r.prefill(ids), lambda m: prefill_work(m, length))


def first_token(ids: Tensor) -> Workload:
    """`generate` up to its first token, after a prompt (1, t)."""
    length = ids.shape[1]
    name = f"first token after {length:,}"
    return Workload(name, 1, _generated(ids, 1), lambda m: prefill_work(m, length))


def _generated(ids: Tensor, new: int) -> Callable[[Runner], float]:
    return lambda runner: runner.generate(ids, new)[0]


def workloads(vocabulary: int, context: int, device: torch.device, seed: int) -> list[Workload]:
    """What `krony bench` times, with random tokens, shortened to the context."""
    generator = torch.Generator().manual_seed(seed)

    def ids(batch: int, length: int) -> Tensor:
        return torch.randint(vocabulary, (batch, length), generator=generator).to(device)

    prompt = min(PROMPT, context // 2)
    new = min(NEW, context - prompt)
    made = [
        decode(ids(batch, prompt), new, runtime)
        for batch in BATCHES
        for runtime in ("bare loop", "generate")
    ]
    made += [prefill(ids(1, length)) for length in sorted({min(p, context) for p in PREFILLS})]
    return [*made, first_token(ids(1, min(FIRST, context - 1)))]


def in_turn(
    jobs: Mapping[str, Callable[[], float]],
    seconds: float | None = None,
    least: int | None = None,
    most: int | None = None,
) -> dict[str, list[float]]:
    """Seconds of each job in each round, after one run of each that warms up.

    Every second round goes backwards: what the job before leaves in the caches is then the same.

    Args:
        jobs: by name; each returns the seconds that it took.
        seconds: of rounds, at `least` so many of them and at `most`; None: as `krony bench` does.
    """
    seconds = SECONDS if seconds is None else seconds
    least, most = LEAST if least is None else least, MOST if most is None else most
    for job in jobs.values():
        job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    started = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - started > seconds:
            break
        for name in list(jobs)[:: -1 if number % 2 else 1]:
            taken[name].append(jobs[name]())
    return taken


def summary(
    name: str, seconds: Mapping[str, Sequence[float]], reference: str | None, tokens: int = 0
) -> dict[str, Any]:
    """One row: medians, and the speed against `reference` as the median of ratios in a round.

    Args:
        seconds: by model, one figure a round.
        tokens: in one run; 0 where there are none.
    """
    models: dict[str, Any] = {}
    for model, taken in seconds.items():
        middle = statistics.median(taken)
        models[model] = {"seconds": middle, "spread": [min(taken), max(taken)]}
        if tokens:
            models[model]["tokens_per_second"] = tokens / middle
        if reference is not None and model != reference:
            ratios = [r / s for r, s in zip(seconds[reference], taken, strict=True)]
            models[model]["speed"] = statistics.median(ratios)
            models[model]["speed_spread"] = [min(ratios), max(ratios)]
    return {"name": name, "rounds": len(next(iter(seconds.values()))), "models": models}


def measure(
    runners: Mapping[str, Runner],
    loads: Sequence[Workload],
    reference: str | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Time every workload on every model in turn.

    Args:
        runners: by name, on one device and in one dtype.
        reference: the name of the model that speeds are against.
        progress: called with (what, done, in all).
    Returns:
        One row a workload (`summary`, and a roofline for each model), and the machine's rates.
    Raises:
        KronyError: the memory of the device does not suffice.
    """
    first = next(iter(runners.values()))
    gauge = Gauge(first.device, first.model.dtype)
    rows = []
    for number, load in enumerate(loads):
        progress(load.name, number, len(loads))
        gauge.read()
        jobs = {name: _job(load, runner) for name, runner in runners.items()}
        try:
            rows.append(summary(load.name, in_turn(jobs), reference, load.tokens))
        except torch.OutOfMemoryError as error:
            raise KronyError(
                f"{first.device} has too little memory for {len(runners)} models and {load.name}; "
                "measure one model at a time, or in a smaller --dtype"
            ) from error
    gauge.read()
    for row, load in zip(rows, loads, strict=True):
        for name, figures in row["models"].items():
            work = load.work(runners[name].model)
            least, limit = gauge.seconds(work)
            figures["roofline"] = {
                "bytes": work.bytes,
                "multiply_adds": work.multiply_adds,
                "seconds": least,
                "share": least / figures["seconds"],
                "limit": limit,
            }
    rates = {"bytes_per_second": gauge.bandwidth, "multiply_adds_per_second": gauge.rate}
    return rows, rates


def _job(load: Workload, runner: Runner) -> Callable[[], float]:
    return lambda: load.run(runner)


def bench(
    source: str,
    against: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    compiled: bool = False,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Everything that `krony bench` says of a model, and of another one beside it.

    Args:
        source, against: what `load_model` takes; `against` is usually the dense model.
        dtype: a name of `checkpoints.DTYPES`; None: float32 on a CPU, else the checkpoint's.
        threads: of the CPU; None: as torch has it.
        compiled: `Runner`'s.
    Returns:
        JSON-ready: environment, settings, machine, models (what they take), rows, verdicts;
        with `compiled`, what torch.compile did.
    Raises:
        KronyError: an unknown device or dtype, threads below 1, models that can't be loaded, of
            different vocabularies or dtypes, or too large for the device.
    """
    where = check_device(device)
    if threads is not None and threads < 1:
        raise KronyError(f"{threads} threads can't be; give at least 1")
    if dtype is None and where.type == "cpu":
        dtype = "float32"  # half precision on a CPU is slow or coarse, by kernel
    if dtype is not None and dtype not in checkpoints.DTYPES:
        raise KronyError(f"dtype {dtype!r} is not one of {', '.join(checkpoints.DTYPES)}")
    names = {MODEL: source} | ({} if against is None else {AGAINST: against})
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _bench(names, where, dtype, compiled, seed, progress)
    finally:
        torch.set_num_threads(before)


def _bench(
    names: dict[str, str],
    device: torch.device,
    dtype: str | None,
    compiled: bool,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    progress("load", 0, 1)
    models: dict[str, PreTrainedModel] = {}

    def load(role: str) -> Callable[[], float]:
        def once() -> float:
            models.pop(role, None)  # never the same model twice in memory
            wanted = checkpoints.DTYPES[dtype] if dtype else None

            def job() -> None:
                models[role] = checkpoints.load_model(names[role], wanted, str(device))

            return timed(job, device)

        return once

    for role in names:
        load(role)()
    check_comparable({names[role]: model for role, model in models.items()})
    reference = AGAINST if AGAINST in names else None
    rows = [summary("load", in_turn({role: load(role) for role in names}), reference)]
    first = models[MODEL]
    context = min(evaluate.context_length(model) for model in models.values())
    vocabulary = first.config.get_text_config().vocab_size
    parameters = {role: info.parameters(model) for role, model in models.items()}
    runners = {role: Runner(models[role], compiled) for role in names}
    loads = workloads(vocabulary, context, device, seed)
    timings, machine = measure(runners, loads, reference, progress)
    takes = {}
    for number, role in enumerate(names):  # not `models`: the last one loaded is last there
        model = models[role]
        progress(f"memory of {names[role]}", number, len(names))
        takes[role] = {
            "source": names[role],
            "factored": config_of(model) is not None,
            "parameters": parameters[role],
            "disk_bytes": disk_bytes(names[role]),
            "peak_bytes": peak_memory(names[role], dtype, str(device), torch.get_num_threads()),
            "compile_seconds": runners[role].compile_seconds,
        }
    record = {
        "environment": evaluate.environment(),
        "settings": {
            "device": str(device),
            "dtype": str(first.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "compiled": compiled,
            "seed": seed,
        },
        "machine": machine,
        "models": takes,
        "rows": timings + rows,
    }
    if compiled:
        record["compiled"] = compile_report()
    record["verdicts"] = verdicts(record)
    return record


def check_device(name: str) -> torch.device:
    """The device, if this machine has it. Raises `KronyError` otherwise."""
    unknown = KronyError(f"{name!r} is no device of this machine; use cpu, or cuda where there is")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown from error
    if device.type == "cpu":
        return device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != device.type:
        raise unknown
    if (device.index or 0) >= torch.accelerator.device_count():
        raise unknown
    return device


def check_comparable(models: Mapping[str, PreTrainedModel]) -> None:
    """Raise `KronyError` unless all models have one vocabulary and one dtype."""
    (name, first), *others = models.items()
    for other, model in others:
        mine, theirs = (m.config.get_text_config().vocab_size for m in (first, model))
        if mine != theirs:
            raise KronyError(
                f"{name} has a vocabulary of {mine:,} tokens, {other} one of {theirs:,}; compare "
                "a model with the one it was made from"
            )
        if first.dtype != model.dtype:
            raise KronyError(
                f"{name} is in {first.dtype}, {other} in {model.dtype}; give one --dtype for both"
            )


def verdicts(record: dict[str, Any]) -> list[str]:
    """A sentence for everything in which the model is worse than the other one."""
    if AGAINST not in record["models"]:
        return []
    mine, other = record["models"][MODEL], record["models"][AGAINST]
    name = other["source"] if other["factored"] else "dense"
    said = []
    for row in record["rows"]:
        figures = row["models"][MODEL]
        if figures["speed"] < 1:
            low, high = figures["speed_spread"]
            doubt = ", though not in every round" if high >= 1 else ""
            said.append(
                f"{row['name']}: slower than {name}, {times(figures['speed'])} "
                f"({low:.2f} to {high:.2f}){doubt}"
            )
    for key, what in (("peak_bytes", "peak memory"), ("disk_bytes", "bytes on disk")):
        if mine[key] > other[key]:
            share = mine[key] / max(other[key], 1)
            said.append(f"{what}: more than {name}, {share:.2f}x")
    return said


def times(ratio: float) -> str:
    """0.934 as 0.93x; what is below one is never rounded up to it."""
    return f"{min(ratio, 0.99) if ratio < 1 else ratio:.2f}x"
