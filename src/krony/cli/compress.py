"""`krony plan` and `krony compress`, and the options that say which matrix gets which factors."""

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony import words
from krony.cli import tables
from krony.cli.options import Destination, JsonFile, Source, StoredDtype, err, out, progress_bar
from krony.cli.shapes import (
    SMALL,
    Calibration,
    CalibrationBos,
    Flops,
    InitOption,
    Layers,
    LayoutOption,
    Memory,
    Objective,
    Params,
    Scalars,
    Scheme,
    Seed,
    ShapeText,
    Share,
    SmallText,
    TargetText,
    Terms,
    Windows,
)
from krony.errors import KronyError

CURVE = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)  # shares of the targets

if TYPE_CHECKING:
    import torch
    import transformers

    from krony.compression.budget import BudgetPlan
    from krony.compression.work import Work
    from krony.hf.plan import Plan


def plan_command(
    source: Source,
    params: Params = None,
    share: Share = None,
    flops: Flops = None,
    scheme: Scheme = None,
    shape: ShapeText = None,
    small: SmallText = None,
    terms: Terms = 1,
    scalars: Scalars = False,
    layers: Layers = None,
    target: TargetText = None,
    layout: LayoutOption = "small-outer",
    objective: Objective = None,
    calibration: Calibration = words.SELF,
    windows: Windows = None,
    bos: CalibrationBos = "auto",
    memory: Memory = None,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="Ten sizes from one calibration, to choose from.",
            rich_help_panel=SMALL,
        ),
    ] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Show which matrix would get which factors, and what that saves.

    The file that --json writes is what compress --plan reads; with --curve, ten sizes.
    """
    from krony.compression.work import Work
    from krony.hf import checkpoints
    from krony.measure import info

    budget = _budget(share, params, flops, None if curve else objective, target)
    _check_any(budget, scheme, shape, small, curve)
    _check_one_way(None, budget, scheme or shape or small, terms != 1 or scalars or layers)
    model = checkpoints.load_model(source)
    if curve:
        if budget:
            raise KronyError("--curve tries ten sizes; leave the budget out")
        tokenizer = checkpoints.find_tokenizer(source)
        tokens = _tokens(model, tokenizer, calibration, windows, target or "mlp", seed, bos)
        aim = objective or "size"
        _curve(model, tokens, target or "mlp", aim, seed, memory, json_file)
        return
    if budget:
        budget["parameters"] = words.parse_size(budget["parameters"], info.parameters(model))
        tokenizer = checkpoints.find_tokenizer(source)
        tokens = _tokens(model, tokenizer, calibration, windows, budget["target"], seed, bos)
        found = _find(model, tokens, budget, seed, Work(), memory)
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
    params: Params = None,
    share: Share = None,
    flops: Flops = None,
    scheme: Scheme = None,
    shape: ShapeText = None,
    small: SmallText = None,
    terms: Terms = 1,
    scalars: Scalars = False,
    layers: Layers = None,
    target: TargetText = None,
    layout: LayoutOption = "small-outer",
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="A plan in JSON, as plan --json writes it.",
            rich_help_panel=SMALL,
        ),
    ] = None,
    objective: Objective = None,
    init: InitOption = None,
    calibration: Calibration = words.SELF,
    windows: Windows = None,
    bos: CalibrationBos = "auto",
    memory: Memory = None,
    dtype: StoredDtype = None,
    seed: Seed = 0,
) -> None:
    """Factor a model and write it to a directory that from_pretrained loads.

    What is finished is kept beside the directory until it is there: after a stop the same command
    goes on. Under `accelerate launch` the processes share the calibration text.
    """
    from krony.compression import together
    from krony.compression.factorise import DATA, compress
    from krony.compression.work import Work, beside
    from krony.hf import checkpoints
    from krony.hf.plan import Plan
    from krony.measure import info
    from krony.measure.memory import parse_bytes

    first = _first_of_processes()
    checkpoints.check_destination(destination)
    budget = _budget(share, params, flops, objective, target)
    _check_any(budget, scheme, shape, small, plan_file)
    _check_one_way(plan_file, budget, scheme or shape or small, terms != 1 or scalars or layers)
    tokenizer = checkpoints.find_tokenizer(source)
    model = checkpoints.load_model(source)
    before = info.parameters(model)
    if budget:
        budget["parameters"] = words.parse_size(budget["parameters"], before)
    plan = None if plan_file is None else Plan.read(plan_file)
    # Which hidden units a plan takes out only data can say.
    by_data = bool(budget) or (plan is not None and any(m.narrowed for m in plan.matrices))
    method = init or (DATA if by_data else "van-loan")
    tokens = found = None
    work = Work()
    if budget or method == DATA:
        chosen = budget["target"] if budget else target or "mlp"
        folder = beside(destination)
        tokens = _tokens(model, tokenizer, calibration, windows, chosen, seed, bos, folder)
        work = Work.of(model, tokens, seed, folder)
    if budget and tokens is not None:
        found = _find(model, tokens, budget, seed, work, memory)
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
            work=work,
            memory=parse_bytes(memory),
        )
    if dtype is not None:
        model.to(checkpoints.DTYPES[dtype])  # type: ignore[arg-type]
    if first:
        checkpoints.save_model(model, destination, tokenizer)
        work.remove()
    together.meet()
    out.print(tables.saving(before, plan))
    out.print(tables.costs_table(plan, found.dense if found else (), model.dtype))
    if found is not None and method == DATA:  # what is predicted is the harm of those factors
        out.print(_harm(found))
    out.print(f"Wrote {destination} ({tables.megabytes(checkpoints.directory_bytes(destination))})")
    out.print(_next(source, destination), markup=False, soft_wrap=True)


def _first_of_processes() -> bool:
    """Join the processes that a launcher started, if one did; only the first one speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch
    from accelerate import PartialState

    first = bool(PartialState(cpu=not torch.cuda.is_available()).is_main_process)
    out.quiet = err.quiet = not first
    return first


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
        "parameters": params,
        "flops": flops,
        # A size for the whole model leaves it open where to save.
        "target": target or ("mlp" if params is None else "everything"),
        "objective": objective or "size",
    }


def _check_any(*ways: Any) -> None:
    if not any(ways):
        raise KronyError(
            "say how small: --size 60% of the whole model, or --budget, --flops, --scheme, "
            "--shape, --small, --plan"
        )


def _check_one_way(
    plan_file: Path | None, budget: dict[str, Any], shaped: str | None, detailed: Any
) -> None:
    if (plan_file is not None) + bool(budget) + bool(shaped) > 1:
        raise KronyError(
            "give a plan, a budget, or a scheme, shape or small shape, not two of them"
        )
    if budget and detailed:
        raise KronyError("a budget finds its own terms and layers; leave those options out")


def _tokens(
    model: "transformers.PreTrainedModel",
    tokenizer: "transformers.PreTrainedTokenizerBase | None",
    calibration: str,
    windows: int | None,
    target: str,
    seed: int,
    bos: str,
    folder: Path | None = None,
) -> "torch.Tensor":
    """Calibration text; what the model takes long to write itself is kept in the work folder."""
    import torch

    from krony.compression import calibrate
    from krony.compression.work import Work
    from krony.hf.families import find_targets
    from krony.measure import evaluate

    if windows is None:
        widest = max(max(t.shape) for t in find_targets(model, target) if t.layer is not None)
        window = min(calibrate.WINDOW, evaluate.context_length(model))
        windows = calibrate.enough(widest, window)

    def make() -> "torch.Tensor":
        return calibrate.calibration_windows(
            calibration, model, tokenizer, windows, seed=seed, bos=bos
        )

    if folder is None or calibration != calibrate.SELF:
        return make()
    work = Work.of(model, torch.empty(0), seed, folder)
    return work.once(lambda: {"ids": make()}, "text", windows)["ids"]


def _find(
    model: "transformers.PreTrainedModel",
    tokens: "torch.Tensor",
    budget: dict[str, Any],
    seed: int,
    work: "Work",
    memory: str | None,
) -> "BudgetPlan":
    from krony.compression import limits
    from krony.compression.budget import make_budget_plan
    from krony.compression.forecast import forecast
    from krony.hf.families import find_targets
    from krony.measure import info
    from krony.measure.memory import parse_bytes, peak_bytes

    most, started = parse_bytes(memory), time.monotonic()
    targets = find_targets(model, budget["target"])
    asked = {key: value for key, value in budget.items() if key != "target"}
    limits.limits(targets, info.parameters(model), **asked)  # a budget that can't be says so first
    expected = forecast(model, tokens, targets, most)
    err.print(
        f"{tokens.numel():,} tokens of calibration: about {_minutes(expected.seconds)} and "
        f"{expected.bytes / 1e9:.1f} GB in all, more where sums of Kronecker products win"
    )
    with progress_bar() as bar:
        task = bar.add_task("Planning", total=None)
        found = make_budget_plan(
            model,
            tokens,
            **budget,
            seed=seed,
            progress=lambda what, i, n: bar.update(task, description=what, completed=i, total=n),
            work=work,
            memory=most,
        )
    err.print(
        f"Planned in {_minutes(time.monotonic() - started)}, "
        f"{peak_bytes(model) / 1e9:.1f} GB at most"
    )
    return found


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"


def _curve(
    model: "transformers.PreTrainedModel",
    tokens: "torch.Tensor",
    target: str,
    objective: str,
    seed: int,
    memory: str | None,
    json_file: Path | None,
) -> None:
    from krony.compression.budget import curve_row, make_curve
    from krony.hf import checkpoints
    from krony.measure.memory import parse_bytes

    with progress_bar() as bar:
        task = bar.add_task("Planning", total=None)
        found = make_curve(
            model,
            tokens,
            CURVE,
            target=target,
            objective=objective,
            seed=seed,
            progress=lambda what, i, n: bar.update(task, description=what, completed=i, total=n),
            memory=parse_bytes(memory),
        )
    rows = [curve_row(model, point) for point in found]
    out.print(tables.curve_table(rows))
    if json_file is not None:
        checkpoints.write_json(json_file, rows)
        out.print(f"Wrote {json_file}")


def _harm(found: "BudgetPlan") -> str:
    return f"Predicted harm of this plan: {found.harm:.4f} nats a token."


def _next(source: str, destination: Path) -> str:
    """What to do with a compressed model, in commands to copy."""
    dense, small = shlex.quote(source), shlex.quote(str(destination))
    healed = shlex.quote(f"{destination}-healed")
    return (
        f"Next: krony evaluate {small} --against {dense} measures it; krony heal {small} {healed} "
        f"--teacher {dense} --data TEXT --tokens 2M wins back what was lost"
    )


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
