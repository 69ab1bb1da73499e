"""Initialisations without any training, on the packaged model and its held-out text.

Three parts: every method at a half and a quarter of the MLP parameters; each ingredient of the data
initialisation switched off in turn; predicted harm against measured loss over many plans.

python benchmarks/initialisations.py [--parts prediction quarter half ablation_quarter]
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr

import krony
from krony import calibrate, data, evaluate
from krony.budget import make_budget_plan
from krony.checkpoints import write_json
from krony.factorise import DATA
from krony.families import find_targets
from krony.fit import Metric, spectrum
from krony.sequential import DataOptions

PARTS = ("prediction", "quarter", "half", "ablation_quarter")
EVALUATED = 65_536  # tokens, the head of the held-out text
WEIGHTS_ONLY = DataOptions(sequential=False, gradients=False)


def low_rank_plan(targets: list[Any], ranks: list[int]) -> krony.Plan:
    """The low-rank corner at the given ranks."""
    return krony.Plan(
        tuple(
            krony.MatrixPlan(
                t.name,
                t.shape,
                (krony.Factors((t.shape[0], 1), (1, t.shape[1]), rank),),
                False,
                t.bias,
                t.conv1d,
            )
            for t, rank in zip(targets, ranks, strict=True)
        )
    )


def mixed_plan(targets: list[Any], share: float) -> krony.Plan:
    """Half of the share low rank, half a balanced Kronecker sum, in every matrix."""
    matrices = []
    for t in targets:
        m, n = t.shape
        large = (m // 16, n // 16)
        rank = int(share / 2 * m * n / (m + n))
        terms = int(share / 2 * m * n / krony.Factors(large, (16, 16)).parameters)
        groups = (krony.Factors((m, 1), (1, n), rank), krony.Factors(large, (16, 16), terms))
        matrices.append(krony.MatrixPlan(t.name, t.shape, groups, False, t.bias, t.conv1d))
    return krony.Plan(tuple(matrices))


class Bench:
    """The packaged model, its calibration windows and moments, and what was measured so far."""

    def __init__(self, windows: int) -> None:
        self.tokenizer = krony.load_tokenizer("demo")
        self.ids = evaluate.tokenize(self.tokenizer, data.load_text("python-docs"))[:EVALUATED]
        model = self.model()
        self.windows = calibrate.calibration_windows(
            "python-docstrings", model, self.tokenizer, windows
        )
        self.targets = find_targets(model, "mlp")
        names = [t.name for t in self.targets]
        self.moments = calibrate.calibrate(model, self.windows, names)
        self.dense = evaluate.perplexity(model, self.ids)

    def model(self) -> transformers.PreTrainedModel:
        """A fresh copy of the packaged model."""
        return krony.load_model("demo", torch.float32)

    def measure(self, plan: krony.Plan, init: str, options: DataOptions | None = None) -> dict:
        """Compress, evaluate; a JSON-ready row."""
        model, started = self.model(), time.perf_counter()
        krony.compress(
            model,
            plan,
            init=init,
            calibration=self.windows,
            moments=self.moments,
            options=options,
        )
        seconds = time.perf_counter() - started
        perplexity = evaluate.perplexity(model, self.ids).perplexity
        return {
            "share": round(plan.parameters / sum(t.shape[0] * t.shape[1] for t in self.targets), 4),
            "perplexity": perplexity,
            "against_dense": perplexity / self.dense.perplexity,
            "multiply_adds": round(plan.multiply_adds / plan.dense_parameters, 3),
            "seconds": round(seconds, 1),
        }


def methods(bench: Bench, share: float) -> list[dict[str, Any]]:
    """Every method at one share of the MLP parameters."""
    model, targets = bench.model(), bench.targets
    small = {0.5: (2, 1), 0.25: (2, 2)}[share]
    paper = krony.make_plan(model, small=small)
    ranks = [int(share * t.shape[0] * t.shape[1] / sum(t.shape)) for t in targets]
    one = krony.Factors((64, 16), (16, 16)).parameters
    sums = krony.make_plan(model, small=(16, 16), terms=int(share * 1024 * 256 / one))
    jobs: list[tuple[str, Callable[[], tuple[krony.Plan, str, DataOptions | None]]]] = [
        ("paper, van-loan", lambda: (paper, "van-loan", None)),
        ("paper, van-loan-scaled", lambda: (paper, "van-loan-scaled", None)),
        ("paper, prune", lambda: (paper, "prune", None)),
        ("one term, data", lambda: (paper, DATA, None)),
        ("low rank, whitened SVD", lambda: (low_rank_plan(targets, ranks), DATA, WEIGHTS_ONLY)),
        ("low rank, data", lambda: (low_rank_plan(targets, ranks), DATA, None)),
        ("balanced sum, van-loan", lambda: (sums, "van-loan", None)),
        ("balanced sum, data", lambda: (sums, DATA, None)),
        ("both groups, data", lambda: (mixed_plan(targets, share), DATA, None)),
    ]
    rows = [{"method": name, **bench.measure(*job())} for name, job in jobs]
    found = make_budget_plan(model, bench.windows, share=share, moments=bench.moments)
    row = {"method": "budget, data", **bench.measure(found.plan, DATA)}
    row["predicted_nats"] = found.harm
    row["plan"] = {
        m.name: [f"{g.terms} x {g.large} by {g.small}" for g in m.groups]
        for m in found.plan.matrices
    }
    rows.append(row)
    for row in rows:
        print(f"{share:.2f} {row['method']:24} {row['perplexity']:12,.2f} "
              f"{row['against_dense']:10.3f}x {row['seconds']:7.1f} s", flush=True)  # fmt: skip
    return rows


def ablation(bench: Bench, share: float) -> list[dict[str, Any]]:
    """The budget plan with each ingredient of the data initialisation removed in turn."""
    model = bench.model()
    plan = make_budget_plan(model, bench.windows, share=share, moments=bench.moments).plan
    rows = []
    for off in (None, "sequential", "bias", "centred", "gradients"):
        options = DataOptions(**{off: False}) if off else DataOptions()
        rows.append({"without": off or "nothing", **bench.measure(plan, DATA, options)})
        print(f"without {rows[-1]['without']:12} {rows[-1]['perplexity']:10.2f}", flush=True)
    return rows


def prediction(bench: Bench, plans: int, seed: int = 0) -> dict[str, Any]:
    """Predicted harm against measured loss: random low-rank plans over a wide range of sizes."""
    generator = np.random.default_rng(seed)
    model, points = bench.model(), []
    tails = {}
    for t in bench.targets:
        weight = model.get_submodule(t.name).weight.T.detach().double()
        moments = bench.moments[t.name]
        metric = Metric.of(moments.inputs.covariance, moments.gradient, t.shape[0])
        tails[t.name] = spectrum(weight, metric).square()
    for _ in range(plans):
        middle = generator.uniform(0.2, 0.7)
        shares = np.clip(middle * generator.lognormal(0, 0.5, len(bench.targets)), 0.05, 0.79)
        ranks = [
            int(s * t.shape[0] * t.shape[1] / sum(t.shape))
            for s, t in zip(shares, bench.targets, strict=True)
        ]
        harm = sum(
            0.5 * float(tails[t.name][rank:].sum())
            for t, rank in zip(bench.targets, ranks, strict=True)
        )
        plan = low_rank_plan(bench.targets, ranks)
        row = bench.measure(plan, DATA, DataOptions(sequential=False))
        points.append({"predicted": harm, "measured": float(np.log(row["against_dense"]))})
    correlation = spearmanr([p["predicted"] for p in points], [p["measured"] for p in points])
    print(f"rank correlation over {plans} plans: {correlation.statistic:.3f}", flush=True)
    return {"spearman": float(correlation.statistic), "points": points}


def main() -> None:
    """Run all three parts and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/initialisations.json"))
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    bench = Bench(arguments.windows)
    # A part that is not run again keeps its last figures.
    record: dict[str, Any] = {}
    if arguments.out.exists():
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
    record |= {
        "environment": evaluate.environment(),
        "seed": 0,
        "calibration": f"python-docstrings, {len(bench.windows)} windows of 256 tokens",
        "dense": bench.dense.to_dict(),
    }
    print(f"dense {bench.dense.perplexity:.3f}")
    runs: dict[str, Callable[[], Any]] = {
        "prediction": lambda: prediction(bench, arguments.plans),
        "quarter": lambda: methods(bench, 0.25),
        "half": lambda: methods(bench, 0.5),
        "ablation_quarter": lambda: ablation(bench, 0.25),
    }
    for part in arguments.parts:
        record[part] = runs[part]()
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
