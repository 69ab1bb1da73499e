"""A step of training: compressed models against the dense one and a torch.kron in every forward.

Random weights of a known shape, random tokens, the loss and the optimisers of `krony heal`. Steps
of the models take turns in one process, so that a machine whose speed drifts drifts for all. Peak
memory is what a model and two steps add on a GPU; on a CPU that of a process for each model.

python benchmarks/training.py [--shape gpt2] [--batch 1] [--loss ce] [--optimizers adamw muon]
"""

import argparse
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import krony
from forward import kron_weight
from krony.healing import losses
from krony.healing.objective import Objective, returning_loss
from krony.healing.optimizers import make_optimizer
from krony.healing.recipe import RECIPES
from krony.healing.speed import fastest_dtype, flops_per_token
from krony.measure.memory import keep_memory, peak_bytes
from krony.measure.roofline import Gauge
from records import Record, parser, show_table
from shapes import DENSE, KINDS, SHAPES, STOCK, build, linear_children
from timing import device_here, rounds

# Whether A is first, as in the paper; of the factors of FACTORED.
KRON_KINDS = {"torch.kron": True, "torch.kron, B first": False}
FACTORED = "factored, 2x2"
# What tells most comes first: a limit of time may leave out the rest.
DEFAULT = [
    DENSE,
    FACTORED,
    "plain, a quarter of the units",
    "narrowed to a half, low rank",
    *KRON_KINDS,
    "factored, 4x1",
    STOCK,
]
OPTIMIZERS = ("adamw", "muon")
TRAINED_TOKENS = 10_000_000  # of the run whose recipe it is; batches and rates don't matter here


class FormedByKron(nn.Module):
    """The same factors by torch.kron in every forward: A ⊗ B as in the paper's code, or B ⊗ A."""

    def __init__(self, layer: krony.KroneckerLinear, large_first: bool) -> None:
        super().__init__()
        self.layer, self.large_first = layer, large_first
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        group = self.layer.groups[0]  # one group, of one term
        weight = kron_weight(group, self.large_first)  # type: ignore[arg-type]
        return nn.functional.linear(x, weight, self.layer.bias)


def model_of(kind: str, options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """A model to train, in float32."""
    named = FACTORED if kind in KRON_KINDS else kind
    made = build(
        options.shape,
        named,
        small=options.small,
        layers=options.layers,
        device=device,
        seed=options.seed,
    )
    if kind in KRON_KINDS:
        for name, layer in linear_children(made):
            made.set_submodule(name, FormedByKron(layer, KRON_KINDS[kind]))
    made.train()
    return made


class Step:
    """One step of an optimiser on fixed random tokens, `options.batch` windows of them."""

    def __init__(
        self,
        kind: str,
        optimizer: str,
        options: argparse.Namespace,
        device: torch.device,
        teacher: PreTrainedModel | None,
    ) -> None:
        self.model = model_of(kind, options, device)
        self.objective = Objective(self.model, losses.parse(options.loss), teacher)
        recipe = RECIPES["default"](self.model.config.hidden_size, TRAINED_TOKENS)
        recipe = replace(recipe, muon=optimizer == "muon")
        self.optimiser = make_optimizer(self.model, recipe, 1e-5)
        size, vocabulary = (options.batch, options.window), self.model.config.vocab_size
        self.ids = torch.randint(vocabulary, size, device=device)
        half = options.dtype == "bfloat16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        self.within = ExitStack()
        self.within.enter_context(returning_loss(self.model, self.objective))
        self.run = torch.compile(self.model) if options.compile else self.model

    def __call__(self) -> None:
        with self.autocast:
            loss = self.run(input_ids=self.ids)["loss"]
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def flops(self, window: int) -> float:
        """A token, the teacher's included."""
        self.within.close()
        found = flops_per_token(self.model, self.objective, window)
        self.within.enter_context(returning_loss(self.model, self.objective))
        return found


def teacher_of(options: argparse.Namespace, device: torch.device) -> PreTrainedModel | None:
    """The dense model in the dtype of the run, where the loss has one."""
    if options.loss == losses.CE:
        return None
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    return build(
        options.shape, DENSE, small=options.small, layers=options.layers, dtype=dtype, device=device
    )


def peak(kind: str, optimizer: str, options: argparse.Namespace) -> float | None:
    """Peak memory in GB of a process of its own on the CPU that takes two steps of one model."""
    if options.small:
        return None
    command = [sys.executable, __file__, "--only", kind, optimizer, "--dtype", options.dtype]
    for name in ("shape", "window", "batch", "layers", "threads", "loss"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def started(
    kind: str,
    optimizer: str,
    options: argparse.Namespace,
    device: torch.device,
    teacher: PreTrainedModel | None,
) -> tuple[Step, float | None]:
    """A step that has run twice, and the peak memory of that in GB."""
    if device.type != "cuda":
        gigabytes = peak(kind, optimizer, options)
        step = Step(kind, optimizer, options, device, teacher)
        step()
        return step, gigabytes
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = Step(kind, optimizer, options, device, teacher)
    step()
    step()
    return step, (torch.cuda.max_memory_allocated() - before) / 1e9


def rows_of(
    steps: dict[str, Step],
    memory: dict[str, float | None],
    taken: dict[str, list[float]],
    options: argparse.Namespace,
    rate: float,
) -> list[dict[str, Any]]:
    """JSON-ready, a row a model and optimiser."""
    tokens, rows = options.batch * options.window, []
    for name, step in steps.items():
        kind, _, optimizer = name.partition(" / ")

        def over(other: str, own: list[float] = taken[name]) -> list[float] | None:
            # Ratios within one round, so that a slow round is slow for both.
            theirs = taken.get(f"{other} / {OPTIMIZERS[0]}")
            return theirs and [t / o for t, o in zip(theirs, own, strict=True)]

        dense, krons = over(DENSE) or [1.0], [over(other) for other in KRON_KINDS]
        gigabytes = memory[name]
        seconds, flops = statistics.median(taken[name]), step.flops(options.window)
        rows.append(
            {
                "model": kind,
                "optimizer": optimizer,
                "against_dense": round(statistics.median(dense), 3),
                "spread": [round(min(dense), 3), round(max(dense), 3)],
                "against_kron": krons[0] and round(statistics.median(krons[0]), 3),
                "against_kron_b_first": krons[1] and round(statistics.median(krons[1]), 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "milliseconds": round(seconds * 1e3, 3),
                "peak_gb": gigabytes and round(gigabytes, 2),
                "flops_per_token": flops,
                "share_of_roofline": round(flops * tokens / seconds / rate, 3),
                "parameters": sum(p.numel() for p in step.model.parameters()),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""

    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    show_table(
        (
            *("training step", "optimiser", "speed against dense", "spread"),
            *("against `torch.kron`", "B first", "tokens/s", "GFLOP a token", "roofline", "peak"),
        ),
        (
            (
                *(row["model"], row["optimizer"], times(row["against_dense"])),
                f"{row['spread'][0]:.2f} to {row['spread'][1]:.2f}",
                *(times(row["against_kron"]), times(row["against_kron_b_first"])),
                f"{row['tokens_per_second']:,.0f}",
                f"{row['flops_per_token'] / 1e9:.3f}",
                f"{100 * row['share_of_roofline']:.0f} %",
                "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f} GB",
            )
            for row in rows
        ),
    )


def command_line() -> argparse.Namespace:
    """Options, with what depends on the machine filled in."""
    made = parser(__doc__ or "", "training")
    made.add_argument("--shape", default="gpt2", choices=list(SHAPES))
    kinds = [*KINDS, *KRON_KINDS]
    made.add_argument("--kinds", nargs="+", default=DEFAULT, choices=kinds, metavar="KIND")
    made.add_argument("--optimizers", nargs="+", default=["adamw"], choices=OPTIMIZERS)
    made.add_argument("--loss", default=losses.CE, help="with kl or features, a dense teacher")
    made.add_argument("--window", type=int, default=1024)
    made.add_argument("--batch", type=int, default=1, help="windows in a step")
    made.add_argument("--layers", type=int, help="instead of the shape's")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--seconds", type=float, default=5.0, help="of rounds, if repeats are less")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--dtype", choices=("float32", "bfloat16"))
    made.add_argument("--compile", action="store_true", help="torch.compile, all models")
    made.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.small:
        options.window, options.repeats, options.seconds = 16, 1, 0.0
    options.dtype = options.dtype or fastest_dtype(device_here())
    return options


def main() -> None:
    """Time, measure memory, print the table, write the JSON."""
    options, device = command_line(), device_here()
    torch.set_num_threads(options.threads)
    keep_memory()  # as krony heal does, for all kinds
    teacher = teacher_of(options, device)
    if options.only:
        kind, optimizer = options.only
        step = Step(kind, optimizer, options, device, teacher)
        step()
        step()
        print(peak_bytes(step.model) / 1e9)
        return
    record = Record("a step of training, random weights and tokens", options)
    # All kinds with the first optimiser, then the others, of which the dense one tells enough.
    names = [(kind, options.optimizers[0]) for kind in dict.fromkeys([DENSE, *options.kinds])]
    names += [(k, o) for o in options.optimizers[1:] for k in options.kinds if k in KINDS]
    steps: dict[str, Step] = {}
    memory: dict[str, float | None] = {}
    longest = 0.0
    for kind, optimizer in names:
        name, began = f"{kind} / {optimizer}", record.spent
        if record.has_time(name, 2 * longest + options.seconds):
            steps[name], memory[name] = started(kind, optimizer, options, device, teacher)
            longest = max(longest, record.spent - began)
            row = {"model": kind, "optimizer": optimizer, "peak_gb": memory[name]}
            record.add(row | {"seconds": round(record.spent - began, 2)}, "prepared")
            print(f"{name}: ready after {record.spent - began:.1f} s", flush=True)
    gauge = Gauge(device, getattr(torch, options.dtype))
    gauge.read()
    taken = rounds(steps, device, seconds=options.seconds, least=options.repeats)
    gauge.read()
    record.content["roofline_flops_per_second"] = 2 * gauge.rate
    for row in rows_of(steps, memory, taken, options, 2 * gauge.rate):
        record.add(row)
    show(record.content["rows"])


if __name__ == "__main__":
    main()
