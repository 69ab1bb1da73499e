"""Whole models of known shapes with random weights: decode and prefill, factored against dense.

All models take turns in one process (`krony.bench`); greedy decode of 128 tokens at batch 1 under
a bare loop over the forward and under transformers' generate, at batch 8, and prefills.

python benchmarks/model.py [--layers 12] [--prefill 128 1024] [--new 128] [--threads 1 2]
                           [--dtypes float32 bfloat16]
python benchmarks/model.py --shape 1.5b --dtypes bfloat16 --compile --batches 1 8 64    # on a GPU
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers

import krony
from krony.compare.lowrank import low_rank_plan
from krony.compression.structures import LOW_RANK_PARTS, low_rank, mixed
from krony.hf import modeling
from krony.hf.checkpoints import DTYPES
from krony.hf.families import find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.measure import bench, info
from krony.measure.bench import times
from krony.measure.memory import keep_memory
from krony.measure.runtimes import Runner
from krony.nn import activations, mlp
from records import Record, parser
from shapes import DENSE, KINDS, SHAPES, STOCK
from shapes import build as build_shape

MIXED = partial(mixed, part=LOW_RANK_PARTS[-1])
# What `krony plan demo --budget 0.25` finds in the packaged model's four blocks, with the
# objectives size and decode: sixteenths of the hidden units, and the share of the parameters of
# what is left of the matrices. GPT-2's twelve blocks take them in turn.
FOUND = {
    "size": ((8, 0.70, low_rank), (5, 0.47, MIXED), (5, 0.57, MIXED), (8, 0.64, MIXED)),
    "decode": ((9, 0.58, low_rank), (5, 0.48, low_rank), (5, 0.53, low_rank), (8, 0.69, low_rank)),
}
# The paper's models by the shape of the large factor (c_fc's; c_proj gets its transpose), and what
# budgets make of MLPs: fewer hidden units, and factors in what is left.
MODELS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    STOCK: None,
    "81M, (1536, 384) x (2, 2)": {"shape": (1536, 384)},
    "81M, (768, 768) x (4, 1)": {"shape": (768, 768)},
    "96M, (1536, 768) x (2, 1)": {"shape": (1536, 768)},
    "92M-4, 4 of (1024, 256) x (3, 3)": {"shape": (1024, 256), "terms": 4},
    "narrowed to a quarter": {"hidden": 768},
    "narrowed to a half, low rank 256": {"hidden": 1536, "rank": 256},
    "a quarter by a budget": {"found": "size"},
    "a quarter by a budget for decode": {"found": "decode"},
}
REFERENCE = DENSE
# Of the other shapes: whoever has a minute for a model of 7B has none for all of them.
FEW = [DENSE, "factored, 2x2", "plain, a quarter of the units", "narrowed to a half, low rank"]


def build(name: str, layers: int, context: int) -> transformers.PreTrainedModel:
    """GPT-2 small with so many layers, or it with factored MLPs."""
    torch.manual_seed(0)
    made = dict(MODELS[name] or {})
    hidden = made.pop("hidden", 4 * transformers.GPT2Config().n_embd)
    config = transformers.GPT2Config(n_layer=layers, n_positions=context, n_inner=hidden)
    model = transformers.GPT2LMHeadModel(config)
    model.eval()
    if "found" in made:
        _found(model, FOUND[made["found"]])
    elif "rank" in made:
        targets = find_targets(model, "mlp")
        plan = low_rank_plan(targets, [made["rank"]] * len(targets))
        krony.compress(model, plan, init="random")
    elif made:
        krony.compress(model, krony.make_plan(model, **made), init="random")
    elif name != STOCK:
        activations.fuse(model)
        if "hidden" in (MODELS[name] or {}):  # what loading a model that a budget narrowed does
            mlp.install(model, [t.name for t in find_targets(model, "mlp")])
    return model


def _found(model: transformers.PreTrainedModel, blocks: Sequence[Any]) -> None:
    """Random factors in the shapes that a budget finds."""
    matrices = []
    for target in find_targets(model, "mlp"):
        sixteenths, share, shapes = blocks[(target.layer or 0) % len(blocks)]
        fewer = target.narrowed(target.hidden * sixteenths // 16)
        factors = shapes(fewer.shape, share)
        groups = factors if isinstance(factors, tuple) else (factors,)
        matrices.append(matrix_plan(fewer, groups))
    for matrix in matrices:
        modeling.install(model, matrix, modeling.build_layer(matrix))
    modeling.attach(model, krony.KroneckerConfig(Plan(tuple(matrices)).to_dict()))
    model.eval()


def workloads(
    arguments: argparse.Namespace, vocabulary: int, device: torch.device
) -> list[bench.Workload]:
    """Decode of one row under both runtimes, of more by the bare loop, prefills; random tokens."""
    generator = torch.Generator().manual_seed(arguments.seed)
    longest = max(*arguments.prefill, bench.PROMPT)
    ids = torch.randint(vocabulary, (1, longest), generator=generator).to(device)
    prompt = ids[:, : bench.PROMPT]
    decodes = []
    for batch in arguments.batches:
        runtimes = (
            ("bare loop", "generate") if batch == 1 and not arguments.bare else ("bare loop",)
        )
        rows = prompt.repeat(batch, 1)
        decodes += [bench.decode(rows, arguments.new, runtime) for runtime in runtimes]
    return [*decodes, *(bench.prefill(ids[:, :length]) for length in arguments.prefill)]


def cell(figures: dict[str, Any]) -> str:
    """Speed with its spread, and the share of the roofline."""
    share = f"{100 * figures['roofline']['share']:.0f} %"
    if "speed" not in figures:
        return f"1.00x, {share}"
    low, high = figures["speed_spread"]
    return f"{times(figures['speed'])} ({low:.2f} to {high:.2f}), {share}"


def command_line() -> argparse.Namespace:
    """Options; small ones are filled in."""
    made = parser(__doc__ or "", "model")
    made.add_argument("--shape", default="gpt2", choices=list(SHAPES))
    made.add_argument("--layers", type=int, help="instead of the shape's")
    made.add_argument("--prefill", type=int, nargs="+", default=[128, 1024])
    made.add_argument("--new", type=int, default=128)
    made.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    made.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    made.add_argument("--compile", action="store_true", help="the bare loop's steps")
    made.add_argument("--batches", type=int, nargs="+", default=[1, bench.BATCHES[-1]])
    made.add_argument("--bare", action="store_true", help="leave out transformers' generate")
    names = [*MODELS, *(kind for kind in KINDS if kind not in MODELS)]
    made.add_argument("--models", nargs="+", choices=names, metavar="NAME")
    options = made.parse_args()
    own = options.shape == "gpt2" and not options.small
    options.models = options.models or (list(MODELS) if own else FEW)
    for name in options.models:
        if name not in (MODELS if own else KINDS):
            made.error(f"{name!r} is made for GPT-2's shapes alone, or not for those")
    if options.small:
        options.prefill, options.new, options.threads = [8], 2, [1]
        options.dtypes, options.batches = options.dtypes[:1], options.batches[:1]
        options.compile = options.compile and torch.cuda.is_available()  # a minute on a CPU
        bench.LEAST = bench.MOST = 1
    return options


def models_of(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All of them on the device, in the first dtype."""
    names = list(dict.fromkeys([REFERENCE, *options.models]))
    dtype = DTYPES[options.dtypes[0]]
    if options.shape == "gpt2" and not options.small:
        context = max(*options.prefill, bench.PROMPT + options.new)
        return {n: build(n, options.layers or 12, context).to(device, dtype) for n in names}  # type: ignore[arg-type]
    given: dict[str, Any] = {"small": options.small, "layers": options.layers, "dtype": dtype}
    return {n: build_shape(options.shape, n, device=device, **given) for n in names}


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = command_line()
    keep_memory()  # as krony bench does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = Record("decode and prefill of whole models, random weights", options)
    models = models_of(options, device)
    record.content["parameters"] = {name: info.parameters(model) for name, model in models.items()}
    record.content["settings"]["device"] = str(device)
    loads = workloads(options, models[REFERENCE].config.vocab_size, device)
    runs = record.content["runs"] = []
    longest = 0.0
    for dtype in options.dtypes:
        runners = {
            name: Runner(model.to(DTYPES[dtype]), options.compile) for name, model in models.items()
        }
        for threads in options.threads:
            torch.set_num_threads(threads)
            run: dict[str, Any] = {"dtype": dtype, "threads": threads, "rows": []}
            runs.append(run)
            print(f"\n{dtype}, {threads} threads: speed against dense (spread), share of roofline")
            for load in loads:
                began = record.spent
                if not record.has_time(f"{dtype}, {threads} threads, {load.name}", longest):
                    continue
                (row,), run["machine"] = bench.measure(runners, [load], REFERENCE)
                run["rows"].append(row)
                record.write()
                longest = max(longest, record.spent - began)
                print(f"| {load.name} | model |\n|---|---|")
                for name in models:
                    print(f"| {cell(row['models'][name])} | {name} |", flush=True)


if __name__ == "__main__":
    main()
