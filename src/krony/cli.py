"""The command line: each command is a few lines over functions of the library."""

import json
import logging
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from krony import budget, calibrate, checkpoints, data, evaluate, info, schemes, tables
from krony.errors import KronyError
from krony.factorise import DATA, INITS, compress
from krony.kron import LAYOUTS
from krony.modeling import config_of
from krony.plan import Plan, make_plan, parse_layers, parse_shape

app = typer.Typer(
    help="Smaller transformers with Kronecker products.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# Wide when not a terminal: a table that is piped into a file must not be cut at 80 columns.
out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
err = Console(stderr=True, highlight=False)

Dtype = StrEnum("Dtype", list(checkpoints.DTYPES))  # type: ignore[misc]
Init = StrEnum("Init", {name: name for name in (*INITS, DATA)})  # type: ignore[misc]
ObjectiveName = StrEnum("ObjectiveName", {o: o for o in budget.OBJECTIVES})  # type: ignore[misc]
LayoutName = StrEnum("LayoutName", {name: name for name in LAYOUTS})  # type: ignore[misc]

DEFAULT_LAYOUT, DEFAULT_INIT = LayoutName(LAYOUTS[0]), Init("van-loan")
DEFAULT_OBJECTIVE = ObjectiveName(budget.OBJECTIVES[0])


class Form(StrEnum):
    """What `krony export` can write."""

    dense = "dense"


Source = Annotated[str, typer.Argument(help="A Hub name, a model directory, or demo.")]
Destination = Annotated[Path, typer.Argument(help="A directory that does not exist yet.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Default: that of the checkpoint.")]
Device = Annotated[str | None, typer.Option(help="A torch device; default: cuda if there is one.")]


@app.command("schemes")
def schemes_command(
    hidden: Annotated[int, typer.Option(help="Width of the MLP's hidden axis.")] = 3072,
    model: Annotated[int, typer.Option(help="Width of the model axis.")] = 768,
    terms: Annotated[int, typer.Option(help="Kronecker products that are summed.")] = 1,
    everything: Annotated[bool, typer.Option("--all", help="Also shapes of lower rank.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The design space of one matrix: shapes, rank, parameters, multiply-adds."""
    if min(hidden, model, terms) < 1:
        raise KronyError(f"sizes and terms must be at least 1, not {hidden}, {model} and {terms}")
    rows = [schemes.describe(f) for f in schemes.design_space((hidden, model), terms)]
    rows = [row for row in rows if everything or row["full_rank"]]
    named: dict[tuple[int, ...], str] = {}
    if (hidden, model) == (schemes.GPT2_HIDDEN, schemes.GPT2_MODEL):
        named = {(*s.shape, s.terms): s.name for s in schemes.SCHEMES.values()}
    if as_json:
        named_totals = {
            s.name: schemes.gpt2_total(s.shape, s.terms, s.scalars)
            for s in schemes.SCHEMES.values()
        }
        print(json.dumps({"space": rows, "gpt2": named_totals}, indent=2))
        return
    if not rows:
        raise KronyError(f"no shape of {hidden}x{model} has {terms} independent terms; use fewer")
    out.print(tables.space_table(rows, named))
    out.print(
        f"\n{len(rows)} shapes of {hidden}x{model}"
        + ("." if everything else " of full rank; --all lists the others too.")
    )
    if named:
        paper = tables.table("\nThe paper's models of GPT-2", "name", "A", "terms", "parameters")
        paper.add_column("note", justify="left")
        for s in schemes.SCHEMES.values():
            total = schemes.gpt2_total(s.shape, s.terms, s.scalars)
            count = f"{s.terms}" + (" with scalars" if s.scalars else "")
            paper.add_row(s.name, tables.sides(s.shape), count, f"{total:,}", s.note)
        out.print(paper)


Scheme = Annotated[str | None, typer.Option(help="A named model of the paper: 67M to 96M.")]
ShapeText = Annotated[
    str | None, typer.Option(help="Large factor, hidden x model: 1536x384 (else outputs x inputs).")
]
SmallText = Annotated[
    str | None, typer.Option(help="Small factor instead: 2x2 halves both axes of any matrix.")
]
Terms = Annotated[int, typer.Option(help="Kronecker products that are summed.")]
Scalars = Annotated[bool, typer.Option("--scalars", help="A learnable scalar per term.")]
Layers = Annotated[str | None, typer.Option(help="Blocks to change: 0,2-5. Default: all.")]
TargetText = Annotated[str, typer.Option(help="mlp, attention, all, or a pattern of module names.")]
LayoutOption = Annotated[
    LayoutName, typer.Option(help="small-outer is fast; large-outer is the paper's order.")
]


@app.command("plan")
def plan_command(
    source: Source,
    scheme: Scheme = None,
    shape: ShapeText = None,
    small: SmallText = None,
    terms: Terms = 1,
    scalars: Scalars = False,
    layers: Layers = None,
    target: TargetText = "mlp",
    layout: LayoutOption = DEFAULT_LAYOUT,
    json_file: JsonFile = None,
) -> None:
    """Show which matrix would get which factors, and what that saves."""
    model = checkpoints.load_model(source)
    plan = _plan(model, scheme, shape, small, terms, scalars, layers, target, layout)
    out.print(tables.plan_table(plan))
    out.print(tables.saving(info.parameters(model), plan))
    if json_file is not None:
        checkpoints.write_text(json_file, plan.to_json())
        out.print(f"Wrote {json_file}")


@app.command("compress")
def compress_command(
    source: Source,
    destination: Destination,
    scheme: Scheme = None,
    shape: ShapeText = None,
    small: SmallText = None,
    terms: Terms = 1,
    scalars: Scalars = False,
    layers: Layers = None,
    target: TargetText = "mlp",
    layout: LayoutOption = DEFAULT_LAYOUT,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="A plan in JSON.")] = None,
    share: Annotated[
        float | None,
        typer.Option("--budget", help="Find the shapes: share of the targets to keep, 0 to 1."),
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="Find the shapes: parameters of the whole model, 81M.")
    ] = None,
    objective: Annotated[
        ObjectiveName, typer.Option(help="What a budget counts: parameters, or multiply-adds.")
    ] = DEFAULT_OBJECTIVE,
    init: Annotated[
        Init | None, typer.Option(help="How the factors are found. Default: van-loan; data.")
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="Text for data and budgets, as --data; or self: its own samples.")
    ] = calibrate.SELF,
    windows: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    dtype: DtypeOption = None,
    seed: Annotated[int, typer.Option(help="For whatever is random.")] = 0,
) -> None:
    """Factor a model and write it to a directory that from_pretrained loads."""
    checkpoints.check_destination(destination)
    budgeted, shaped = share is not None or params is not None, scheme or shape or small
    if (plan_file is not None) + budgeted + bool(shaped) > 1:
        raise KronyError(
            "give a plan, a budget, or a scheme, shape or small shape, not two of them"
        )
    if budgeted and (terms != 1 or scalars or layers is not None):
        raise KronyError("a budget finds its own terms and layers; leave those options out")
    parameters = budget.parse_count(params)
    tokenizer = checkpoints.find_tokenizer(source)
    model = checkpoints.load_model(source)
    before = info.parameters(model)
    method = init.value if init else (DATA if budgeted else DEFAULT_INIT.value)
    tokens = moments = expected = None
    if budgeted or method == DATA:
        tokens = calibrate.calibration_windows(calibration, model, tokenizer, windows, seed=seed)
    if budgeted and tokens is not None:
        with _progress() as bar:
            task = bar.add_task("Planning", total=None)
            found = budget.make_budget_plan(
                model,
                tokens,
                share=share,
                parameters=parameters,
                target=target,
                objective=objective.value,
                seed=seed,
                progress=lambda what, i, n: bar.update(
                    task, description=what, completed=i, total=n
                ),
            )
        plan, moments, expected = found.plan, found.moments, found.harm
        out.print(tables.plan_table(plan))
    elif plan_file is not None:
        plan = Plan.read(plan_file)
    else:
        plan = _plan(model, scheme, shape, small, terms, scalars, layers, target, layout)
    with _progress() as bar:
        task = bar.add_task("Factorising", total=len(plan.matrices))
        compress(
            model,
            plan,
            init=method,
            seed=seed,
            calibration=tokens,
            moments=moments,
            progress=lambda *_: bar.advance(task),
        )
    if dtype is not None:
        model.to(checkpoints.DTYPES[dtype.value])  # type: ignore[arg-type]
    checkpoints.save_model(model, destination, tokenizer)
    out.print(tables.saving(before, plan))
    if expected is not None:
        out.print(f"Predicted harm of this plan: {expected:.4f} nats a token.")
    out.print(f"Wrote {destination} ({tables.megabytes(checkpoints.directory_bytes(destination))})")


@app.command("evaluate")
def evaluate_command(
    source: Source,
    against: Annotated[str | None, typer.Option(help="A second model, measured too.")] = None,
    data_name: Annotated[
        str,
        typer.Option("--data", help=f"{', '.join(data.TEXTS)}, a .txt or a .jsonl file."),
    ] = "wikitext2",
    window: Annotated[int | None, typer.Option(help="Default: 1024, or the context.")] = None,
    stride: Annotated[int | None, typer.Option(help="Default: the window.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: float32 on a CPU, the checkpoint's elsewhere.")
    ] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Perplexity on a text, token-weighted, with its protocol."""
    text = data.load_text(data_name)
    results = {}
    for name in [source] if against is None else [source, against]:
        model = _load(name, dtype, device)
        tokenizer = checkpoints.load_tokenizer(name)
        ids = evaluate.tokenize(tokenizer, text)
        with _progress() as bar:
            task = bar.add_task(name, total=None)
            results[name] = evaluate.perplexity(
                model,
                ids,
                text,
                window,
                stride,
                lambda done, total: bar.update(task, completed=done, total=total),  # noqa: B023
            )
    out.print(tables.perplexity_table(results))
    if json_file is not None:
        figures = {name: result.to_dict() for name, result in results.items()}
        record = {"environment": evaluate.environment(), "results": figures}
        checkpoints.write_json(json_file, record)
        out.print(f"Wrote {json_file}")


@app.command("export")
def export_command(
    source: Source,
    destination: Destination,
    to: Annotated[Form, typer.Option(help="dense: an ordinary Hugging Face model.")] = Form.dense,
    dtype: DtypeOption = None,
) -> None:
    """Fold a factored model into one that loads without krony."""
    checkpoints.check_destination(destination)
    tokenizer = checkpoints.find_tokenizer(source)
    model = checkpoints.load_model(source)
    if config_of(model) is None:
        raise KronyError(f"{source} is a dense model already; there is nothing to fold")
    model.dequantize(checkpoints.DTYPES[dtype.value] if dtype else None)
    checkpoints.save_model(model, destination, tokenizer)
    size = tables.megabytes(checkpoints.directory_bytes(destination))
    out.print(f"Wrote {destination}: {to.value}, {info.parameters(model):,} parameters, {size}")


@app.command("generate")
def generate_command(
    source: Source,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    dtype: DtypeOption = None,
    device: Device = None,
) -> None:
    """Let a model go on from a prompt."""
    model, tokenizer = _load(source, dtype, device), checkpoints.load_tokenizer(source)
    text = evaluate.generate(model, tokenizer, prompt, max_new_tokens, temperature, seed)
    out.print(text, markup=False, soft_wrap=True)


@app.command("info")
def info_command(
    source: Source, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Per matrix: shapes, terms, parameters, norm kept; in total: parameters, bytes, the saving."""
    figures = info.model_info(checkpoints.load_model(source))
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    out.print(tables.info_table(figures))
    total, dense = figures["parameters"], figures["dense_parameters"]
    line = f"\n{total:,} parameters, {tables.megabytes(figures['bytes'])} in {figures['dtype']}"
    if figures["factored"]:
        line += f"; dense {dense:,}: {tables.percent(1 - total / dense)} saved"
    out.print(line)


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option("--out", help="Folder for the figures.")] = Path(
        "krony-demo"
    ),
) -> None:
    """Compress the packaged model in every way, measure each, and draw the result."""
    from krony.demo import run

    with _progress() as bar:
        task = bar.add_task("Demo", total=None)
        record = run(
            output, lambda what, i, n: bar.update(task, description=what, completed=i, total=n)
        )
    out.print(tables.demo_table(record))
    out.print(f"\nAfter {record['prompt']!r}:", markup=False)
    for row in record["rows"]:
        out.print(f"  {row['name']}: {row['text']!r}", markup=False, soft_wrap=True)
    out.print(f"\nWrote {output / 'demo.json'} and {output / 'demo.png'}")


def _plan(
    model: transformers.PreTrainedModel,
    scheme: str | None,
    shape: str | None,
    small: str | None,
    terms: int,
    scalars: bool,
    layers: str | None,
    target: str,
    layout: Any,
) -> Plan:
    return make_plan(
        model,
        scheme=scheme,
        shape=parse_shape(shape, "--shape"),
        small=parse_shape(small, "--small"),
        terms=terms,
        scalars=scalars,
        layers=parse_layers(layers),
        target=target,
        layout=layout.value,
    )


def _load(source: str, dtype: Dtype | None, device: str | None) -> transformers.PreTrainedModel:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is not None:
        return checkpoints.load_model(source, checkpoints.DTYPES[dtype.value], device)
    # Half precision on a CPU is slow or coarse, by kernel: measure in float32 there.
    wanted = torch.float32 if device == "cpu" else None
    return checkpoints.load_model(source, wanted, device)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def main() -> None:
    """Run a command; bad input ends in one sentence and exit code 2."""
    # krony speaks for itself: transformers' loading bars and hints would bury its output.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = lambda message, *_: err.print(f"krony: {message}", style="yellow")
    try:
        app()
    except KronyError as error:
        err.print(f"krony: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
