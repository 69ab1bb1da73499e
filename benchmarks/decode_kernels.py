"""The decode kernel against the same factors in plain torch and the dense product; CUDA only.

One matrix at a time, GPT-2 small's shapes, a few tokens. Each form runs through so many copies of
its weights that no cache holds them, eagerly and as a CUDA graph; the forms take turns.

python benchmarks/decode_kernels.py [--tokens 1 4 16] [--dtypes bfloat16 float32]
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from krony import evaluate, kernels, kron, products
from krony.bench import in_turn, summary
from krony.checkpoints import DTYPES, write_json
from krony.roofline import timed

# (large, small, terms) of c_fc and c_proj in the paper's models.
FACTORS = [
    ((1536, 384), (2, 2), 1),
    ((384, 1536), (2, 2), 1),
    ((768, 768), (4, 1), 1),
    ((768, 768), (1, 4), 1),
    ((1536, 768), (2, 1), 1),
    ((1024, 256), (3, 3), 4),
]
STREAMED = 256e6  # bytes of factors that a run reads: beyond the second-level cache of any GPU


def forms(
    large: kron.Shape, small: kron.Shape, terms: int, tokens: int, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], None]], int]:
    """Each form as a run through all copies, and how many copies there are."""
    where: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    entries = terms * large[0] * large[1]
    copies = math.ceil(STREAMED / (entries * dtype.itemsize))
    mix_first = kron.mixes_first(large, small)
    m, n = large[0] * small[0], large[1] * small[1]
    x, b = torch.randn(tokens, n, **where), torch.randn(terms, *small, **where)
    weights = [
        kron.large_to_linear(torch.randn(terms, *large, **where), mix_first).contiguous()
        for _ in range(copies)
    ]
    dense = [torch.randn(m, n, **where) for _ in range(copies)]

    def kernel() -> None:
        for weight in weights:
            kernels.decode(x, b, weight, large, "small-outer", mix_first)

    def plain() -> None:
        for weight in weights:
            products.apply(x, b, _linear(weight), large, "small-outer", mix_first)

    def whole() -> None:
        for weight in dense:
            F.linear(x, weight)

    return {"dense": whole, "torch": plain, "kernel": kernel}, copies


def _linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: F.linear(z, weight)


def recorded(job: Callable[[], None]) -> Callable[[], None]:
    """The same work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode_kernels.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/decode_kernels.py needs a CUDA device, and torch sees none here")
    device, rows = torch.device("cuda"), []
    print("| factors | dtype | tokens | run | dense, µs | torch | kernel | kernel against dense |")
    print("|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for large, small, terms in FACTORS:
            for dtype in arguments.dtypes:
                for tokens in arguments.tokens:
                    made, copies = forms(large, small, terms, tokens, DTYPES[dtype])
                    for run in ("eager", "graph"):
                        jobs = {
                            name: _timing(recorded(job) if run == "graph" else job, device)
                            for name, job in made.items()
                        }
                        name = f"{terms} x {large} by {small}, {dtype}, {tokens} tokens, {run}"
                        row = summary(name, in_turn(jobs), "dense")
                        figures = row["models"]
                        cells = [f"{1e6 * f['seconds'] / copies:.2f}" for f in figures.values()]
                        print(
                            f"| {terms} x {large} by {small} | {dtype} | {tokens} | {run} | "
                            f"{' | '.join(cells)} | {figures['kernel']['speed']:.2f}x |",
                            flush=True,
                        )
                        rows.append(row | {"copies": copies})
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    record = {"settings": settings, "rows": rows, "environment": evaluate.environment()}
    write_json(arguments.out, record)


def _timing(job: Callable[[], None], device: torch.device) -> Callable[[], float]:
    return lambda: timed(job, device)


if __name__ == "__main__":
    main()
