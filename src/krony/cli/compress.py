"""`krony plan` and `krony compress`, and the options that say which matrix gets which factors."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony import words
from krony.cli import tables
from krony.cli.options import Bos, Destination, DtypeOption, JsonFile, Source, out, progress_bar
from krony.errors import KronyError

if TYPE_CHECKING:
    import torch
    import transformers

    from krony.compression.budget import BudgetPlan
    from krony.hf.plan import Plan

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
TargetText = Annotated[
    str | None,
    typer.Option(
        help=f"Of {', '.join(words.TARGETS)}, or patterns of module names, by commas. Default: mlp."
    ),
]
LayoutOption = Annotated[
    words.Layout, typer.Option(help="small-outer is fast; large-outer is the paper's order.")
]
Share = Annotated[
    float | None,
    typer.Option("--budget", help="Find the shapes: share of the targets to keep, 0 to 1."),
]
Params = Annotated[
    str | None, typer.Option(help="Find the shapes: parameters of the whole model, 81M.")
]
Flops = Annotated[
    float | None, typer.Option(help="Find the shapes: share of the targets' multiply-adds.")
]
Objective = Annotated[
    words.Objective | None,
    typer.Option(help="What else gets that share: decode (time a token), throughput (flops)."),
]
Calibration = Annotated[
    str, typer.Option(help="Text for data and budgets, as --data; or self: its own samples.")
]
Windows = Annotated[int, typer.Option(help="Windows of calibration text.")]
Seed = Annotated[int, typer.Option(help="For whatever is random.")]


def plan_command(
    source: Source,
    scheme: Scheme = None,
    shape: ShapeText = None,
    small: SmallText = None,
    terms: Terms = 1,
    scalars: Scalars = False,
    layers: Layers = None,
    target: TargetText = None,
    layout: LayoutOption = "small-outer",
    share: Share = None,
    params: Params = None,
    flops: Flops = None,
    objective: Objective = None,
    calibration: Calibration = words.SELF,
    windows: Windows = 128,
    bos: Bos = "auto",
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Show which matrix would get which factors, and what that saves.

    The file that --json writes is what compress --plan reads.
    """
    from krony.compression import calibrate
    from krony.hf import checkpoints
    from krony.measure import info

    budget = _budget(share, params, flops, objective, target)
    _check_one_way(None, budget, scheme or shape or small, terms != 1 or scalars or layers)
    model = checkpoints.load_model(source)
    if budget:
        tokenizer = checkpoints.find_tokenizer(source)
        tokens = calibrate.calibration_windows(
            calibration, model, tokenizer, windows, seed=seed, bos=bos
        )
        found = _find(model, tokens, budget, seed)
        plan = found.plan
    else:
        plan = _plan(model, scheme, shape, small, terms, scalars, layers, target, layout)
    out.print(tables.plan_table(plan))
    out.print(tables.saving(info.parameters(model), plan))
    out.print(tables.costs_table(plan, found.dense if budget else (), model.dtype))
    if budget:
        out.print(_harm(found))
    if json_file is not None:
        checkpoints.write_text(json_file, plan.to_json())
        out.print(f"Wrote {json_file}")


def compress_command(
    source: Source,
    destination: Destination,
    scheme: Scheme = None,
    shape: ShapeText = None,
    small: SmallText = None,
    terms: Terms = 1,
    scalars: Scalars = False,
    layers: Layers = None,
    target: TargetText = None,
    layout: LayoutOption = "small-outer",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="A plan in JSON.")] = None,
    share: Share = None,
    params: Params = None,
    flops: Flops = None,
    objective: Objective = None,
    init: Annotated[
        words.Init | None, typer.Option(help="How the factors are found. Default: van-loan; data.")
    ] = None,
    calibration: Calibration = words.SELF,
    windows: Windows = 128,
    bos: Bos = "auto",
    dtype: DtypeOption = None,
    seed: Seed = 0,
) -> None:
    """Factor a model and write it to a directory that from_pretrained loads."""
    from krony.compression import calibrate
    from krony.compression.factorise import DATA, compress
    from krony.hf import checkpoints
    from krony.hf.plan import Plan
    from krony.measure import info

    checkpoints.check_destination(destination)
    budget = _budget(share, params, flops, objective, target)
    _check_one_way(plan_file, budget, scheme or shape or small, terms != 1 or scalars or layers)
    tokenizer = checkpoints.find_tokenizer(source)
    model = checkpoints.load_model(source)
    before = info.parameters(model)
    plan = None if plan_file is None else Plan.read(plan_file)
    # Which hidden units a plan takes out only data can say.
    by_data = bool(budget) or (plan is not None and any(m.narrowed for m in plan.matrices))
    method = init or (DATA if by_data else "van-loan")
    tokens = found = None
    if budget or method == DATA:
        tokens = calibrate.calibration_windows(
            calibration, model, tokenizer, windows, seed=seed, bos=bos
        )
    if budget and tokens is not None:
        found = _find(model, tokens, budget, seed)
        plan = found.plan
        out.print(tables.plan_table(plan))
    elif plan is None:
        plan = _plan(model, scheme, shape, small, terms, scalars, layers, target, layout)
    with progress_bar() as bar:
        task = bar.add_task("Factorising", total=len(plan.matrices))
        compress(
            model,
            plan,
            init=method,
            seed=seed,
            calibration=tokens,
            moments=found.moments if found else None,
            progress=lambda *_: bar.advance(task),
        )
    if dtype is not None:
        model.to(checkpoints.DTYPES[dtype])  # type: ignore[arg-type]
    checkpoints.save_model(model, destination, tokenizer)
    out.print(tables.saving(before, plan))
    out.print(tables.costs_table(plan, found.dense if found else (), model.dtype))
    if found is not None:
        out.print(_harm(found))
    out.print(f"Wrote {destination} ({tables.megabytes(checkpoints.directory_bytes(destination))})")


def _budget(
    share: float | None,
    params: str | None,
    flops: float | None,
    objective: words.Objective | None,
    target: str | None,
) -> dict[str, Any]:
    """What `make_budget_plan` is asked for; nothing where no budget is given."""
    if share is None and params is None and flops is None:
        if objective is not None:
            raise KronyError("an objective needs a budget: --budget, --params or --flops")
        return {}
    return {
        "share": share,
        "parameters": words.parse_count(params),
        "flops": flops,
        # A size for the whole model leaves it open where to save.
        "target": target or ("mlp" if params is None else "everything"),
        "objective": objective or "size",
    }


def _check_one_way(
    plan_file: Path | None, budget: dict[str, Any], shaped: str | None, detailed: Any
) -> None:
    if (plan_file is not None) + bool(budget) + bool(shaped) > 1:
        raise KronyError(
            "give a plan, a budget, or a scheme, shape or small shape, not two of them"
        )
    if budget and detailed:
        raise KronyError("a budget finds its own terms and layers; leave those options out")


def _find(
    model: "transformers.PreTrainedModel",
    tokens: "torch.Tensor",
    budget: dict[str, Any],
    seed: int,
) -> "BudgetPlan":
    from krony.compression.budget import make_budget_plan

    with progress_bar() as bar:
        task = bar.add_task("Planning", total=None)
        return make_budget_plan(
            model,
            tokens,
            **budget,
            seed=seed,
            progress=lambda what, i, n: bar.update(task, description=what, completed=i, total=n),
        )


def _harm(found: "BudgetPlan") -> str:
    return f"Predicted harm of this plan: {found.harm:.4f} nats a token."


def _plan(
    model: "transformers.PreTrainedModel",
    scheme: str | None,
    shape: str | None,
    small: str | None,
    terms: int,
    scalars: bool,
    layers: str | None,
    target: str | None,
    layout: Any,
) -> "Plan":
    from krony.hf.plan import make_plan, parse_layers, parse_shape

    return make_plan(
        model,
        scheme=scheme,
        shape=parse_shape(shape, "--shape"),
        small=parse_shape(small, "--small"),
        terms=terms,
        scalars=scalars,
        layers=parse_layers(layers),
        target=target or "mlp",
        layout=layout,
    )
