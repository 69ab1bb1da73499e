"""The factored forward against the dense one and other ways to run the same factors.

One matrix (c_fc of GPT-2 small) and a stack of MLPs with distinct weights, every scheme of the
paper and a balanced sum. All rivals of a row take turns in one process, and every ratio is within a
round, so that a machine whose speed drifts drifts for all.

On a GPU each run is a CUDA graph, as in a server, and the models are to be larger than its caches.

python benchmarks/forward.py [--threads 1 2] [--tokens 1 8 128 1024] [--dtypes float32 bfloat16]
python benchmarks/forward.py --what stack --layers 48 --threads 1                    # on a GPU
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krony.hf.checkpoints import write_file, write_json
from krony.measure import evaluate
from krony.measure.memory import keep_memory
from krony.measure.runtimes import recorded
from krony.nn import mlp
from krony.nn.activations import TanhGELU
from krony.nn.layers import KroneckerGroup, KroneckerLinear

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HIDDEN, MODEL = 3072, 768
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The paper's (Tables I and II, and the shape of its 81M with the other orientation), and a sum of
# many terms at a quarter. Large factor of c_fc, terms.
SCHEMES: dict[str, tuple[tuple[int, int], int]] = {
    "67M (64, 32)": ((64, 32), 1),
    "81M (1536, 384)": ((1536, 384), 1),
    "81M (768, 768)": ((768, 768), 1),
    "96M (1536, 768)": ((1536, 768), 1),
    "96M (3072, 384)": ((3072, 384), 1),
    "80M-2 (1024, 256)": ((1024, 256), 2),
    "92M-4 (1024, 256)": ((1024, 256), 4),
    "balanced 96 x (64, 96)": ((64, 96), 96),
}


class Rival(nn.Module):
    """The same factors in another way: `way` maps x and a group to y."""

    def __init__(self, layer: KroneckerLinear, way: Callable[[Tensor, KroneckerGroup], Tensor]):
        super().__init__()
        self.layer, self.way = layer, way

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.way(x, self.layer.groups[0])  # type: ignore[arg-type]
        return y + self.layer.bias


def kron_weight(group: KroneckerGroup, large_first: bool) -> Tensor:
    """W by torch.kron, a term at a time: A ⊗ B as in the paper's code, or B ⊗ A.

    The order of the factors is that of rows and columns; it costs torch many times more to write
    the entries of a matrix in tiny blocks.
    """
    weight = None
    for large, small in zip(group.large_factors, group.scaled_small, strict=True):
        term = torch.kron(large, small) if large_first else torch.kron(small, large)
        weight = term if weight is None else weight + term
    assert weight is not None
    return weight


def by_einsum(x: Tensor, group: KroneckerGroup) -> Tensor:
    """One einsum over the factors, in the order that torch finds."""
    (m1, n1), (m2, n2) = group.large_shape, group.small_shape
    x = x.reshape(-1, n2, n1)
    y = torch.einsum("rab,rcd,tdb->tca", group.large_factors, group.scaled_small, x)
    return y.reshape(-1, m1 * m2)


WAYS: dict[str, Callable[[Tensor, KroneckerGroup], Tensor]] = {
    "factored": lambda x, group: group.factored(x),
    "formed": lambda x, group: F.linear(x, group.to_dense()),
    "einsum": by_einsum,
    "torch.kron": lambda x, group: F.linear(x, kron_weight(group, large_first=True)),
    "torch.kron, B first": lambda x, group: F.linear(x, kron_weight(group, large_first=False)),
}


def factored_pair(shape: tuple[int, int], terms: int, scale: int = 1) -> list[KroneckerLinear]:
    """c_fc and c_proj of one MLP; the large factor of c_proj is that of c_fc transposed."""
    small, large = (HIDDEN // shape[0], MODEL // shape[1]), (shape[0] * scale, shape[1] * scale)
    hidden, model = HIDDEN * scale, MODEL * scale
    pair = []
    for (m, n), a, b in (
        ((hidden, model), large, small),
        ((model, hidden), large[::-1], small[::-1]),
    ):
        pair.append(KroneckerLinear(n, m, [KroneckerGroup(a, b, terms)]))
    return pair


class MLP(nn.Module):
    """As in GPT-2, `nn.Linear` where it is dense."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = up, TanhGELU(nn.GELU), down

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(self.act(self.c_fc(x)))
        return y


Layers = list[MLP]


def stack(layers: Layers) -> Callable[[Tensor], Tensor]:
    """Distinct MLPs one after the other, with the residual stream of a transformer."""

    def run(x: Tensor) -> Tensor:
        y = x
        for layer in layers:
            y = y + layer(x)
        return y

    return run


def one(layers: Layers) -> Callable[[Tensor], Tensor]:
    """c_fc alone, of the first MLP."""
    return layers[0].c_fc


def compiled(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """By torch.compile, which makes one loop of biases and activation."""
    torch.compiler.reset()
    return torch.compile(run)


@torch.inference_mode()
def replayed(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Any]:
    """The same work on the same x as a CUDA graph."""
    graph = recorded(lambda: run(x))
    return lambda _: graph.replay()


def rivals(
    scheme: str,
    layers: int,
    dtype: torch.dtype,
    ways: Sequence[str] = tuple(WAYS),
    scale: int = 1,
) -> dict[str, Layers]:
    """The dense layers, ours, and the same factors run in other ways."""
    torch.manual_seed(0)
    hidden, model = HIDDEN * scale, MODEL * scale
    dense = [MLP(nn.Linear(model, hidden), nn.Linear(hidden, model)) for _ in range(layers)]
    ours = [factored_pair(*SCHEMES[scheme], scale) for _ in range(layers)]
    every: dict[str, Layers] = {"dense": dense, "krony": [MLP(*pair) for pair in ours]}
    for name in ways:
        every[name] = [MLP(*(Rival(layer, WAYS[name]) for layer in pair)) for pair in ours]
    for made in every.values():
        for layer in made:
            layer.to(dtype).eval()
    for layer in every["krony"]:  # as in a model of krony's, where it is a block's child
        mlp.install(layer)
    return every


@torch.inference_mode()
def seconds(
    runs: dict[str, Callable[[Tensor], Tensor]], x: Tensor, budget: float, least: int
) -> dict[str, list[float]]:
    """Rounds in which every rival runs once: at least `least`, and `budget` seconds of them."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    began, rounds = time.perf_counter(), -2
    while rounds < least or time.perf_counter() - began < budget:
        for name, run in runs.items():
            started = time.perf_counter()
            run(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            if rounds >= 0:  # the first two warm up
                taken[name].append(time.perf_counter() - started)
        rounds += 1
    return taken


def ratios(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and spread of the dense model's time over each rival's, round by round."""
    found = {}
    for name, times in taken.items():
        each = [d / t for d, t in zip(taken["dense"], times, strict=True)]
        found[name] = {
            "ratio": round(statistics.median(each), 3),
            "least": round(min(each), 3),
            "most": round(max(each), 3),
            "milliseconds": round(statistics.median(times) * 1e3, 3),
        }
    return found


def table(rows: list[dict[str, Any]], what: str, threads: int, dtype: str) -> str:
    """A Markdown table of one setting: schemes down, tokens and rivals across."""
    mine = [r for r in rows if (r["what"], r["threads"], r["dtype"]) == (what, threads, dtype)]
    tokens = sorted({r["tokens"] for r in mine})
    head = " | ".join(f"T = {t:,}" for t in tokens)
    lines = [
        f"\n**{what}, {dtype}, {threads} thread{'s' if threads > 1 else ''}**\n",
        f"| scheme | {head} | best other way | against torch.kron | the same, B first |",
        "|---" * (len(tokens) + 4) + "|",
    ]
    for scheme in SCHEMES:
        cells = {r["tokens"]: r["found"] for r in mine if r["scheme"] == scheme}
        if not cells:
            continue
        ours = " | ".join(f"{cells[t]['krony']['ratio']:.2f}x" for t in tokens)
        others = [n for n in ("factored", "formed", "einsum") if n in cells[tokens[0]]]
        best = ", ".join(
            f"{max(cells[t][n]['ratio'] for n in others):.2f}x" for t in tokens if others
        )
        krons = [
            ", ".join(
                f"{cells[t]['krony']['ratio'] / cells[t][way]['ratio']:.1f}x"
                for t in tokens
                if way in cells[t]
            )
            for way in ("torch.kron", "torch.kron, B first")
        ]
        lines.append(f"| {scheme} | {ours} | {best} | {' | '.join(krons)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path, gpu: str, graphs: bool) -> None:
    """Speed against dense by tokens, a line a scheme, for the stack in the first setting.

    Args:
        gpu: its name, or "none". graphs: whether the runs were CUDA graphs.
    """
    stacks = [r for r in rows if r["what"] == "stack"]
    if not stacks:
        return
    threads, dtype = stacks[0]["threads"], stacks[0]["dtype"]
    figure, axis = plt.subplots(figsize=(9, 4.5))
    for scheme in SCHEMES:
        points = [
            (r["tokens"], r["found"]["krony"]["ratio"])
            for r in stacks
            if (r["scheme"], r["threads"], r["dtype"]) == (scheme, threads, dtype)
        ]
        if points:
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=scheme)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xlabel="tokens", ylabel="speed against dense")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:g}x")
    axis.set_xticks(sorted({r["tokens"] for r in stacks}))
    where = f"{threads} thread(s)" if gpu == "none" else f"{'CUDA graphs on ' * graphs}an {gpu}"
    axis.set_title(f"A stack of GPT-2 small's MLPs, {dtype}, {where}")
    axis.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.tight_layout()
    write_file(path, lambda to: figure.savefig(to, dpi=120))
    plt.close(figure)


def main() -> None:
    """Time everything, print the tables, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128, 1024])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--what", nargs="+", default=["stack", "one"], choices=["stack", "one"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--scale", type=int, default=1, help="how many times as wide as GPT-2 small"
    )
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--compile", action="store_true", help="dense and ours, nothing else")
    parser.add_argument("--eager", action="store_true", help="on a GPU, no CUDA graphs")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each cell")
    parser.add_argument("--rounds", type=int, default=5, help="at least, for each cell")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/forward.json"))
    arguments = parser.parse_args()
    keep_memory()  # else the times are those of fresh pages, of whichever model comes first
    device = "cuda" if torch.cuda.is_available() else "cpu"
    graphs = device == "cuda" and not (arguments.eager or arguments.compile)
    ways = () if arguments.compile else arguments.ways
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtypes:
        for scheme in arguments.schemes:
            every = rivals(scheme, arguments.layers, DTYPES[dtype], ways, arguments.scale)
            for layers in every.values():
                for layer in layers:
                    layer.to(device)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                for what in arguments.what:
                    make = {"stack": stack, "one": one}[what]
                    for tokens in arguments.tokens:
                        x = torch.randn(tokens, MODEL * arguments.scale).to(device, DTYPES[dtype])
                        runs = {name: make(layers) for name, layers in every.items()}
                        if arguments.compile:
                            runs = {name: compiled(run) for name, run in runs.items()}
                        elif graphs:
                            runs = {name: replayed(run, x) for name, run in runs.items()}
                        taken = seconds(runs, x, arguments.seconds, arguments.rounds)
                        cell = {
                            "dtype": dtype,
                            "scheme": scheme,
                            "threads": threads,
                            "what": what,
                        }
                        rows.append({**cell, "tokens": tokens, "found": ratios(taken)})
                        shown = {n: f["ratio"] for n, f in rows[-1]["found"].items()}
                        print(*cell.values(), tokens, shown, flush=True)
    for dtype in arguments.dtypes:
        for threads in arguments.threads:
            for what in arguments.what:
                print(table(rows, what, threads, dtype))
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    record: dict[str, Any] = {"settings": settings, "rows": rows}
    record["environment"] = evaluate.environment()
    write_json(arguments.out, record)
    draw(rows, arguments.out.with_suffix(".png"), record["environment"]["gpu"], graphs)


if __name__ == "__main__":
    main()
