"""Seconds to factorise all MLP matrices of a GPT-2 of the real size (random weights).

python benchmarks/factorise.py [--out benchmarks/results/factorise.json]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers

import krony
from krony.maths.schemes import SCHEMES
from krony.measure.evaluate import environment


def main() -> None:
    """Time every scheme of the paper, and a balanced sum; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/factorise.json"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    transformers.set_seed(0)
    dense = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    jobs = {name: {"scheme": name} for name in SCHEMES}
    jobs["51 x 16x16"] = {"small": (16, 16), "terms": 51}
    state, rows = dense.state_dict(), []
    for name, choice in jobs.items():
        seconds = []
        for _ in range(arguments.repeats):
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
            model.load_state_dict(state)
            plan = krony.make_plan(model, **choice)
            started = time.perf_counter()
            krony.compress(model, plan, init="van-loan")
            seconds.append(time.perf_counter() - started)
        parameters = sum(p.numel() for p in model.parameters())
        rows.append({"plan": name, "parameters": parameters, "seconds": statistics.median(seconds)})
        print(f"{name:12} {parameters:>12,} parameters {statistics.median(seconds):8.2f} s")
    record = {
        "what": "van-loan, 24 matrices of GPT-2 small's shapes, random weights, median of repeats",
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
        "seed": 0,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
