"""The factored forward against the dense one and other ways to run the same factors.

One matrix (c_fc of GPT-2 small) and a stack of MLPs with distinct weights, every scheme of the
paper and a balanced sum. All rivals of a row take turns in one process, and every ratio is within a
round, so that a machine whose speed drifts drifts for all.

On a GPU each run is a CUDA graph, as in a server, and the models are to be larger than its caches.

python benchmarks/forward.py [--threads 1 2] [--tokens 1 8 128 1024] [--dtypes float32 bfloat16]
python benchmarks/forward.py --what stack --layers 48 --threads 1                    # on a GPU
python benchmarks/forward.py --what stack --ways --without decode tiles hidden fewer mix gelu
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krony.hf.checkpoints import write_file
from krony.measure.memory import keep_memory
from krony.measure.runtimes import recorded
from krony.nn import mlp, switches
from krony.nn.activations import TanhGELU
from krony.nn.layers import KroneckerGroup, KroneckerLinear
from records import Record, parser
from timing import against, device_here, rounds

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
    without: Sequence[str] = (),
) -> dict[str, Layers]:
    """The dense layers, ours, the same factors run in other ways, and ours without a kernel."""
    torch.manual_seed(0)
    hidden, model = HIDDEN * scale, MODEL * scale
    dense = [MLP(nn.Linear(model, hidden), nn.Linear(hidden, model)) for _ in range(layers)]
    ours = [factored_pair(*SCHEMES[scheme], scale) for _ in range(layers)]
    every: dict[str, Layers] = {"dense": dense, "krony": [MLP(*pair) for pair in ours]}
    for name in ways:
        every[name] = [MLP(*(Rival(layer, WAYS[name]) for layer in pair)) for pair in ours]
    # Of their own: what was chosen is kept with a layer, and is not to be chosen at every call.
    every |= {f"without {name}": copy.deepcopy(every["krony"]) for name in without}
    for made in every.values():
        for layer in made:
            layer.to(dtype).eval()
    for name in every:  # as in a model of krony's, where it is a block's child
        if name == "krony" or name.startswith("without "):
            for layer in every[name]:
                mlp.install(layer)
    return every


def with_others(run: Callable[[Tensor], Tensor], kernel: str) -> Callable[[Tensor], Tensor]:
    """The same by all kernels but one."""
    others = switches.known.keys() - {kernel}

    def restricted(x: Tensor) -> Tensor:
        with switches.restricted(*others):
            return run(x)

    return restricted


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


def command_line() -> Any:
    """Options; small ones are filled in."""
    made = parser(__doc__ or "", "forward")
    made.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    made.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128, 1024])
    made.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    made.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    made.add_argument("--what", nargs="+", default=["stack", "one"], choices=["stack", "one"])
    made.add_argument("--layers", type=int, default=12)
    made.add_argument("--scale", type=int, default=1, help="how many times as wide as GPT-2 small")
    made.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    made.add_argument(
        "--without", nargs="*", default=[], choices=list(switches.known),
        help="also ours without this kernel, one after the other",
    )  # fmt: skip
    made.add_argument("--compile", action="store_true", help="dense and ours, nothing else")
    made.add_argument("--eager", action="store_true", help="on a GPU, no CUDA graphs")
    made.add_argument("--seconds", type=float, default=3.0, help="for each cell")
    made.add_argument("--rounds", type=int, default=5, help="at least, for each cell")
    options = made.parse_args()
    if options.small:
        options.threads, options.tokens, options.dtypes = [1], options.tokens[:1], ["float32"]
        options.schemes, options.what = options.schemes[1:2], options.what[:1]
        options.layers, options.seconds, options.rounds = 1, 0.0, 1
    return options


def main() -> None:
    """Time everything, print the tables, write JSON and picture."""
    options = command_line()
    keep_memory()  # else the times are those of fresh pages, of whichever model comes first
    device = device_here()
    graphs = device.type == "cuda" and not (options.eager or options.compile)
    record = Record("the factored forward of MLPs, random weights", options)
    rows = record.content["rows"] = []
    cells = [
        (dtype, scheme, threads, what, tokens)
        for dtype in options.dtypes
        for scheme in options.schemes
        for threads in options.threads
        for what in options.what
        for tokens in options.tokens
    ]
    made: tuple[str, str] | None = None
    longest = 0.0
    for dtype, scheme, threads, what, tokens in cells:
        began = record.spent
        if not record.has_time(f"{dtype}, {scheme}, {what}, {tokens} tokens", longest):
            continue
        if made != (dtype, scheme):
            ways = () if options.compile else options.ways
            every = rivals(
                scheme, options.layers, DTYPES[dtype], ways, options.scale, options.without
            )
            for layers in every.values():
                for layer in layers:
                    layer.to(device)
            made = dtype, scheme
        torch.set_num_threads(threads)
        make = {"stack": stack, "one": one}[what]
        x = torch.randn(tokens, MODEL * options.scale).to(device, DTYPES[dtype])
        runs = {name: make(layers) for name, layers in every.items()}
        for kernel in options.without:
            name = f"without {kernel}"
            runs[name] = with_others(runs[name], kernel)
        if options.compile:
            runs = {name: compiled(run) for name, run in runs.items()}
        elif graphs:
            runs = {name: replayed(run, x) for name, run in runs.items()}
        found = against(timed_on(runs, x, options.seconds, options.rounds), "dense")
        cell = {"dtype": dtype, "scheme": scheme, "threads": threads, "what": what}
        record.add({**cell, "tokens": tokens, "found": found})
        longest = max(longest, record.spent - began)
        print(*cell.values(), tokens, {n: f["ratio"] for n, f in found.items()}, flush=True)
    for dtype in options.dtypes:
        for threads in options.threads:
            for what in options.what:
                print(table(rows, what, threads, dtype))
    gpu = record.content["environment"]["gpu"]
    draw(rows, options.out.with_suffix(".png"), gpu, graphs)


@torch.inference_mode()
def timed_on(
    runs: dict[str, Callable[[Tensor], Any]], x: Tensor, seconds: float, least: int
) -> dict[str, list[float]]:
    """Seconds by rival and round."""

    def job(run: Callable[[Tensor], Any]) -> Callable[[], Any]:
        return lambda: run(x)

    return rounds({n: job(run) for n, run in runs.items()}, x.device, seconds, least)


if __name__ == "__main__":
    main()
