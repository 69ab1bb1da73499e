"""Seconds to factorise all MLP matrices of a GPT-2 of the real size (random weights).

python benchmarks/factorise.py [--out benchmarks/results/factorise.json]
"""

import statistics
import time
from typing import Any

import torch
import transformers

import krony
from krony.maths.schemes import SCHEMES
from records import Record, parser


def main() -> None:
    """Time every scheme of the paper, and a balanced sum; print a table and write JSON."""
    made = parser(__doc__ or "", "factorise")
    made.add_argument("--repeats", type=int, default=3)
    options = made.parse_args()
    layers = 1 if options.small else 12
    transformers.set_seed(options.seed)
    dense = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers))
    jobs: dict[str, dict[str, Any]] = {name: {"scheme": name} for name in SCHEMES}
    jobs["51 x 16x16"] = {"small": (16, 16), "terms": 51}
    state = dense.state_dict()
    what = "van-loan, all MLP matrices of GPT-2 small's shapes, random weights, median of repeats"
    record = Record(what, options)
    record.content |= {"threads": torch.get_num_threads(), "repeats": options.repeats}
    for name, choice in list(jobs.items())[: 1 if options.small else None]:
        seconds = []
        for _ in range(1 if options.small else options.repeats):
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers))
            model.load_state_dict(state)
            plan = krony.make_plan(model, **choice)
            started = time.perf_counter()
            krony.compress(model, plan, init="van-loan")
            seconds.append(time.perf_counter() - started)
        parameters = sum(p.numel() for p in model.parameters())
        middle = statistics.median(seconds)
        record.add({"plan": name, "parameters": parameters, "seconds": middle})
        print(f"{name:12} {parameters:>12,} parameters {middle:8.2f} s", flush=True)


if __name__ == "__main__":
    main()
