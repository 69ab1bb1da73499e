"""Tables of docs/results.md about speed: a forward pass, whole models, training."""

from collections.abc import Iterable
from statistics import median
from typing import Any

from tabular import markdown, read, table

TOKENS = (1, 8, 128, 1024)
# [multiply-adds, parameters] of each scheme's MLP, as shares of the dense one.
LIMITS = {
    "67M (64, 32)": (0.05, 0.00),
    "81M (1536, 384)": (0.50, 0.25),
    "81M (768, 768)": (0.25, 0.25),
    "96M (1536, 768)": (0.50, 0.50),
    "96M (3072, 384)": (0.50, 0.50),
    "80M-2 (1024, 256)": (0.67, 0.22),
    "92M-4 (1024, 256)": (1.34, 0.44),
    "balanced 96 x (64, 96)": (3.00, 0.27),
}
DECODE, PREFILL = "decode at batch 1, bare loop", "prefill of 1,024 tokens"
Found = dict[str, dict[str, float]]  # a way of running to its ratio and milliseconds


def _ratio(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}x"


def _rows(name: str, dtype: str) -> dict[tuple[str, int, int], Found]:
    return {
        (r["scheme"], r["threads"], r["tokens"]): r["found"]
        for r in read(name)["rows"]
        if r["dtype"] == dtype
    }


@table
def forward(dtype: str) -> str:
    """A stack of GPT-2 small's MLPs on a CPU, against dense and against other ways."""
    found, ways = _rows("forward", dtype), _rows("forward-ways", dtype)
    rows = []
    for scheme, limits in LIMITS.items():
        for threads in (1, 2):
            here = [_ratio(found[scheme, threads, t]["krony"]["ratio"]) for t in TOKENS]
            one = ways[scheme, threads, 1]
            ours = one["krony"]["ratio"]
            over = [f"{ours / one[w]['ratio']:.1f}x" for w in ("torch.kron", "torch.kron, B first")]
            other = max(one["formed"]["ratio"], one["einsum"]["ratio"])
            name = f"{scheme} [{limits[0]:.2f}, {limits[1]:.2f}]"
            rows.append([name, threads, *here, *over, _ratio(other)])
    return markdown(
        ["scheme [multiply-adds, parameters]", "threads", "T = 1", "T = 8", "T = 128",
         "T = 1,024", "over `torch.kron`, A first (the paper's code), T = 1", "B first",
         "best other way, T = 1"],
        rows,
    )  # fmt: skip


@table
def forward_gpu(name: str, dtype: str) -> str:
    """A stack of MLPs on a GPU, each run a CUDA graph."""
    record, found = read(name), _rows(name, dtype)
    layers, schemes = record["settings"]["layers"], record["settings"]["schemes"]

    def micro(of: Found, way: str) -> str:
        return f"{1000 * of[way]['milliseconds'] / layers:.1f}"

    times = [[found[s, 1, t]["dense"]["milliseconds"] for s in schemes] for t in TOKENS]
    dense = [f"{1000 * median(each) / layers:.1f}" for each in times]  # measured beside each scheme
    rows = [["dense", *dense, "", ""]]
    for scheme in schemes:
        here = [found[scheme, 1, t] for t in TOKENS]
        rows.append(
            [
                scheme,
                *(f"{_ratio(of['krony']['ratio'])} ({micro(of, 'krony')})" for of in here),
                ", ".join(_ratio(of["factored"]["ratio"]) for of in here),
                ", ".join(
                    f"{of['krony']['ratio'] / of['torch.kron']['ratio']:.1f}x" for of in here
                ),
            ]
        )
    head = [dtype, *(f"T = {t:,}" for t in TOKENS)]
    return markdown([*head, "torch's form", "over `torch.kron`"], rows)


Runs = dict[tuple[str, int, str], dict[str, Any]]  # (dtype, threads, what) to its models


def _runs(name: str) -> Runs:
    return {
        (run["dtype"], run["threads"], row["name"]): row["models"]
        for run in read(name)["runs"]
        for row in run["rows"]
    }


def _cell(of: dict[str, Any]) -> str:
    share = f"{100 * of['roofline']['share']:.0f} %"
    if "speed" not in of:
        return f"1.00x, {share}"
    low, high = of["speed_spread"]
    return f"{of['speed']:.2f}x ({low:.2f} to {high:.2f}), {share}"


def _models(runs: Runs, whats: Iterable[str], order: Iterable[tuple[str, int]]) -> str:
    columns = list(whats)
    rows = []
    for dtype, threads in order:
        models = dict.fromkeys(m for what in columns for m in runs.get((dtype, threads, what), ()))
        for model in models:
            here = [runs.get((dtype, threads, what), {}).get(model) for what in columns]
            cells = [_cell(of) if of else "-" for of in here]
            rows.append([f"{dtype}, {threads}", model, *cells])
    return markdown(["dtype, threads", "model", *columns], rows)


@table
def model() -> str:
    """Whole models with GPT-2 small's shapes; rows measured again replace the first run's."""
    runs = _runs("model")
    for later in ("model-bfloat16", "model-narrowed"):
        for key, models in _runs(later).items():
            if key[0] == "bfloat16" and key in runs:
                kept = {"dense"} if later == "model-narrowed" else set()
                newer = {m: of for m, of in models.items() if m not in kept}
                runs[key] = {m: newer.get(m, of) for m, of in runs[key].items()}
    whats = ("decode at batch 1, bare loop", "decode at batch 1, generate",
             "prefill of 1,024 tokens")  # fmt: skip
    order = [(dtype, threads) for dtype in ("float32", "bfloat16") for threads in (2, 1)]
    return _models(runs, whats, order)


@table
def model_by(name: str) -> str:
    """Whole models of one file, with all that was measured."""
    runs = _runs(name)
    whats = dict.fromkeys(what for _, _, what in runs)
    order = dict.fromkeys((dtype, threads) for dtype, threads, _ in runs)
    return _models(runs, whats, order)


@table
def model_gpu() -> str:
    """Greedy decoding as one CUDA graph."""
    rows = []
    for row in read("model-gpu-compiled")["runs"][0]["rows"]:
        if row["name"] != "decode at batch 1, bare loop":
            continue
        for name, of in row["models"].items():
            low, high = of.get("speed_spread", (1.0, 1.0))
            speed = f"{of.get('speed', 1.0):.2f}x"
            rows.append(
                [
                    name,
                    f"{speed} ({low:.2f} to {high:.2f})" if "speed" in of else speed,
                    f"{of['tokens_per_second']:,.0f}",
                    f"{1000 / of['tokens_per_second']:.3f}",
                    f"{100 * of['roofline']['share']:.0f} %",
                ]
            )
    head = ["model, bfloat16", "speed against dense", "tokens a second", "ms a token"]
    return markdown([*head, "share of the roofline"], rows)


@table
def training() -> str:
    """A training step at GPT-2 small's shapes."""
    return markdown(
        ["training step", "speed against dense", "spread", "against `torch.kron`", "B first",
         "GFLOP a token", "peak memory"],
        (
            [
                r["model"],
                _ratio(r["against_dense"]),
                f"{r['spread'][0]:.2f} to {r['spread'][1]:.2f}",
                _ratio(r["against_kron"]),
                _ratio(r["against_kron_b_first"]),
                f"{r['flops_per_token'] / 1e9:.3f}",
                f"{r['peak_gb']:.2f} GB",
            ]
            for r in read("training")["rows"]
        ),
    )  # fmt: skip


@table
def speed_summary() -> str:
    """Least and most over dtypes and threads, MLPs alone and whole models."""
    stack = [row for row in read("forward")["rows"] if row["tokens"] in (1, 1024)]
    labels = {
        "81M (1536, 384)": "the paper's 81M, (1536, 384)",
        "81M (768, 768)": "81M, (768, 768)",
        "96M (1536, 768)": "96M, (1536, 768)",
    }
    rows = []
    for scheme, label in labels.items():
        for tokens, what in ((1, "one token"), (1024, "1,024 tokens")):
            mine = [r for r in stack if r["scheme"] == scheme and r["tokens"] == tokens]
            found = [
                _span(r["found"]["krony"]["ratio"] for r in mine if r["dtype"] == dtype)
                for dtype in ("float32", "bfloat16")
            ]
            rows.append([f"MLPs, {label}", what, *found])
    for model in ("a quarter by a budget", "a quarter by a budget for decode"):
        for what in (DECODE, PREFILL):
            found = [model_speed(model, what, dtype) for dtype in ("float32", "bfloat16")]
            rows.append([f"whole model, {model}", what, *found])
    return markdown(["what", "at", "float32", "bfloat16"], rows)


def model_speed(model: str, what: str, dtype: str | None = None) -> str:
    """Least and most speed of a whole model that a budget makes, over dtypes and threads."""
    found = _runs("model-budget").items()
    return _span(
        models[model]["speed"]
        for (of, _, name), models in found
        if name == what and dtype in (None, of)
    )


def _span(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:.2f}x to {found[-1]:.2f}x"
