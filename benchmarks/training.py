"""A training step of the factored model against the dense one and a torch.kron in every forward.

GPT-2 small's shapes, random weights and tokens. Steps of the models take turns in one process, so
that a machine whose speed drifts drifts for all; peak memory is that of a process for each.

python benchmarks/training.py [--scheme 81M] [--window 1024] [--batch 1] [--repeats 5] [--threads 2]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import krony
from forward import kron_weight
from krony.healing.objective import Objective, returning_loss
from krony.healing.speed import fastest_dtype, flops_per_token
from krony.hf.checkpoints import write_json
from krony.measure import evaluate
from krony.measure.memory import keep_memory, peak_bytes
from krony.nn import activations
from krony.nn.layers import KroneckerLinear
from model import STOCK

# Whether A is first, as in the paper.
KRON_KINDS = {"torch.kron": True, "torch.kron, B first": False}
KINDS = ("dense", STOCK, "factored", *KRON_KINDS)


class FormedByKron(nn.Module):
    """The same factors by torch.kron in every forward: A ⊗ B as in the paper's code, or B ⊗ A."""

    def __init__(self, layer: KroneckerLinear, large_first: bool) -> None:
        super().__init__()
        self.layer, self.large_first = layer, large_first

    def forward(self, x: Tensor) -> Tensor:
        weight = kron_weight(self.layer.groups[0], self.large_first)  # the paper's schemes have one
        return nn.functional.linear(x, weight, self.layer.bias)


def build(kind: str, scheme: str, layers: int) -> transformers.PreTrainedModel:
    """GPT-2 small, or it with factored MLPs."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=layers)
    model = transformers.GPT2LMHeadModel(config)
    if kind == "dense":
        activations.fuse(model)
    elif kind != STOCK:
        krony.compress(model, krony.make_plan(model, scheme=scheme), init="random")
    if kind in KRON_KINDS:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, KroneckerLinear):
                model.set_submodule(name, FormedByKron(layer, KRON_KINDS[kind]))
    return model.train()


class Step:
    """One optimiser step on fixed random tokens."""

    def __init__(self, kind: str, arguments: argparse.Namespace, dtype: str, device: str) -> None:
        self.model = build(kind, arguments.scheme, arguments.layers).to(device)
        self.objective = Objective(self.model, ("ce",))
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        size = (arguments.batch, arguments.window)
        self.ids = torch.randint(0, 50_257, size, device=device)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def __call__(self) -> float:
        start = time.perf_counter()
        with returning_loss(self.model, self.objective), self.autocast:
            loss = self.model(self.ids)["loss"]
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def peak(kind: str, arguments: argparse.Namespace) -> float:
    """Peak memory in GB of a process that takes two steps of one kind."""
    command = [sys.executable, __file__, "--only", kind, "--dtype", arguments.dtype]
    for name in ("scheme", "window", "batch", "layers", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Time, measure memory, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="81M", choices=list(krony.SCHEMES))
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"))
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_memory()  # as krony heal does, for all kinds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.only:
        step = Step(arguments.only, arguments, arguments.dtype, device)
        step(), step()
        print(peak_bytes(step.model) / 1e9)
        return
    arguments.dtype = arguments.dtype or fastest_dtype(torch.device(device))
    memory = {kind: peak(kind, arguments) for kind in KINDS}
    steps = {kind: Step(kind, arguments, arguments.dtype, device) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repeat in range(arguments.repeats + 1):
        for kind, step in steps.items():
            taken = step()
            if repeat:  # the first warms up
                seconds[kind].append(taken)
    tokens = arguments.batch * arguments.window
    rows: list[dict[str, Any]] = []
    for kind, step in steps.items():
        # Ratios within one round, so that a slow round is slow for both.
        dense, kron, kron_b = (
            [other / own for other, own in zip(seconds[against], seconds[kind], strict=True)]
            for against in ("dense", *KRON_KINDS)
        )
        rows.append(
            {
                "model": kind,
                "against_dense": round(statistics.median(dense), 3),
                "spread": [round(min(dense), 3), round(max(dense), 3)],
                "against_kron": round(statistics.median(kron), 3),
                "against_kron_b_first": round(statistics.median(kron_b), 3),
                "tokens_per_second": round(tokens / statistics.median(seconds[kind]), 1),
                "peak_gb": round(memory[kind], 2),
                "flops_per_token": flops_per_token(step.model, step.objective, arguments.window),
            }
        )
    print(
        "| training step | speed against dense | spread | against `torch.kron` | B first "
        "| GFLOP a token | peak memory |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['model']} | {row['against_dense']:.2f}x "
            f"| {row['spread'][0]:.2f} to {row['spread'][1]:.2f} "
            f"| {row['against_kron']:.2f}x | {row['against_kron_b_first']:.2f}x "
            f"| {row['flops_per_token'] / 1e9:.3f} | {row['peak_gb']:.2f} GB |"
        )
    settings = {k: v for k, v in vars(arguments).items() if k not in ("out", "only")}
    write_json(
        arguments.out, {"settings": settings, "rows": rows, "environment": evaluate.environment()}
    )
    print(json.dumps(settings))


if __name__ == "__main__":
    main()
