"""`krony plan` and `krony compress`, and the options that say which matrix gets which factors."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony import words
from krony.cli import kept, planning, tables
from krony.cli.options import Destination, JsonFile, Source, StoredDtype, err, out
from krony.cli.plain import StructureOption, check_plain, compress_plain
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
    Sums,
    TargetText,
    Terms,
    Windows,
)
from krony.errors import KronyError

if TYPE_CHECKING:
    import torch
    import transformers

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
    layout: LayoutOption = None,
    objective: Objective = None,
    sums: Sums = False,
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

    The file that --json writes is what compress --plan reads; with --curve, ten sizes. Beside it
    what is finished is kept until it is there: after a stop the same command goes on.
    """
    from krony.compression import needed
    from krony.compression.work import Work, beside
    from krony.hf import checkpoints
    from krony.measure import info

    folder = None if json_file is None else beside(json_file)
    kept.keeps(kept.unless_json if folder is None else kept.work(folder), folder)
    work = Work()

    def read(target: str) -> "tuple[torch.Tensor, Work]":
        tokenizer = checkpoints.find_tokenizer(source)
        number = needed.of_target(model, target) if windows is None else windows
        tokens = planning.calibration_text(model, tokenizer, calibration, number, seed, bos, folder)
        return tokens, work if folder is None else Work.of(model, tokens, seed, folder)

    asked = (None, False) if curve else (objective, sums)
    budget = _budget(share, params, flops, *asked, target)
    planning.check_any(budget, scheme, shape, small, curve)
    planning.check_one_way(None, budget, scheme or shape or small, terms != 1 or scalars or layers)
    model = checkpoints.load_model(source)
    if curve:
        if budget:
            raise KronyError("--curve tries ten sizes; leave the budget out")
        among = target or "mlp"
        tokens, work = read(among)
        planning.show_curve(
            model, tokens, among, objective or "size", sums, seed, memory, json_file, work
        )
        work.remove()
        return
    if budget:
        budget["parameters"] = words.parse_size(budget["parameters"], info.parameters(model))
        planning.check_budget(model, budget)
        tokens, work = read(budget["target"])
        found = planning.Job(model, tokens, words.DATA, seed, work, memory).within_budget(budget)
        plan = found.plan
    else:
        plan = planning.shaped(model, scheme, shape, small, terms, scalars, layers, target, layout)
    out.print(tables.plan_table(plan))
    out.print(tables.saving(info.parameters(model), plan))
    out.print(tables.costs_table(plan, found.dense if budget else (), model.dtype))
    if budget:
        out.print(planning.harm(found))
    if json_file is not None:
        checkpoints.write_text(json_file, plan.to_json())
        work.remove()
        out.print(f"Wrote {json_file}")


def compress_command(
    source: Source,
    destination: Destination,
    params: Params = None,
    share: Share = None,
    structure: StructureOption = "factored",
    flops: Flops = None,
    scheme: Scheme = None,
    shape: ShapeText = None,
    small: SmallText = None,
    terms: Terms = 1,
    scalars: Scalars = False,
    layers: Layers = None,
    target: TargetText = None,
    layout: LayoutOption = None,
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
    sums: Sums = False,
    init: InitOption = words.DATA,
    calibration: Calibration = words.SELF,
    windows: Windows = None,
    bos: CalibrationBos = "auto",
    memory: Memory = None,
    dtype: StoredDtype = None,
    seed: Seed = 0,
) -> None:
    """Make a model smaller and write it to a directory that from_pretrained loads.

    What is finished is kept beside the directory until it is there: after a stop the same command
    goes on. Under `accelerate launch` the processes share the calibration text.
    """
    from krony.compression import factorise, together
    from krony.compression.factorise import DATA
    from krony.compression.work import Work, beside
    from krony.hf import checkpoints
    from krony.hf.plan import Plan
    from krony.measure import info

    first = _first_of_processes()
    checkpoints.check_destination(destination)
    budget = _budget(share, params, flops, objective, sums, target)
    if structure == "plain":
        others = {
            "--scheme": scheme, "--shape": shape, "--small": small, "--terms": terms != 1,
            "--scalars": scalars, "--layers": layers, "--layout": layout, "--plan": plan_file,
            "--init": init != DATA,
        }  # fmt: skip
        check_plain(budget, others)
        text = {"calibration": calibration, "windows": windows, "bos": bos}
        compress_plain(source, destination, share, params, target, text, seed, memory, dtype)
        out.print(_next(source, destination), markup=False, soft_wrap=True)
        return
    planning.check_any(budget, scheme, shape, small, plan_file)
    planning.check_one_way(
        plan_file, budget, scheme or shape or small, terms != 1 or scalars or layers
    )
    tokenizer = checkpoints.find_tokenizer(source)
    model = checkpoints.load_model(source)
    before = info.parameters(model)
    if budget:
        budget["parameters"] = words.parse_size(budget["parameters"], before)
        planning.check_budget(model, budget)
    plan = None
    if plan_file is not None:
        plan = Plan.read(plan_file)
    elif not budget:
        plan = planning.shaped(model, scheme, shape, small, terms, scalars, layers, target, layout)
    if plan is not None:
        factorise.checked(model, plan, init)  # before a text, which may take minutes
    free = layout is None and plan_file is None
    needs = _windows(model, plan, budget, init, free)
    tokens, work = None, Work()
    if needs is not None:
        # What by weights two layouts are compared on is written anew in seconds.
        folder = beside(destination) if init == DATA or budget else None
        if folder is not None:
            kept.keeps(kept.work(folder), folder)
        number = needs if windows is None else windows
        tokens = planning.calibration_text(model, tokenizer, calibration, number, seed, bos, folder)
        work = Work() if folder is None else Work.of(model, tokens, seed, folder)
    job = planning.Job(model, tokens, init, seed, work, memory)
    found = None
    if plan is None:
        found = job.within_budget(budget)
        plan = found.plan
        out.print(tables.plan_table(plan))
    model, plan = job.factored(plan, found, free)
    if dtype is not None:
        model.to(checkpoints.DTYPES[dtype])  # type: ignore[arg-type]
    if first:
        checkpoints.save_model(model, destination, tokenizer)
        work.remove()
    together.meet()
    out.print(tables.saving(before, plan))
    out.print(tables.costs_table(plan, found.dense if found else (), model.dtype))
    if found is not None and init == DATA:  # what is predicted is the harm of those factors
        out.print(planning.harm(found))
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


def _windows(
    model: "transformers.PreTrainedModel",
    plan: "Plan | None",
    budget: dict[str, Any],
    init: str,
    free: bool,
) -> int | None:
    """Of calibration text: what matrices need that are fitted to it, a few to choose a layout.

    None: no text is read.
    """
    from krony.compression import layout, needed

    if plan is None:
        return needed.of_target(model, budget["target"])
    if init == words.DATA:
        return needed.of_plan(model, plan)
    turned = free and init != "random" and layout.two_sided(model, plan)
    return layout.WINDOWS if turned else None


def _budget(
    share: float | None,
    params: str | None,
    flops: float | None,
    objective: words.Objective | None,
    sums: bool,
    target: str | None,
) -> dict[str, Any]:
    """What `make_budget_plan` is asked for; nothing where no budget is given."""
    if share is None and params is None and flops is None:
        if objective is not None:
            raise KronyError("an objective needs a budget: --budget, --params or --flops")
        if sums:
            raise KronyError("--sums needs a budget: --budget, --params or --flops")
        return {}
    if sums and objective == "throughput":
        raise KronyError(
            "sums of Kronecker products have more arithmetic than the matrix, and the objective "
            "throughput saves it; leave out --sums, or the objective"
        )
    return {
        "share": share,
        "parameters": params,
        "flops": flops,
        # A size for the whole model leaves it open where to save.
        "target": target or ("mlp" if params is None else "everything"),
        "objective": objective or "size",
        "sums": sums,
    }


def _next(source: str, destination: Path) -> str:
    """What to do with a compressed model, in commands to copy."""
    dense, small = shlex.quote(source), shlex.quote(str(destination))
    healed = shlex.quote(f"{destination}-healed")
    return (
        f"Next: krony evaluate {small} --against {dense} measures it; krony heal {small} {healed} "
        f"--teacher {dense} --data TEXT --tokens 2M wins back what was lost"
    )
