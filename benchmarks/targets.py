"""Which matrices to save in: any model, MLPs alone and the whole model, no training.

First the methods on the MLPs at a quarter and a half, as in initialisations.py, for a model of any
family; then the embedding alone (and an output matrix of its own); then one size for the whole
model, spent on the MLPs alone, on the blocks, or on everything with the embedding. Perplexity on
the language reference and on held-out docstrings.

python benchmarks/targets.py MODEL --out FILE [--parts quarter half embedding whole]
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import krony
import methods
from krony.cli import tables
from krony.compression import calibrate
from krony.compression.budget import make_budget_plan
from krony.compression.factorise import DATA, collect
from krony.compression.structures import balanced_shapes, sized
from krony.hf.families import Target, find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.measure import evaluate
from krony.measure.info import parameters
from krony.text import data, docstrings
from records import Record, parser

SHARES = {"quarter": 0.25, "half": 0.5}
WHOLE = 0.6  # of the model's parameters


class Bench:
    """One model, its calibration windows and moments, and both texts."""

    def __init__(self, source: str, windows: int, tokens: int) -> None:
        self.source, tokenizer = source, krony.load_tokenizer(source)
        # Of few packages: importing all of them takes minutes.
        documents = docstrings.python_docstrings("validation", ("stdlib", "numpy", "scipy"))
        held_out = data.SEPARATOR.join(documents)
        texts = {
            "topics": data.load_text("python-docs"),
            "docstrings": data.Text("docstrings", held_out, "held-out docstrings"),
        }
        self.ids = {n: evaluate.tokenize(tokenizer, text)[:tokens] for n, text in texts.items()}
        model = self.model()
        self.windows = calibrate.calibration_windows("python-docstrings", model, tokenizer, windows)
        everything = find_targets(model, "everything")
        ends = [t for t in everything if t.role in ("embedding", "head")]
        names = [t.name for t in everything if t not in ends]
        self.moments = collect(model, self.windows, names, ends)
        self.dense = {n: evaluate.perplexity(model, ids) for n, ids in self.ids.items()}

    def model(self) -> transformers.PreTrainedModel:
        """A fresh copy."""
        return krony.load_model(self.source, torch.float32)

    def measure(
        self, name: str, plan: Plan, init: str, options: krony.DataOptions | None = None
    ) -> dict[str, Any]:
        """Compress and evaluate; a JSON-ready row, printed."""
        model, started = self.model(), time.perf_counter()
        moments = {m.name: self.moments[m.name] for m in plan.matrices}
        krony.compress(
            model, plan, init=init, calibration=self.windows, moments=moments, options=options
        )
        row: dict[str, Any] = {
            "method": name,
            "share": round(plan.parameters / plan.dense_parameters, 4),
            "parameters": parameters(model),
            "seconds": round(time.perf_counter() - started, 1),
        }
        model.dequantize()  # equal up to rounding, and faster
        for text, ids in self.ids.items():
            found = evaluate.perplexity(model, ids).perplexity
            ratio = found / self.dense[text].perplexity
            row[text] = {"perplexity": found, "against_dense": ratio}
        ratios = "  ".join(f"{n} {row[n]['against_dense']:9.3f}x" for n in self.ids)
        print(f"{name:28} {row['parameters']:>10,}  {ratios}  {row['seconds']} s", flush=True)
        return row


def every_method(bench: Bench, share: float) -> list[dict[str, Any]]:
    """Every method on the MLPs at one share."""
    model = bench.model()
    targets = find_targets(model, "mlp")

    def uniform(shapes: Callable[[Target], krony.Factors]) -> Plan:
        return Plan(tuple(matrix_plan(t, (shapes(t),)) for t in targets))

    paper = krony.make_plan(model, small=methods.SMALL[share], layout="large-outer")
    svd = methods.named(model, methods.WHITENED, share)
    low_rank = uniform(lambda t: sized((t.shape[0], 1), (1, t.shape[1]), share))
    sums = uniform(lambda t: sized(*balanced_shapes(t.shape), share))
    narrow = methods.named(model, methods.NARROW, share)
    known: dict[str, Any] = {"share": share, "moments": bench.moments}
    units = make_budget_plan(model, bench.windows, narrow=False, **known)
    found = make_budget_plan(model, bench.windows, **known)
    return [
        bench.measure("paper, van-loan", paper, "van-loan"),
        bench.measure("paper, van-loan-scaled", paper, "van-loan-scaled"),
        bench.measure("paper, prune", paper, "prune"),
        bench.measure(methods.WHITENED, svd.plan, svd.init, svd.options),
        bench.measure("low rank, data", low_rank, DATA),
        bench.measure("balanced sum, data", sums, DATA),
        bench.measure("narrowed, data", narrow.plan, narrow.init),
        {**bench.measure("budget, all units", units.plan, DATA), "predicted_nats": units.harm},
        {**bench.measure("budget, data", found.plan, DATA), "predicted_nats": found.harm},
    ]


def embedding(bench: Bench) -> list[dict[str, Any]]:
    """Low rank in the embedding alone, nearest to the weights and of least harm."""
    targets, rows = find_targets(bench.model(), "embedding"), []
    for share in (0.75, 0.5, 0.25):
        shapes = [sized((t.shape[0], 1), (1, t.shape[1]), share) for t in targets]
        plan = Plan(tuple(matrix_plan(t, (f,)) for t, f in zip(targets, shapes, strict=True)))
        rows += [bench.measure(f"{share:.2f} {init}", plan, init) for init in ("van-loan", DATA)]
    return rows


def whole(bench: Bench) -> list[dict[str, Any]]:
    """One size for the whole model, spent on ever more of it."""
    model, rows = bench.model(), []
    size = int(WHOLE * parameters(model))
    for target in ("mlp", "all", "everything"):
        least = parameters(model) - sum(
            t.shape[0] * t.shape[1] for t in find_targets(model, target)
        )
        if least > 0.95 * size:
            print(
                f"{target}: what is left alone has {least:,} parameters, and the goal is {size:,}"
            )
            continue
        found = make_budget_plan(
            model, bench.windows, parameters=size, target=target, moments=bench.moments
        )
        row = bench.measure(target, found.plan, DATA)
        kinds = {
            m.name: [
                tables.structure(m.groups, m.narrowed),
                round(m.parameters / m.dense_parameters, 3),
            ]
            for m in found.plan.matrices
        }
        rows.append({**row, "predicted_nats": found.harm, "matrices": kinds})
    return rows


def main() -> None:
    """Run the parts and write them."""
    made = parser(__doc__ or "", "targets")
    made.add_argument("model", help="a directory, a Hub name, or demo")
    made.add_argument("--windows", type=int, default=128)
    made.add_argument("--tokens", type=int, default=32_768, help="read of each text")
    made.add_argument("--parts", nargs="+", default=[*SHARES, "embedding", "whole"])
    options = made.parse_args()
    if options.small:
        options.windows, options.tokens, options.parts = 4, 1024, ["embedding"]
    transformers.logging.disable_progress_bar()
    # A part that is not run again keeps its last figures.
    record = Record("what is compressed, and how, without training", options, keep=True)
    bench = Bench(options.model, options.windows, options.tokens)
    record.content |= {
        "calibration": f"python-docstrings, {len(bench.windows)} windows of 256 tokens",
        "dense_parameters": parameters(bench.model()),
        "dense": {name: found.to_dict() for name, found in bench.dense.items()},
    }
    print({name: round(found.perplexity, 3) for name, found in bench.dense.items()}, flush=True)
    for part in options.parts:
        if not record.has_time(part):
            continue
        if part in SHARES:
            record.content[part] = every_method(bench, SHARES[part])
        else:
            record.content[part] = {"embedding": embedding, "whole": whole}[part](bench)
        record.write()


if __name__ == "__main__":
    main()
