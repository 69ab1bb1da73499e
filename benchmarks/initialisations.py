"""Initialisations without any training, on the packaged model and its two held-out texts.

Three parts: every method at a half and a quarter of the MLP parameters; each ingredient switched
off in turn; predicted harm against measured loss over many plans.

python benchmarks/initialisations.py [--parts prediction quarter half ablation_quarter]
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr

import krony
import methods
from krony.cli.tables import factors_text, narrowed_text
from krony.compare.lowrank import low_rank_plan
from krony.compression import calibrate, width
from krony.compression.budget import Prices, make_plan_of, price
from krony.compression.factorise import DATA
from krony.compression.limits import Candidate, Currency, choose
from krony.compression.prices import Matrix, with_units
from krony.compression.sequential import DataOptions
from krony.compression.structures import balanced_shapes, sized, widths
from krony.hf.families import Target, dense_weight, find_targets, mlps
from krony.hf.plan import MatrixPlan
from krony.maths.fit import is_low_rank, low_rank_harm
from krony.measure import evaluate
from krony.text import data, docstrings
from records import Record, parser

PARTS = ("prediction", "quarter", "half", "ablation_quarter")
EVALUATED = 65_536  # tokens, the head of each held-out text
Kept = Callable[[Candidate], Candidate | None]


class Bench:
    """The packaged model, its calibration windows and moments, and what was measured so far."""

    def __init__(self, windows: int, evaluated: int = EVALUATED) -> None:
        self.tokenizer = krony.load_tokenizer("demo")
        held_out = data.SEPARATOR.join(docstrings.python_docstrings("validation"))
        self.texts = {
            # Another kind of text than the model was trained and the factors calibrated on.
            "topics": data.load_text("python-docs"),
            "docstrings": data.Text("docstrings", held_out, "held-out docstrings"),
        }
        self.ids = {
            name: evaluate.tokenize(self.tokenizer, text)[:evaluated]
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
        self._prices: dict[tuple[float, tuple[Target, ...], bool], Prices] = {}

    def model(self) -> transformers.PreTrainedModel:
        """A fresh copy of the packaged model."""
        return krony.load_model("demo", torch.float32)

    def priced(self, share: float, targets: list[Target], narrow: bool) -> Prices:
        """What the budget planner chooses from for these targets at that share, priced once."""
        key = share, tuple(targets), narrow
        if key not in self._prices:
            most = parameters(share, targets)
            self._prices[key] = price(
                self.model(), targets, self.moments, most, narrow=narrow, sums=True
            )
        return self._prices[key]

    def budget(self, share: float, kept: Kept = lambda c: c, narrow: bool = True) -> krony.Plan:
        """The planner's choice, of what `kept` makes of each candidate (None: not that one)."""
        prices = self.priced(share, self.targets, narrow)
        rows = [[k for c in row if (k := kept(c)) is not None] for row in prices.rows]
        return make_plan_of(prices.targets, choose(rows, parameters(share, self.targets)))

    def uniform(self, share: float, narrow: bool = True) -> krony.Plan:
        """The planner's choice for each MLP, or without narrowing matrix, alone at that share."""
        found: tuple[MatrixPlan, ...] = ()
        together = [list(mlp.targets) for mlp in mlps(self.model(), self.targets)]
        for targets in together if narrow else [[t] for t in self.targets]:
            prices = self.priced(share, targets, narrow)
            chosen = choose(prices.rows, parameters(share, targets))
            found += make_plan_of(prices.targets, chosen).matrices
        return krony.Plan(found)

    def measure(
        self, plan: krony.Plan, init: str, options: DataOptions | None = None
    ) -> dict[str, Any]:
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
        model.dequantize()  # equal up to rounding, and faster on long text
        row: dict[str, Any] = {}
        for name, ids in self.ids.items():
            perplexity = evaluate.perplexity(model, ids).perplexity
            ratio = perplexity / self.dense[name].perplexity
            row[name] = {"perplexity": perplexity, "against_dense": ratio}
        whole = sum(t.shape[0] * t.shape[1] for t in self.targets)
        dense = whole - plan.dense_parameters  # matrices that the plan leaves as they are
        if init == DATA:
            row["plan"] = {
                m.name: [
                    narrowed_text(m.shape, m.dense_shape),
                    *(factors_text(g.terms, g.large, g.small, g.interpolative) for g in m.groups),
                ]
                for m in plan.matrices
            }
        return {
            **row,
            "share": round((dense + plan.parameters) / whole, 4),
            "multiply_adds": round((dense + plan.multiply_adds) / whole, 3),
            "seconds": round(seconds, 1),
        }


def parameters(share: float, targets: list[Target]) -> dict[Currency, float]:
    """That share of the targets' parameters, as a limit."""
    return {"parameters": int(share * sum(t.shape[0] * t.shape[1] for t in targets))}


Job = tuple[str, krony.Plan, str, DataOptions | None]


def every_method(bench: Bench, share: float) -> list[Job]:
    """Every method at one share of the MLP parameters."""
    model = bench.model()

    def job(label: str, name: str, init: str | None = None) -> Job:
        start = methods.named(model, name, share, bench.moments)
        return label, start.plan, init or start.init, start.options

    return [
        job("paper, van-loan", "van-loan"),
        job("paper, van-loan-scaled", "van-loan-scaled"),
        job("paper, prune", "prune"),
        job("one term, data", methods.ONE_TERM),
        job("low rank, whitened SVD", methods.WHITENED),
        job("low rank, data", methods.LOW_RANK),
        job("balanced sum, van-loan", methods.SUMS, "van-loan"),
        job("balanced sum, data", methods.SUMS),
        job("narrowed, data", methods.NARROW),
        ("mixed, uniform shares", bench.uniform(share, narrow=False), DATA, None),
        ("budget, all units", bench.budget(share, narrow=False), DATA, None),
        ("budget, data", bench.budget(share), DATA, None),
    ]


def ablation(bench: Bench, share: float) -> list[Job]:
    """The budget plan with each ingredient, of the fit and then of the plan, removed in turn."""
    plan = bench.budget(share)
    jobs: list[Job] = [("nothing", plan, DATA, None)]
    for off in ("sequential", "residual", "bias", "centered", "gradients"):
        jobs.append((off, plan, DATA, DataOptions(**{off: False})))
    return [
        *jobs,
        ("narrowing", bench.budget(share, narrow=False), DATA, None),
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
        replace(m, groups=(sized(*balanced_shapes(m.shape), m.parameters / m.formed),))
        for m in plan.matrices
    ]
    return krony.Plan(tuple(matrices))


def prediction(bench: Bench, plans: int, seed: int = 0) -> dict[str, Any]:
    """Predicted harm against measured loss: random plans over a wide range of sizes, with hidden
    units taken out of three MLPs in four, and low rank in every matrix."""
    generator = np.random.default_rng(seed)
    model, points, ways = bench.model(), [], []
    for mlp in mlps(model, bench.targets):
        matrices = [
            Matrix(t, dense_weight(model.get_submodule(t.name)), bench.moments[t.name])
            for t in mlp.targets
        ]
        down, ways_here = matrices[-1], []
        order = width.elimination(down.weight, down.metric)
        for hidden in widths(mlp.down.hidden)[:7:2]:
            units = width.narrow(down.weight, down.metric, order, hidden)
            mine = [with_units(matrix, units) for matrix in matrices]
            harms = [low_rank_harm(matrix.weight, matrix.metric) for matrix in mine]
            ways_here.append((units.harm, [m.target for m in mine], harms))
        ways.append(ways_here)
    for _ in range(plans):
        middle, harm = generator.uniform(0.2, 0.7), 0.0
        chosen: list[tuple[Target, int]] = []
        for way in ways:
            lost, targets, harms = way[generator.integers(len(way))]
            harm += lost
            for target, prices in zip(targets, harms, strict=True):
                share = float(np.clip(middle * generator.lognormal(0, 0.5), 0.05, 0.79))
                rank = int(share * target.shape[0] * target.shape[1] / sum(target.shape))
                harm += float(prices[rank])
                chosen.append((target, rank))
        plan = low_rank_plan([t for t, _ in chosen], [rank for _, rank in chosen])
        row = bench.measure(plan, DATA, DataOptions(sequential=False))
        points.append(
            {"predicted": harm, "measured": float(np.log(row["topics"]["against_dense"]))}
        )
    correlation = spearmanr([p["predicted"] for p in points], [p["measured"] for p in points])
    print(f"rank correlation over {plans} plans: {correlation.statistic:.3f}", flush=True)
    return {"spearman": float(correlation.statistic), "points": points}


def main() -> None:
    """Run all parts and write them."""
    made = parser(__doc__ or "", "initialisations")
    made.add_argument("--windows", type=int, default=256)
    made.add_argument("--plans", type=int, default=24)
    made.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = made.parse_args()
    if options.small:
        options.windows, options.plans, options.parts = 4, 2, options.parts[:1]
    transformers.logging.disable_progress_bar()
    # A part that is not run again keeps its last figures.
    record = Record("initialisations without training, packaged model", options, keep=True)
    bench = Bench(options.windows, 1024 if options.small else EVALUATED)
    record.content |= {
        "calibration": f"python-docstrings, {len(bench.windows)} windows of 256 tokens",
        "dense": {name: found.to_dict() for name, found in bench.dense.items()},
    }
    print({name: round(found.perplexity, 3) for name, found in bench.dense.items()})
    runs: dict[str, Callable[[], Any]] = {
        "prediction": lambda: prediction(bench, options.plans),
        "quarter": lambda: measured(bench, every_method(bench, 0.25)),
        "half": lambda: measured(bench, every_method(bench, 0.5)),
        "ablation_quarter": lambda: measured(bench, ablation(bench, 0.25)),
    }
    for part in options.parts:
        if record.has_time(part):
            record.content[part] = runs[part]()
            record.write()


if __name__ == "__main__":
    main()
