"""The paper's one-term initialisations on any model's MLPs, in both orders of factors, no training.

"large-outer" is the paper's order, A ⊗ B with the large A first; "small-outer" has the small factor
first, which a token passes without a transposition.

python benchmarks/paper.py MODEL --data TEXT --out FILE [--windows 24] [--parts quarter half]
"""

import argparse
from pathlib import Path
from typing import Any, get_args

import torch
import transformers

import krony
from krony.hf.checkpoints import write_json
from krony.maths.kron import Layout
from krony.measure import evaluate
from krony.measure.info import parameters
from krony.text import data

SMALL = {"quarter": (2, 2), "half": (2, 1)}  # the paper's kind of small factor, hidden x model
INITS = ("van-loan", "van-loan-scaled", "prune")


def main() -> None:
    """Measure every row; print and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a directory, a Hub name, or demo")
    parser.add_argument("--data", required=True, help="what krony evaluate --data takes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, help="read of the text; default: all")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--parts", nargs="+", default=list(SMALL), choices=SMALL)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, arguments.dtype)
    model = krony.load_model(arguments.model, dtype)
    text = data.load_text(arguments.data)
    ids = evaluate.tokenize(krony.load_tokenizer(arguments.model), text)
    if arguments.windows:
        ids = ids[: arguments.windows * min(1024, evaluate.context_length(model))]
    dense = evaluate.perplexity(model, ids, text)
    print(f"dense {dense.perplexity:.3f}", flush=True)
    rows: list[dict[str, Any]] = []
    for part in arguments.parts:
        for init in INITS:
            for layout in reversed(get_args(Layout)):
                model = krony.load_model(arguments.model, dtype)
                plan = krony.make_plan(model, small=SMALL[part], layout=layout)
                krony.compress(model, plan, init=init)
                size = parameters(model)
                model.dequantize()  # equal up to rounding, and faster
                found = evaluate.perplexity(model, ids).perplexity
                rows.append(
                    {
                        "part": part,
                        "init": init,
                        "layout": layout,
                        "parameters": size,
                        "perplexity": found,
                        "against_dense": found / dense.perplexity,
                    }
                )
                print(f"{part} {init} {layout}: {found:,.2f}", flush=True)
                record = {
                    "model": Path(arguments.model).name,
                    "environment": evaluate.environment(),
                    "seed": 0,
                    "dense": dense.to_dict(),
                    "rows": rows,
                }
                write_json(arguments.out, record)


if __name__ == "__main__":
    main()
