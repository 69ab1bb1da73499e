"""Blocks of the Triton kernels: each step of an MLP by those chosen and by others; CUDA only.

A step runs through so many copies of its weights that no cache holds them, as a CUDA graph. Beside
it the dense product with its activation, by cuBLAS. This is what the choices in launch.py
come from; on another GPU than an H200 others may be faster.

python benchmarks/launches.py [--tokens 1 8 128 1024] [--steps NAME ...] [--dtype bfloat16]
"""

import itertools
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from krony.hf.checkpoints import DTYPES
from krony.measure.runtimes import recorded
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.gpu.launch import launch
from krony.nn.gpu.operators import MAX_TOKENS
from krony.nn.gpu.step import Step
from records import Record, parser
from timing import rounds

# (m1, n1, m2, n2), whether slices are mixed, matrices, activation, slices that the next one reads.
STEPS: dict[str, tuple[tuple[int, int, int, int], bool, int, int, int]] = {
    "up, (1536, 384) x (2, 2)": ((1536, 384, 2, 2), True, 1, cpu_kernels.TANH_GELU, 2),
    "down, (384, 1536) x (2, 2)": ((384, 1536, 2, 2), False, 1, cpu_kernels.NONE, 0),
    "up, (768, 768) x (4, 1)": ((768, 768, 4, 1), True, 1, cpu_kernels.TANH_GELU, 1),
    "down, (768, 768)": ((768, 768, 1, 1), False, 1, cpu_kernels.NONE, 0),
    "up, (1536, 768) x (2, 1)": ((1536, 768, 2, 1), True, 1, cpu_kernels.TANH_GELU, 1),
    "up, (3072, 384) x (1, 2)": ((3072, 384, 1, 2), True, 1, cpu_kernels.TANH_GELU, 0),
    "down, (384, 3072) x (2, 1)": ((384, 3072, 2, 1), True, 1, cpu_kernels.NONE, 0),
    "gate and up, (5504, 2048) x (2, 2)": ((5504, 2048, 2, 2), True, 2, cpu_kernels.SILU, 2),
    "down, (2048, 5504) x (2, 2)": ((2048, 5504, 2, 2), False, 1, cpu_kernels.NONE, 0),
}
FEW = [
    *({"BLOCK_A": a, "BLOCK_B": b, "num_warps": w, "DOT": False}
      for a, b, w in itertools.product((1, 2, 4), (512, 1024, 2048), (1, 4))),
    *({"BLOCK_A": a, "BLOCK_B": b, "num_warps": w, "DOT": True}
      for a, b, w in itertools.product((16, 32), (128, 256, 512), (2, 4))),
]  # fmt: skip
MANY = [
    {"BLOCK_T": t, "BLOCK_A": a, "BLOCK_B": b, "num_warps": w, "num_stages": s}
    for t, a, b, w, s in (
        (64, 32, 64, 4, 4), (64, 64, 64, 4, 3), (64, 64, 128, 4, 3), (64, 128, 64, 4, 3),
        (128, 64, 64, 8, 4), (128, 128, 64, 8, 3),
    )
]  # fmt: skip
STREAMED = 150e6  # bytes of weights in a run: beyond the second-level cache of any GPU
MOST_COPIES, REPEATS = 160, 5


def step(name: str, dtype: torch.dtype) -> Step:
    """A step with random numbers."""
    (m1, n1, m2, n2), mixed, matrices, kind, slices = STEPS[name]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    return Step(
        tuple(random(m1, n1) for _ in range(matrices)),
        tuple(random(1, m2, n2) for _ in range(matrices)) if mixed else (),
        tuple(random(m1 * m2) for _ in range(matrices)),
        (m1, n1, m2, n2),
        kind=kind,
        inner=random(slices, m2) if slices else None,
    )


def microseconds(jobs: list[Callable[[], Any]]) -> float:
    """Of one of them, all recorded in one CUDA graph."""
    graph = recorded(lambda: [job() for job in jobs])
    taken = rounds({"": graph.replay}, "cuda", least=REPEATS, most=REPEATS)[""]
    return statistics.median(taken) * 1e6 / len(jobs)


def copies(numbers: int, dtype: torch.dtype) -> int:
    """How many weights of so many numbers are streamed."""
    return min(MOST_COPIES, max(2, math.ceil(STREAMED / (numbers * dtype.itemsize))))


def dense(name: str, tokens: int, dtype: torch.dtype) -> float:
    """Microseconds of the dense matrices with their activation, by cuBLAS."""
    (m1, n1, m2, n2), _, matrices, kind, _ = STEPS[name]
    m, n = m1 * m2, n1 * n2
    x = torch.randn(tokens, n, device="cuda", dtype=dtype)
    bias = torch.randn(m, device="cuda", dtype=dtype)

    def job(weights: list[torch.Tensor]) -> Callable[[], Any]:
        def run() -> torch.Tensor:
            y = F.linear(x, weights[0], bias)
            if kind == cpu_kernels.TANH_GELU:
                y = F.gelu(y, approximate="tanh")
            if kind == cpu_kernels.SILU:
                y = F.silu(y) * F.linear(x, weights[1], bias)
            return y

        return run

    every = [
        [torch.randn(m, n, device="cuda", dtype=dtype) for _ in range(matrices)]
        for _ in range(copies(m * n * matrices, dtype))
    ]
    return microseconds([job(weights) for weights in every])


def ours(steps: list[Step], x: torch.Tensor, sizes: dict[str, Any]) -> float:
    """Microseconds of a launch with these blocks; infinite where they don't fit the GPU."""
    many = len(x) > MAX_TOKENS
    y = x.new_empty(len(x), steps[0].outputs)

    def job(one: Step) -> Callable[[], None]:
        return lambda: launch(x, one, y, many, **sizes)

    try:
        return microseconds([job(one) for one in steps])
    except Exception as error:  # Triton has a class of errors for each resource
        print(f"{sizes}: {type(error).__name__}", file=sys.stderr)
        return math.inf


def command_line() -> Any:
    """Options; small ones are filled in."""
    made = parser(__doc__ or "", "launches")
    made.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128, 1024])
    made.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    made.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    options = made.parse_args()
    if options.small:
        options.tokens, options.steps = options.tokens[:1], options.steps[:1]
    return options


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = command_line()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/launches.py needs a CUDA device, and torch sees none here")
    dtype, longest = DTYPES[options.dtype], 0.0
    record = Record("blocks of the Triton kernels", options)
    print("| step | tokens | dense, µs | chosen | best other | its blocks |")
    print("|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name in options.steps:
            first = step(name, dtype)
            numbers = sum(weight.numel() for weight in first.weights)
            steps = [first, *(step(name, dtype) for _ in range(1, copies(numbers, dtype)))]
            for tokens in options.tokens:
                began = record.spent
                if not record.has_time(f"{name}, {tokens} tokens", longest):
                    continue
                x = torch.randn(tokens, first.sides[1] * first.sides[3], device="cuda", dtype=dtype)
                others = MANY if tokens > MAX_TOKENS else FEW
                timed = [(ours(steps, x, sizes), sizes) for sizes in others]
                found = [pair for pair in timed if pair[0] < math.inf]
                least, sizes = min(found, key=lambda pair: pair[0])
                row = {
                    "step": name,
                    "tokens": tokens,
                    "dense": dense(name, tokens, dtype),
                    "chosen": ours(steps, x, {}),
                    "others": found,
                }
                record.add(row)
                longest = max(longest, record.spent - began)
                blocks = ", ".join(str(size) for size in sizes.values())
                times = " | ".join(f"{row[which]:.2f}" for which in ("dense", "chosen"))
                print(f"| {name} | {tokens} | {times} | {least:.2f} | {blocks} |", flush=True)


if __name__ == "__main__":
    main()
