"""Seconds and memory of the data initialisation at a model's size (random weights and tokens).

What is repeated is measured on a part of it and extrapolated linearly: moments over a few windows,
the algebra and the following of inputs in one block. Every row says which.

python benchmarks/scale.py [--shape gpt2] [--measured 4] [--parts moments planning …]
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import krony
from krony.compression import calibrate, limits, width
from krony.compression.budget import price
from krony.compression.factorise import DATA
from krony.compression.prices import Matrix, with_units
from krony.compression.structures import balanced_shapes, mixed, sized
from krony.hf.families import Target, dense_weight, find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.maths import fit
from krony.measure.memory import peak_bytes
from krony.measure.roofline import timed
from records import Record, parser
from shapes import SHAPES, build
from timing import device_here

PARTS = ("moments", "planning", "algebra", "following")
WINDOWS = 128


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


class Bench:
    """A model of some size, windows of random tokens, and the first block's MLP."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = device_here()
        shape = {"small": options.small, "device": self.device, "seed": options.seed}
        self.model: PreTrainedModel = build(options.shape, **shape)
        window = 16 if options.small else min(1024, self.model.config.max_position_embeddings)
        size = (options.measured, window)
        self.windows = torch.randint(self.model.config.vocab_size, size)
        self.targets = find_targets(self.model, "mlp")
        self.first = [t for t in self.targets if t.layer == self.targets[0].layer]
        self.blocks = len(self.targets) // len(self.first)
        self._moments: dict[str, calibrate.Moments] = {}

    @property
    def moments(self) -> dict[str, calibrate.Moments]:
        """Of the first block."""
        if not self._moments:
            names = [t.name for t in self.first]
            self._moments = calibrate.calibrate(self.model, self.windows, names)
        return self._moments

    def weight(self, target: Target) -> Tensor:
        """Of a dense matrix."""
        return dense_weight(self.model.get_submodule(target.name)).detach()

    def clocked(self, job: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return timed(job, self.device)

    def spent(self, run: Callable[[Tensor], object]) -> tuple[float, float]:
        """Seconds that a run takes once, and for every window, from as many and twice as many.

        One run before, since the first one is slower. The windows must fill whole batches.
        """
        seconds = []
        for repeats in (1, 1, 2):
            some = self.windows.repeat(repeats, 1)
            seconds.append(self.clocked(lambda some=some: run(some)))  # type: ignore[misc]
        more = seconds[2] - seconds[1]
        return max(seconds[1] - more, 0.0), more / len(self.windows)


def of_moments(bench: Bench) -> dict[str, Any]:
    """Moments of all MLPs, a window and once."""
    names = [t.name for t in bench.targets]
    once, a_window = bench.spent(lambda w: calibrate.calibrate(bench.model, w, names))
    return {
        "measured_windows": 2 * len(bench.windows),
        "measured_seconds_a_window": a_window,
        "measured_seconds_once": once,
        "seconds": once + a_window * WINDOWS,
        "peak_bytes": peak_bytes(bench.model),
    }


def planning(bench: Bench) -> dict[str, Any]:
    """Pricing one block: the choice between blocks takes no time that shows."""
    dense = sum(t.shape[0] * t.shape[1] for t in bench.first)
    most: dict[limits.Currency, float] = {"parameters": 0.25 * dense}
    rows: dict[str, Any] = {}
    for name, narrow in (("with all units", False), ("narrowed", True)):

        def job(narrow: bool = narrow) -> None:
            price(bench.model, bench.first, bench.moments, most, narrow=narrow)

        seconds = bench.clocked(job)
        rows[name] = {"measured_seconds_a_block": seconds, "seconds": seconds * bench.blocks}
    rows["peak_bytes"] = peak_bytes(bench.model)
    return rows


def algebra(bench: Bench, name: str) -> dict[str, Any]:
    """Fitting one kind of factors to the first block."""
    seconds, harms = 0.0, []
    for target in bench.first:
        entry, weight = bench.moments[target.name], bench.weight(target).double()
        metric = fit.Metric.of(entry.inputs.covariance, entry.gradient, target.shape[0])
        history: list[float] = []

        def job(
            weight: Tensor = weight,
            metric: fit.Metric = metric,
            groups: tuple[krony.Factors, ...] = structures(target)[name],
            history: list[float] = history,
        ) -> None:
            history += fit.groups(weight, metric, groups)[1]

        seconds += bench.clocked(job)
        harms.append(float(history[-1] / metric.harm(weight)))
    return _algebra_row(name, seconds, bench) | {"harm_left": harms}


def narrowed(bench: Bench) -> dict[str, Any]:
    """A quarter as a budget takes it: half of the units, and half of what is left in factors."""
    whole = [Matrix(t, bench.weight(t), bench.moments[t.name]) for t in bench.first]
    down = whole[-1]

    def job() -> None:
        order = width.elimination(down.weight, down.metric)
        units = width.narrow(down.weight, down.metric, order, down.target.hidden // 2)
        for matrix in (with_units(matrix, units) for matrix in whole):
            fit.groups(matrix.weight, matrix.metric, mixed(matrix.target.shape, 0.5, 0.45))

    return _algebra_row("half of the units, low rank and balanced sum", bench.clocked(job), bench)


def _algebra_row(name: str, seconds: float, bench: Bench) -> dict[str, Any]:
    return {
        "factors": name,
        "measured_seconds_a_block": seconds,
        "seconds": seconds * bench.blocks,
        "peak_bytes": peak_bytes(bench.model),
    }


def following(bench: Bench) -> dict[str, Any]:
    """The inputs of a block after those before it were factored.

    With the cheapest factors, so that nearly all of the time is the passes through the block.
    """
    shapes = [(t, structures(t)["low rank"]) for t in bench.first]
    plan = Plan(tuple(matrix_plan(t, groups) for t, groups in shapes))

    def follow(some: Tensor) -> None:
        again = copy.deepcopy(bench.model)
        krony.compress(again, plan, init=DATA, calibration=some, moments=bench.moments)

    _, a_window = bench.spent(follow)
    return {
        "measured_windows": 2 * len(bench.windows),
        "measured_seconds_a_window_and_block": a_window,
        "seconds": a_window * WINDOWS * bench.blocks,
        "peak_bytes": peak_bytes(bench.model),
    }


def main() -> None:
    """Measure the parts, print them and write JSON."""
    made = parser(__doc__ or "", "scale")
    made.add_argument("--shape", default="gpt2", choices=list(SHAPES))
    made.add_argument("--measured", type=int, default=4, help="windows that are really run")
    made.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = made.parse_args()
    what = f"{options.shape}, random weights and tokens, all MLP matrices, {WINDOWS} windows"
    record = Record(what, options, keep=True)  # a part that is not run again keeps its figures
    record.content["threads"] = torch.get_num_threads()
    bench = Bench(options)
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("moments", lambda: of_moments(bench)),
        ("planning", lambda: planning(bench)),
        *(("algebra", lambda n=n: algebra(bench, n)) for n in structures(bench.first[0])),
        ("algebra", lambda: narrowed(bench)),
        ("following", lambda: following(bench)),
    ]
    if "algebra" in options.parts:
        record.content["algebra"] = []
    longest = 0.0
    for part, job in jobs:
        began = record.spent
        if part not in options.parts or not record.has_time(part, longest):
            continue
        if part == "algebra":
            record.add(job(), part)
            print(part, record.content[part][-1], flush=True)
        else:
            record.content[part] = job()
            record.write()
            print(part, record.content[part], flush=True)
        longest = max(longest, record.spent - began)


if __name__ == "__main__":
    main()
