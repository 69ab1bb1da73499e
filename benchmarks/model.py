"""Whole GPT-2-shaped models with random weights: decode and prefill, factored against dense.

All models take turns in one process (`krony.bench`); greedy decode of 128 tokens at batch 1 under
a bare loop over the forward and under transformers' generate, at batch 8, and prefills.

python benchmarks/model.py [--layers 12] [--prefill 128 1024] [--new 128] [--threads 1 2]
                           [--dtypes float32 bfloat16]
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import krony
from krony.compression.budget import LOW_RANK_PARTS, low_rank, mixed
from krony.hf import modeling
from krony.hf.checkpoints import DTYPES, write_json
from krony.hf.families import find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.maths.schemes import Factors
from krony.measure import bench, evaluate, info
from krony.measure.bench import times
from krony.measure.memory import keep_memory
from krony.measure.runtimes import Runner
from krony.nn import activations, mlp

MIXED = partial(mixed, part=LOW_RANK_PARTS[-1])
# As transformers runs it, with the activation in eight operations; the others have it in one.
STOCK = "dense, transformers' activation"
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
REFERENCE = "dense"


def build(name: str, layers: int, context: int) -> transformers.PreTrainedModel:
    """GPT-2 small with so many layers, or it with factored MLPs."""
    torch.manual_seed(0)
    made = dict(MODELS[name] or {})
    hidden = made.pop("hidden", 4 * transformers.GPT2Config().n_embd)
    config = transformers.GPT2Config(n_layer=layers, n_positions=context, n_inner=hidden)
    model = transformers.GPT2LMHeadModel(config).eval()
    if "found" in made:
        _found(model, FOUND[made["found"]])
    elif "rank" in made:
        shapes = [(t, (t.shape[0], 1), (1, t.shape[1])) for t in find_targets(model, "mlp")]
        plan = Plan(tuple(matrix_plan(t, (Factors(*s, made["rank"]),)) for t, *s in shapes))
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


def workloads(arguments: argparse.Namespace, device: torch.device) -> list[bench.Workload]:
    """Decode under both runtimes, also of eight rows at once, and prefills, of random tokens."""
    generator = torch.Generator().manual_seed(arguments.seed)
    longest = max(arguments.prefill)
    ids = torch.randint(50_257, (1, longest), generator=generator).to(device)
    prompt = ids[:, : bench.PROMPT]
    decodes = [bench.decode(prompt, arguments.new, r) for r in ("bare loop", "generate")]
    if not arguments.batch_1:
        decodes += [bench.decode(prompt.repeat(bench.BATCHES[-1], 1), arguments.new, "bare loop")]
    return [*decodes, *(bench.prefill(ids[:, :length]) for length in arguments.prefill)]


def cell(figures: dict[str, Any]) -> str:
    """Speed with its spread, and the share of the roofline."""
    share = f"{100 * figures['roofline']['share']:.0f} %"
    if "speed" not in figures:
        return f"1.00x, {share}"
    low, high = figures["speed_spread"]
    return f"{times(figures['speed'])} ({low:.2f} to {high:.2f}), {share}"


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--compile", action="store_true", help="the bare loop's steps")
    parser.add_argument("--batch-1", action="store_true", help="leave out the decode of 8 rows")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/model.json"))
    arguments = parser.parse_args()
    keep_memory()  # as krony bench does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = dict.fromkeys([REFERENCE, *arguments.models])
    context = max(*arguments.prefill, bench.PROMPT + arguments.new)
    models = {name: build(name, arguments.layers, context).to(device) for name in names}
    loads = workloads(arguments, device)
    settings = {k: v for k, v in vars(arguments).items() if k != "out"} | {"device": str(device)}
    record: dict[str, Any] = {
        "settings": settings,
        "parameters": {name: info.parameters(model) for name, model in models.items()},
        "environment": evaluate.environment(),
        "runs": [],
    }
    print("| dtype, threads | model |", " | ".join(load.name for load in loads), "|")
    print("|---|---|" + "---|" * len(loads))
    for dtype in arguments.dtypes:
        runners = {
            name: Runner(model.to(DTYPES[dtype]), arguments.compile)
            for name, model in models.items()
        }
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            rows, rates = bench.measure(runners, loads, REFERENCE)
            record["runs"].append(
                {"dtype": dtype, "threads": threads, "machine": rates, "rows": rows}
            )
            for name in names:
                cells = " | ".join(cell(row["models"][name]) for row in rows)
                print(f"| {dtype}, {threads} | {name} | {cells} |", flush=True)
            write_json(arguments.out, record)  # after each part: the whole takes long
    print(f"\nSpeed against dense (spread over rounds), share of the roofline. {settings}")


if __name__ == "__main__":
    main()
