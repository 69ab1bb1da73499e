"""Initialisations without any training, on the packaged model and its two held-out texts.

Three parts: every method at a half and a quarter of the MLP parameters; each ingredient switched
off in turn; predicted harm against measured loss over many plans.

python benchmarks/initialisations.py [--parts prediction quarter half ablation_quarter]
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr

import krony
import starts
from krony import calibrate, data, docstrings, evaluate
from krony.budget import (
    balanced_shapes,
    make_candidates,
    make_plan_of,
    sized,
)
from krony.checkpoints import write_json
from krony.factorise import DATA
from krony.families import dense_weight, find_targets
from krony.fit import Metric, is_low_rank, spectrum
from krony.limits import Candidate, choose
from krony.sequential import DataOptions
from krony.tables import factors_text

PARTS = ("prediction", "quarter", "half", "ablation_quarter")
EVALUATED = 65_536  # tokens, the head of each held-out text
Kept = Callable[[Candidate], Candidate | None]


class Bench:
    """The packaged model, its calibration windows and moments, and what was measured so far."""

    def __init__(self, windows: int) -> None:
        self.tokenizer = krony.load_tokenizer("demo")
        held_out = data.SEPARATOR.join(docstrings.python_docstrings("validation"))
        self.texts = {
            # Another kind of text than the model was trained and the factors calibrated on.
            "topics": data.load_text("python-docs"),
            "docstrings": data.Text("docstrings", held_out, "held-out docstrings"),
        }
        self.ids = {
            name: evaluate.tokenize(self.tokenizer, text)[:EVALUATED]
            for name, text in self.texts.items()
        }
        model = self.model()
        self.windows = calibrate.calibration_windows(
            "python-docstrings", model, self.tokenizer, windows
        )
        self.targets = find_targets(model, "mlp")
        names = [t.name for t in self.targets]
        self.moments = calibrate.calibrate(model, self.windows, names)
        self.dense = {
            name: evaluate.perplexity(model, ids, self.texts[name])
            for name, ids in self.ids.items()
        }
        self._candidates: list[list[Candidate]] = []

    def model(self) -> transformers.PreTrainedModel:
        """A fresh copy of the packaged model."""
        return krony.load_model("demo", torch.float32)

    @property
    def candidates(self) -> list[list[Candidate]]:
        """What the budget planner chooses from, priced once."""
        if not self._candidates:
            model = self.model()
            for t in self.targets:
                weight = dense_weight(model.get_submodule(t.name)).detach().double()
                moments = self.moments[t.name]
                self._candidates.append(make_candidates(t, weight, moments, "size"))
        return self._candidates

    def budget(self, share: float, kept: Kept = lambda c: c) -> krony.Plan:
        """The planner's choice, of what `kept` makes of each candidate (None: not that one)."""
        rows = [[k for c in row if (k := kept(c)) is not None] for row in self.candidates]
        whole = sum(t.shape[0] * t.shape[1] for t in self.targets)
        return make_plan_of(self.targets, choose(rows, {"parameters": int(share * whole)}))

    def uniform(self, share: float) -> krony.Plan:
        """The best structure for each matrix, all of them at the same share."""
        chosen = [
            choose([row], {"parameters": int(share * t.shape[0] * t.shape[1])})[0]
            for t, row in zip(self.targets, self.candidates, strict=True)
        ]
        return make_plan_of(self.targets, chosen)

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
        model.dequantize()  # type: ignore[operator]  # equal up to rounding, and faster on long text
        row: dict[str, Any] = {}
        for name, ids in self.ids.items():
            perplexity = evaluate.perplexity(model, ids).perplexity
            ratio = perplexity / self.dense[name].perplexity
            row[name] = {"perplexity": perplexity, "against_dense": ratio}
        whole = sum(t.shape[0] * t.shape[1] for t in self.targets)
        dense = whole - plan.dense_parameters  # matrices that the plan leaves as they are
        if init == DATA:
            row["plan"] = {
                m.name: [factors_text(g.terms, g.large, g.small, g.interpolative) for g in m.groups]
                for m in plan.matrices
            }
        return {
            **row,
            "share": round((dense + plan.parameters) / whole, 4),
            "multiply_adds": round((dense + plan.multiply_adds) / whole, 3),
            "seconds": round(seconds, 1),
        }


Job = tuple[str, krony.Plan, str, DataOptions | None]


def methods(bench: Bench, share: float) -> list[Job]:
    """Every method at one share of the MLP parameters."""
    model = bench.model()

    def job(label: str, name: str, init: str | None = None) -> Job:
        start = starts.named(model, name, share)
        return label, start.plan, init or start.init, start.options

    return [
        job("paper, van-loan", "van-loan"),
        job("paper, van-loan-scaled", "van-loan-scaled"),
        job("paper, prune", "prune"),
        job("one term, data", starts.ONE_TERM),
        job("low rank, whitened SVD", starts.WHITENED),
        job("low rank, data", starts.LOW_RANK),
        job("balanced sum, van-loan", starts.SUMS, "van-loan"),
        job("balanced sum, data", starts.SUMS),
        ("mixed, uniform shares", bench.uniform(share), DATA, None),
        ("budget, data", bench.budget(share), DATA, None),
    ]


def ablation(bench: Bench, share: float) -> list[Job]:
    """The budget plan with each ingredient, of the fit and then of the plan, removed in turn."""
    plan = bench.budget(share)
    jobs: list[Job] = [("nothing", plan, DATA, None)]
    for off in ("sequential", "residual", "bias", "centred", "gradients"):
        jobs.append((off, plan, DATA, DataOptions(**{off: False})))
    return [
        *jobs,
        ("allocation", bench.uniform(share), DATA, None),
        ("interpolative form", bench.budget(share, plain), DATA, None),
        ("Kronecker sums", bench.budget(share, low_rank_only), DATA, None),
        ("low rank", kronecker_only(plan), DATA, None),
    ]


def measured(bench: Bench, jobs: list[Job]) -> list[dict[str, Any]]:
    """A row a job, printed as they come."""
    rows = []
    for name, plan, init, options in jobs:
        rows.append({"name": name, **bench.measure(plan, init, options)})
        show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    texts = "  ".join(f"{t} {row[t]['against_dense']:10.3f}x" for t in ("topics", "docstrings"))
    print(f"{row['name']:24} {texts}  {row['share']:.4f}  {row['seconds']:6.1f} s", flush=True)


def plain(candidate: Candidate) -> Candidate | None:
    """The same candidate in the ordinary form, unless it is dearer than the dense matrix."""
    if not candidate.groups:
        return candidate
    groups = tuple(replace(g, interpolative=False) for g in candidate.groups)
    cost = sum(g.parameters for g in groups)
    m, n = groups[0].shape
    return replace(candidate, groups=groups, parameters=cost) if cost < m * n else None


def low_rank_only(candidate: Candidate) -> Candidate | None:
    """The candidate if it has no Kronecker sum."""
    return candidate if all(is_low_rank(g) for g in candidate.groups) else None


def kronecker_only(plan: krony.Plan) -> krony.Plan:
    """The same parameters for each matrix, all of them in one balanced sum."""
    matrices = [
        replace(m, groups=(sized(*balanced_shapes(m.shape), m.parameters / m.dense_parameters),))
        for m in plan.matrices
    ]
    return krony.Plan(tuple(matrices))


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
        plan = starts.low_rank_plan(bench.targets, ranks)
        row = bench.measure(plan, DATA, DataOptions(sequential=False))
        points.append(
            {"predicted": harm, "measured": float(np.log(row["topics"]["against_dense"]))}
        )
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
        "dense": {name: found.to_dict() for name, found in bench.dense.items()},
    }
    print({name: round(found.perplexity, 3) for name, found in bench.dense.items()})
    runs: dict[str, Callable[[], Any]] = {
        "prediction": lambda: prediction(bench, arguments.plans),
        "quarter": lambda: measured(bench, methods(bench, 0.25)),
        "half": lambda: measured(bench, methods(bench, 0.5)),
        "ablation_quarter": lambda: measured(bench, ablation(bench, 0.25)),
    }
    for part in arguments.parts:
        record[part] = runs[part]()
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
