"""Terminal tables of plans, models and measurements: JSON-ready figures in, rich tables out."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.table import Table

from krony.maths.schemes import Factors

if TYPE_CHECKING:
    import torch

    from krony.hf.families import Target
    from krony.hf.plan import Plan
    from krony.measure.evaluate import Perplexity
    from krony.nn.explain import Row

DENSE = "dense"


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return made


def sides(shape: Any) -> str:
    """(1536, 384) as 1536x384."""
    return "x".join(map(str, shape))


def percent(share: float) -> str:
    """0.25 as 25.0 %."""
    return f"{100 * share:.1f} %"


def megabytes(count: int) -> str:
    """Decimal megabytes."""
    return f"{count / 1e6:,.2f} MB"


def sizes_table(before: Any, after: Any) -> Table:
    """The numbers of two configurations that differ."""
    made = table("config.json", "number", "before", "now")
    old, new = before.get_text_config().to_dict(), after.get_text_config().to_dict()
    for name, value in new.items():
        was = old.get(name)
        if isinstance(value, int) and was != value and name in old:
            made.add_row(name, "the default" if was is None else f"{was:,}", f"{value:,}")
    return made


def factors_text(terms: int, large: Any, small: Any, interpolative: bool = False) -> str:
    """One group of factors, 2 x 1024x256 by 3x3."""
    form = " interpolative" if interpolative else ""
    return f"{terms} x {sides(large)} by {sides(small)}{form}"


def narrowed_text(shape: Any, dense_shape: Any) -> str:
    """512x256, and where hidden units were taken out 512x256 of 1024x256."""
    if dense_shape is None or tuple(dense_shape) == tuple(shape):
        return sides(shape)
    return f"{sides(shape)} of {sides(dense_shape)}"


def plan_table(plan: "Plan") -> Table:
    """A row a matrix: shapes, terms, parameters, multiply-adds."""
    made = table("Plan", "matrix", "shape", "terms x large by small", "rank", "parameters", "share")
    made.add_column("multiply-adds", justify="right")
    for m in plan.matrices:
        factors = " + ".join(
            factors_text(g.terms, g.large, g.small, g.interpolative) for g in m.groups
        )
        rank = min(sum(g.rank for g in m.groups) if m.groups else min(m.shape), *m.shape)
        made.add_row(
            m.name,
            narrowed_text(m.shape, m.dense_shape),
            factors or DENSE,
            f"{rank:,}",
            f"{m.parameters:,}",
            percent(m.parameters / m.dense_parameters),
            _share(m.multiply_adds, m.dense_multiply_adds),
        )
    return made


def _share(cost: float, dense: float) -> str:
    return percent(cost / dense) if dense else "-"  # an embedding that is only looked up


def saving(before: int, plan: "Plan") -> str:
    """What a plan does to a model of `before` parameters, in two lines."""
    after = before - sum(m.saved for m in plan.matrices)
    return (
        f"\n{len(plan.matrices)} matrices: {plan.dense_parameters:,} parameters become "
        f"{plan.parameters:,} ({percent(plan.parameters / plan.dense_parameters)}), "
        f"multiply-adds {_share(plan.multiply_adds, plan.dense_multiply_adds)}.\n"
        f"The model: {before:,} become {after:,}, {percent(1 - after / before)} saved."
    )


def curve_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A row a size, and its predicted harm as a bar."""
    made = table(
        "Sizes to choose from", "share", "parameters", "bytes", "decode", "prefill", "nats", ""
    )
    most = max((row["harm"] for row in rows), default=0.0) or 1.0
    for row in rows:
        made.add_row(
            percent(row["share"]),
            f"{row['parameters']:,}",
            megabytes(row["bytes"]),
            percent(row["decode"]),
            percent(row["prefill"]),
            f"{row['harm']:.4f}",
            "█" * max(1, round(30 * row["harm"] / most)),
        )
    return made


def costs_table(plan: "Plan", kept: Sequence["Target"], dtype: "torch.dtype") -> Table:
    """What a plan costs in each currency, and which structures it takes how often.

    Args:
        kept: targets that stay dense, which the plan does not list.
        dtype: of the model, for bytes.
    """
    from krony.compression.limits import READ
    from krony.hf.plan import matrix_plan

    whole = [*plan.matrices, *(matrix_plan(t, ()) for t in kept)]
    counts = Counter(structure(m.groups, m.narrowed) for m in whole)
    kinds = ", ".join(f"{count} x {name}" for name, count in counts.most_common())
    parameters = sum(m.dense_parameters for m in whole), sum(m.parameters for m in whole)
    adds = sum(m.dense_multiply_adds for m in whole), sum(m.multiply_adds for m in whole)
    formed = sum(m.formed_multiply_adds for m in whole)
    reads = sum(m.dense_reads for m in whole), sum(m.reads for m in whole)
    forming = sum(m.forming for m in whole if not m.keeps_formed)
    memory = sum(m.in_memory for m in whole)
    before, after = (r + a / READ for r, a in zip(reads, adds, strict=True))
    made = table(f"\nWhat it costs: {kinds}", "currency", "dense", "now", "share")
    made.add_row("parameters", *(f"{p:,}" for p in parameters), _share(*reversed(parameters)))
    size = dtype.itemsize
    name = f"bytes ({str(dtype).removeprefix('torch.')})"
    made.add_row(name, *(megabytes(size * p) for p in parameters), _share(*reversed(parameters)))
    if memory != parameters[1]:
        made.add_row(
            "in memory, W of sums kept",
            f"{parameters[0]:,}",
            f"{memory:,}",
            _share(memory, parameters[0]),
        )
    made.add_row("multiply-adds a token", *(f"{a:,}" for a in adds), _share(*reversed(adds)))
    if formed < adds[1]:
        once = f"{formed:,} and {forming:,} a batch"
        made.add_row("the same, W formed", f"{adds[0]:,}", once, _share(formed, adds[0]))
    made.add_row(
        "time to decode, in reads", f"{before:,.0f}", f"{after:,.0f}", _share(after, before)
    )
    return made


def structure(groups: Sequence[Factors], narrowed: bool = False) -> str:
    """The kind of the factors of one matrix: low rank, one term, or a sum, with the small side."""
    from krony.maths.fit import is_low_rank

    names = [] if groups else [DENSE]
    for g in groups:
        if is_low_rank(g):
            names.append("low rank")
        else:
            names.append(f"{'sum' if g.terms > 1 else 'one term'} with {sides(g.small)}")
    return ("narrowed, " if narrowed else "") + " and ".join(names)


def space_table(rows: list[dict[str, Any]], names: dict[tuple[int, ...], str]) -> Table:
    """A row a point of the design space, the paper's names beside theirs."""
    made = table(
        "Design space", "terms x A by B", "rank", "parameters", "share", "multiply-adds", "paper"
    )
    for row in rows:
        matrix = row["parameters"] / row["share"]
        made.add_row(
            factors_text(row["terms"], row["large"], row["small"]),
            f"{row['rank']:,}",
            f"{row['parameters']:,}",
            percent(row["share"]),
            percent(row["multiply_adds"] / matrix),
            names.get((*row["large"], row["terms"]), ""),
        )
    return made


def info_table(info: dict[str, Any]) -> Table:
    """A row a matrix of a model."""
    if not info["factored"]:
        made = table(f"{info['architecture']}, dense", "matrix", "role", "shape", "parameters")
        for row in info["matrices"]:
            made.add_row(row["name"], row["role"], sides(row["shape"]), f"{row['parameters']:,}")
        return made
    made = table(
        f"{info['architecture']}, factored by {info['init']} (seed {info['seed']})",
        "matrix",
        "shape",
        "terms x large by small",
        "parameters",
        "share",
        "norm kept",
    )
    for row in info["matrices"]:
        factors = " + ".join(
            factors_text(f["terms"], f["large"], f["small"], f["interpolative"])
            for f in row["factors"]
        )
        kept = row["norm_kept"]
        made.add_row(
            row["name"],
            narrowed_text(row["shape"], row["dense_shape"]),
            (factors or DENSE) + (", scalars" if row["scalars"] else ""),
            f"{row['parameters']:,}",
            percent(row["parameters"] / row["dense_parameters"]),
            "-" if kept is None else percent(kept),
        )
    return made


def explain_table(rows: list["Row"], tokens: int) -> Table:
    """A row a kind of module: the kernel that takes it, and why those before it do not."""
    from krony.nn.explain import summary

    made = Table(
        title=f"Kernels for {tokens:,} token{'s' if tokens > 1 else ''} at once",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for column in ("module", "how many", "kernel", "not these, because"):
        made.add_column(column, overflow="fold")
    for row in summary(rows):
        kernel = f"{row.backend}: {row.how}" if row.how else row.backend
        why = "\n".join(f"{name}: {reason}" for name, reason in row.why_not)
        made.add_row(f"{row.name} ({row.kind})", str(row.count), kernel, why or "-")
    return made


def _or_dash(value: float | None) -> str:
    return "-" if value is None else number(value)


def perplexity_table(results: dict[str, "Perplexity"]) -> Table:
    """A row a model, all on one text."""
    first = next(iter(results.values()))
    made = table(
        f"{first.data}: {first.tokens:,} tokens, protocol {first.protocol}, window {first.window}, "
        f"stride {first.stride}",
        "model",
        "perplexity",
        "nats a token",
        "chunk mean",
        "a word",
        "bits a byte",
        "against the first",
        "dtype",
        "seconds",
    )
    for name, result in results.items():
        made.add_row(
            name,
            number(result.perplexity),
            f"{result.nats:.4f}",
            "-" if result.chunk_mean is None else number(result.chunk_mean),
            _or_dash(result.word_perplexity),
            _or_dash(result.bits_per_byte),
            f"{result.perplexity / first.perplexity:.3f}x",
            result.dtype,
            f"{result.seconds:.1f}",
        )
    return made


def demo_table(record: dict[str, Any]) -> Table:
    """A row a model of `krony demo`."""
    made = table(
        f"{record['data']}: {record['tokens']:,} tokens, protocol {record['protocol']}, window "
        f"{record['window']}, stride {record['stride']}",
        "MLPs",
        "of dense",
        "parameters",
        "on disk",
        "perplexity",
        "against dense",
        "factoring",
        "evaluate",
        "reloaded",
    )
    first = record["rows"][0]["perplexity"]
    for row in record["rows"]:
        made.add_row(
            row["name"],
            percent(row["mlp_share"]),
            f"{row['parameters']:,}",
            megabytes(row["bytes"]),
            number(row["perplexity"]),
            f"{row['perplexity'] / first:,.2f}x",
            f"{row['factorize_seconds']:.2f} s",
            f"{row['evaluate_seconds']:.1f} s",
            "equal" if row["reloaded_equal"] else "DIFFERS",
        )
    return made


def bench_table(record: dict[str, Any], absolute: bool) -> Table:
    """A row a measurement of `krony bench`; `absolute` times mean something on a GPU only."""
    from krony.measure.bench import times

    models, settings = record["models"], record["settings"]
    names = [_role(record, role) for role in models]
    title = f"{settings['device']}, {settings['dtype']}, {settings['threads']} threads"
    made = table(title, "measured")
    extra = ["speed", "spread"] if len(models) > 1 else []
    units = ("ms", "tokens/s") if absolute else ()
    seconds = [f"{name}, {unit}" for name in names for unit in units]
    for column in [*seconds, *extra, *(f"{name}, of roofline" for name in names), "limit"]:
        made.add_column(column, justify="right")
    for row in record["rows"]:
        figures = [row["models"][role] for role in models]
        cells = []
        for f in figures if absolute else []:
            speed = f.get("tokens_per_second")
            cells += [f"{1e3 * f['seconds']:,.2f}", "-" if speed is None else f"{speed:,.1f}"]
        if extra:
            low, high = figures[0]["speed_spread"]
            cells += [times(figures[0]["speed"]), f"{low:.2f} to {high:.2f}"]
        roofs = [f.get("roofline") for f in figures]
        cells += ["-" if roof is None else percent(roof["share"]) for roof in roofs]
        made.add_row(row["name"], *cells, roofs[0]["limit"] if roofs[0] else "-")
    return made


def takes_table(record: dict[str, Any]) -> Table:
    """What the models of `krony bench` take: parameters, bytes on disk, memory."""
    models = record["models"]
    made = table("", "what it takes", *(_role(record, role) for role in models))
    if len(models) > 1:
        made.add_column("share", justify="right")
    for key, name in (
        ("parameters", "parameters"),
        ("disk_bytes", "on disk"),
        ("peak_bytes", "peak memory"),
    ):
        values = [m[key] for m in models.values()]
        cells = [f"{v:,}" if key == "parameters" else megabytes(v) for v in values]
        made.add_row(name, *cells, *([_share(*values)] if len(values) > 1 else []))
    return made


def _role(record: dict[str, Any], role: str) -> str:
    """The name of a model's directory or of the model on the Hub."""
    name = PurePath(record["models"][role]["source"]).name
    names = [PurePath(m["source"]).name for m in record["models"].values()]
    return name if len(set(names)) == len(names) else record["models"][role]["source"]


def number(value: float) -> str:
    """Two decimals below a thousand, none above a million."""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"
