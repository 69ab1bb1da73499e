"""Commands that are killed at random moments of their work, and what they leave.

python tests/faults/trials.py 200 [SECONDS]    writes benchmarks/results/faults.json

Importing takes longer than working here, so a trial is a fork of a server that has imported all.
Half of the kills strike by the clock, anywhere in the run; the other half just before the process
opens, renames or removes something where it writes, which is where harm is done.
"""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
REPORTS = ("heal.json", "heal.png")  # times, never the same
PASSING = ("seconds", "processor_seconds", "date", "environment")  # of a run, not of what it found
HEAL = "--data text.txt --tokens 512 --batch-tokens 64 --window 16 --dtype float32 --eval-every 128"
COMMANDS = {
    "compress": "compress dense out --small 2x2 --init van-loan --layout small-outer",
    "compress by data": "compress dense out --small 2x2 --init data --calibration text.txt "
    "--windows 4",
    "heal": f"heal small out {HEAL} --save-minutes 0",
    "quantize": "quantize small out --to int8",
    "export": "export small out --to dense",
    "export with code": "export small out --to self-contained",
    "plain": "compress dense out --structure plain --budget 0.6 --calibration text.txt --windows 4",
    "gguf": "export dense out.gguf --to gguf",
    "onnx": "export small out --to onnx",
    "compare": "compare dense -o out --budget 0.5 --methods svd,flap --calibration text.txt "
    "--windows 4 --data text.txt --evaluated 300",
}
# What a command that was stopped goes on from.
RESUMED = {"heal": ["out.run"], "compress by data": [".out.work"], "plain": [".out.work"]}
RESUMED |= {"compare": ["out"]}


@dataclass(frozen=True)
class Trial:
    """One kill. `left`: what was there then; `wrong`: what should not have been, or nothing."""

    command: str
    signal: str
    moment: str
    code: int
    left: list[str]
    wrong: str


# Forks come from a server that has imported all and never multiplied: a process that has threads
# of OpenMP (whoever ran a model has some) can't be forked, its children crash or wait for ever.
IMPORTED = "torch transformers.models.gpt2.modeling_gpt2 transformers.trainer accelerate onnxscript"
IMPORTED += " torch.onnx krony krony.cli.app krony.cli.compress krony.cli.heal krony.cli.export"
IMPORTED += " krony.export.gguf krony.compare.picture krony.compression.plain matplotlib"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(IMPORTED.split())
Forked = multiprocessing.context.ForkServerProcess
Running = tuple[Forked, Connection]


def run(
    arguments: list[str], event: int = 0, number: int = 0, threads: int = 1, disk: int = 0
) -> Running:
    """Start the command in the current folder; (process, what it writes on either output).

    Args:
        event: before which event on files the process sends itself the signal `number`; 0: never.
        threads: of torch.
        disk: bytes that a file can have at most, as if the disk were full then; 0: any.
    """
    read, write = FORKS.Pipe(duplex=False)
    process = FORKS.Process(
        target=_command, args=(arguments, str(Path.cwd()), write, event, number, threads, disk)
    )
    process.start()
    write.close()
    return process, read


def _command(
    arguments: list[str],
    folder: str,
    output: Connection,
    event: int,
    number: int,
    threads: int,
    disk: int,
) -> None:
    os.chdir(folder)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    if disk:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    seen = 0

    def hook(name: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if name not in WATCHED or not values or not isinstance(values[0], str | os.PathLike):
            return
        path = os.fspath(values[0])
        reading = name == "open" and not (isinstance(values[1], str) and values[1][0] in "wax")
        if reading or isinstance(path, bytes) or "out" not in path.replace(folder, ""):
            return
        seen += 1
        if seen == event:
            os.kill(os.getpid(), number)

    if event:
        sys.addaudithook(hook)
    code = 1
    try:
        import torch

        from krony.cli import main

        torch.set_num_threads(threads)
        sys.argv = ["krony", *arguments]
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException as error:
        os.write(2, f"Traceback: {error!r}\n".encode())
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def ended(
    process: multiprocessing.context.ForkServerProcess, output: Connection
) -> tuple[int, str]:
    """Exit code (negative: the signal) and messages, read until janitors are done as well."""
    said = b""
    while piece := os.read(output.fileno(), 1 << 16):
        said += piece
    output.close()
    process.join()
    return process.exitcode or 0, said.decode(errors="replace")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a directory but reports, without times; or a file alone."""
    files = (p for p in [folder, *folder.rglob("*")] if p.is_file() and p.name not in REPORTS)
    return {p.relative_to(folder).as_posix(): _lasting(p) for p in files}


def _lasting(path: Path) -> bytes:
    """The bytes of a file; of a comparison's figures what is the same each time."""
    if path.suffix == ".json" and (path.parent.name == "cells" or path.name == "compare.json"):
        return json.dumps(lasting(json.loads(path.read_text())), sort_keys=True).encode()
    return path.read_bytes()


def lasting(data: Any) -> Any:
    """Figures without what only that run had."""
    if isinstance(data, dict):
        return {k: lasting(v) for k, v in data.items() if k not in PASSING}
    return [lasting(v) for v in data] if isinstance(data, list) else data


def target(name: str) -> Path:
    """What a command writes."""
    return Path("out.gguf" if name == "gguf" else "out")


def remove(path: Path) -> None:
    """A directory or a file."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Reference:
    """A command that nobody killed: its seconds and what it wrote."""

    def __init__(self, name: str) -> None:
        started = time.perf_counter()
        code, said = ended(*run(COMMANDS[name].split()))
        assert code == 0, said
        self.seconds = time.perf_counter() - started
        self.wanted = contents(target(name))
        remove(target(name))


def trial(name: str, chosen: random.Random, known: dict[str, Reference]) -> Trial:
    """Kill the command once at a random moment, look, and run it again to its end."""
    command = COMMANDS[name].split()
    if name not in known:
        known[name] = Reference(name)
    reference = known[name]
    number = chosen.choice((signal.SIGKILL, signal.SIGTERM))
    if chosen.random() < 0.5:
        seconds = chosen.uniform(0, reference.seconds)
        process, errors = run(command)
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, number)
        moment = f"after {seconds:.2f} s"
    else:
        event = chosen.randint(1, 120 if name == "heal" else 20)
        process, errors = run(command, event, number)
        moment = f"before event {event}"
    code, said = ended(process, errors)
    left = sorted(path.name for path in Path().iterdir() if "out" in path.name)
    wrong = "".join(judged(name, said, left, reference))
    for path in left:
        remove(Path(path))
    return Trial(name, number.name, moment, code, left, wrong)


def judged(name: str, said: str, left: list[str], reference: Reference) -> Iterator[str]:
    """What is wrong with what a kill left, and with going on from there."""
    if "Traceback" in said:
        yield f"a traceback: {said[-300:]} "
    kept = RESUMED.get(name, [])
    if hidden := [path for path in left if path.startswith(".") and path not in kept]:
        yield f"hidden copies: {hidden} "
    out = target(name)
    if unknown := set(left) - {out.name, *kept, *hidden}:
        yield f"left: {unknown} "
    if out.name in left and "out" not in kept:
        if contents(out) != reference.wanted:
            yield "the destination is not complete "
        return
    again = COMMANDS[name].split() + (["--resume"] if "out.run" in left else [])
    code, said = ended(*run(again))
    if code:
        yield f"it can't be run again: {said[-300:]} "
    elif contents(out) != reference.wanted:
        yield "run again, it writes something else "
    elif rest := [path for path in kept if path.startswith(".") and Path(path).exists()]:
        yield f"run again, it leaves {rest} "
    after = sorted(path.name for path in Path().iterdir() if "out" in path.name)
    if not code and after != [out.name]:
        yield f"run again, it leaves {after} "
    for path in after:
        remove(Path(path))


def by_threads(name: str) -> float:
    """The largest difference of a tensor that a command writes with two threads from one thread's,
    relative to its norm."""
    from safetensors.torch import load_file

    made = []
    for threads in (1, 2):
        code, said = ended(*run(COMMANDS[name].split(), threads=threads))
        assert code == 0, said
        made.append(load_file("out/model.safetensors"))
        remove(Path("out"))
    one, two = made
    assert one.keys() == two.keys()
    return max(
        float((two[k].double() - a.double()).norm() / a.double().norm().clamp(min=1e-30))
        for k, a in one.items()
        if a.is_floating_point()
    )


def prepare() -> None:
    """A tiny model, a factored one and a text in the current folder, and all imports done."""
    import torch
    import transformers

    import krony
    from krony.cli import main  # noqa: F401
    from krony.text.data import load_text

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=4096, n_embd=16, n_layer=2, n_head=2, n_positions=32,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model, tokenizer = transformers.GPT2LMHeadModel(config).eval(), krony.load_tokenizer("demo")
    krony.save_model(model, "dense", tokenizer)
    krony.compress(model, krony.make_plan(model, small=(2, 2)), init="van-loan")
    krony.save_model(model, "small", tokenizer)
    Path("text.txt").write_text(load_text("python-docs").text[:8000])


def trials(count: int, seed: int, names: list[str] | None = None) -> Iterator[Trial]:
    """So many trials over the commands in turn, in the current folder."""
    chosen, known = random.Random(seed), dict[str, Reference]()
    names = names or list(COMMANDS)
    for i in range(count):
        yield trial(names[i % len(names)], chosen, known)


def main() -> None:
    import tempfile

    from krony.hf.saving import write_json
    from krony.measure.evaluate import environment

    count, seed = int(sys.argv[1]), 0
    most = float(sys.argv[2]) if len(sys.argv) > 2 else math.inf
    started = time.monotonic()
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"
    done: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        for one in trials(count, seed):
            done.append(one)
            print(len(done), json.dumps(asdict(one)), flush=True)
            if time.monotonic() - started > most:
                break
        os.chdir("/")
    by_command = {
        name: {
            "kills": sum(t.command == name for t in done),
            "killed in time": sum(t.command == name and t.code != 0 for t in done),
            "wrong": [asdict(t) for t in done if t.command == name and t.wrong],
        }
        for name in COMMANDS
    }
    write_json(
        results,
        {
            "environment": environment(),
            "seed": seed,
            "kills": len(done),
            "survived": sum(not t.wrong for t in done),
            "commands": by_command,
        },
    )


if __name__ == "__main__":
    main()
