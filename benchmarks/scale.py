"""Seconds and memory of the data initialisation at GPT-2 small's size (random weights and tokens).

What is repeated is measured on a part of it and extrapolated linearly: moments over a few windows,
the algebra and the following of inputs in one block of twelve. Every row says which.

python benchmarks/scale.py [--measured 4] [--parts moments planning algebra following]
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import krony
from krony.compression import calibrate, limits, width
from krony.compression.budget import Matrix, balanced_shapes, mixed, price, sized, with_units
from krony.compression.factorise import DATA
from krony.hf.checkpoints import write_json
from krony.hf.families import Target, dense_weight, find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.maths import fit
from krony.measure.evaluate import environment
from krony.measure.memory import peak_bytes

PARTS = ("moments", "planning", "algebra", "following")
WINDOWS, BLOCKS = 128, 12


def structures(target: Target) -> dict[str, tuple[krony.Factors, ...]]:
    """A quarter of one matrix in each kind of factors."""
    m, n = target.shape
    paper = krony.Factors((m // 2, n // 2), (2, 2))
    return {
        "paper, one term with 2x2": (paper,),
        "low rank": (sized((m, 1), (1, n), 0.25),),
        "balanced sum": (sized(*balanced_shapes(target.shape), 0.25),),
        "low rank and balanced sum": mixed(target.shape, 0.25, 0.45),
    }


def spent(run: Callable[[torch.Tensor], object], windows: torch.Tensor) -> tuple[float, float]:
    """Seconds that a run takes once, and those for every window, from as many and twice as many.

    One run before, since the first one is slower. The windows must fill whole batches.
    """
    seconds = []
    for repeats in (1, 1, 2):
        some, started = windows.repeat(repeats, 1), time.perf_counter()
        run(some)
        seconds.append(time.perf_counter() - started)
    more = seconds[2] - seconds[1]
    return max(seconds[1] - more, 0.0), more / len(windows)


def narrowed(
    model: transformers.PreTrainedModel, block: list[Target], moments: dict[str, calibrate.Moments]
) -> dict[str, Any]:
    """A quarter as a budget takes it: half of the units, and half of what is left in factors."""
    whole = [Matrix(t, dense_weight(model.get_submodule(t.name)), moments[t.name]) for t in block]
    down, started = whole[-1], time.perf_counter()
    order = width.elimination(down.weight, down.metric)
    units = width.narrow(down.weight, down.metric, order, down.target.hidden // 2)
    for matrix in (with_units(matrix, units) for matrix in whole):
        fit.groups(matrix.weight, matrix.metric, mixed(matrix.target.shape, 0.5, 0.45))
    seconds = time.perf_counter() - started
    return {
        "factors": "half of the units, low rank and balanced sum",
        "measured_seconds_a_block": seconds,
        "seconds": seconds * BLOCKS,
    }


def main() -> None:
    """Measure the parts, print them and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale.json"))
    parser.add_argument("--measured", type=int, default=4, help="windows that are really run")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    arguments = parser.parse_args()
    transformers.set_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    windows = torch.randint(50257, (arguments.measured, 1024))
    targets = find_targets(model, "mlp")
    first = targets[:2]
    record: dict[str, Any] = {}
    if arguments.out.exists():  # a part that is not run again keeps its last figures
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
    record |= {
        "what": "GPT-2 small, random weights and tokens, all 24 MLP matrices, 128 windows of 1,024",
        "environment": environment(),
        "threads": torch.get_num_threads(),
    }
    if "moments" in arguments.parts:
        names = [t.name for t in targets]
        once, a_window = spent(lambda w: calibrate.calibrate(model, w, names), windows)
        record["moments"] = {
            "measured_windows": 2 * arguments.measured,
            "measured_seconds_a_window": a_window,
            "measured_seconds_once": once,
            "seconds": once + a_window * WINDOWS,
            "peak_bytes": peak_bytes(model),
        }
        print(record["moments"], flush=True)
    moments = calibrate.calibrate(model, windows, [t.name for t in first])
    if "planning" in arguments.parts:
        # Of one block: the choice between blocks takes no time that shows.
        most: dict[limits.Currency, float] = {
            "parameters": 0.25 * sum(t.shape[0] * t.shape[1] for t in first)
        }
        rows = record["planning"] = {}
        for name, narrow in (("with all units", False), ("narrowed", True)):
            started = time.perf_counter()
            prices = price(model, first, moments, most, narrow=narrow)
            seconds = time.perf_counter() - started
            rows[name] = {"measured_seconds_a_block": seconds, "seconds": seconds * BLOCKS}
            print(name, rows[name], [t.shape for t in prices.targets], flush=True)
        rows["peak_bytes"] = peak_bytes(model)
    if "algebra" in arguments.parts:
        rows = record["algebra"] = []
        for name in structures(first[0]):
            seconds, harms = 0.0, []
            for target in first:
                entry = moments[target.name]
                weight = dense_weight(model.get_submodule(target.name)).detach().double()
                metric = fit.Metric.of(entry.inputs.covariance, entry.gradient, target.shape[0])
                started = time.perf_counter()
                history = fit.groups(weight, metric, structures(target)[name])[1]
                seconds += time.perf_counter() - started
                harms.append(history[-1] / metric.harm(weight))
            rows.append(
                {
                    "factors": name,
                    "measured_seconds_a_block": seconds,
                    "seconds": seconds * BLOCKS,
                    "harm_left": harms,
                }
            )
            print(rows[-1], flush=True)
            write_json(arguments.out, record)
        rows.append(narrowed(model, first, moments))
        print(rows[-1], flush=True)
    if "following" in arguments.parts:
        # The cheapest factors, so that nearly all of the time is the passes through the block.
        shapes = [(t, structures(t)["low rank"]) for t in first]
        plan = Plan(tuple(matrix_plan(t, groups) for t, groups in shapes))

        def follow(some: torch.Tensor) -> None:
            again = copy.deepcopy(model)
            krony.compress(again, plan, init=DATA, calibration=some, moments=moments)

        _, a_window = spent(follow, windows)
        record["following"] = {
            "measured_windows": 2 * arguments.measured,
            "measured_seconds_a_window_and_block": a_window,
            "seconds": a_window * WINDOWS * BLOCKS,
            "peak_bytes": peak_bytes(model),
        }
        print(record["following"], flush=True)
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
