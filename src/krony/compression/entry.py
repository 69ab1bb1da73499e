"""`krony.compress`: a model made smaller, by a plan or by nothing but a size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.compression import calibrate, factorise, needed
from krony.compression.budget import make_budget_plan
from krony.compression.plain import slim
from krony.errors import KronyError
from krony.hf import checkpoints
from krony.hf.plan import Plan
from krony.hf.provenance import note_harm
from krony.measure import info
from krony.words import Structure, parse_size

Model = TypeVar("Model", bound=PreTrainedModel)


def compress(
    model: Model,
    plan: Plan | None = None,
    *,
    size: float | int | str | None = None,
    structure: Structure = "factored",
    init: str = factorise.DATA,
    calibration: Tensor | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Model:
    """Make a model smaller and return it: in place, but for `structure="plain"`, which makes a new
    one.

    The factors are those of least harm to the loss on a calibration text. Where none is given the
    model writes one itself: 20 tokens for each input of the widest matrix, at least 32,768, which
    takes minutes on a large model and a CPU. The paper's ways need no text: `init="van-loan"`,
    "van-loan-scaled", "prune".

    Args:
        plan: which matrix gets which factors. Then this is `factorise.compress`, which says what
            `options` there are (`moments`, `options`, `work`, `memory`).
        size: of the whole model instead: a share of its parameters (0.6, "60%") or their number
            (81_000_000, "81M"). What each matrix becomes is found for the least harm.
        structure: with a size, "factored" (fewer hidden units and low rank, in krony's layers) or
            "plain": an ordinary model of the same architecture with smaller numbers in its
            configuration, which needs no krony (`slim`).
        init: "data", or a key of `INITS`, of a plan that takes no hidden units out.
        calibration: the name of a text (`krony.texts`), a file or a folder, or token ids (windows,
            window) as `calibration_windows` makes them; None: "self".
        tokenizer: for a text; default: the one that lies where the model came from.
        progress: called with (what, steps done, steps in all).
    Raises:
        KronyError: neither a plan nor a size, or both; a size that can't be; a text that can't be
            read; what `factorise.compress` raises.
    """
    if (plan is None) == (size is None):
        raise KronyError(
            "say how small: give a size (size=0.6 keeps 60 % of the parameters) or a plan, and "
            "one of the two"
        )
    if structure not in get_args(Structure):
        raise KronyError(f"no structure {structure!r}; there are {', '.join(get_args(Structure))}")
    if structure == "plain" and (plan is not None or init != factorise.DATA):
        raise KronyError(
            "a plan and an init are of factors, and a plain model has none; give a size"
        )
    if plan is not None:
        if init == factorise.DATA and not isinstance(calibration, Tensor):
            factorise.checked(model, plan, init)  # before the text, which may take minutes
            windows = needed.of_plan(model, plan)
            calibration = _text(model, calibration, tokenizer, windows, seed, progress)
        elif isinstance(calibration, str):
            raise KronyError(
                f"init={init!r} takes no calibration text; leave it out, or init='data'"
            )
        return factorise.compress(
            model, plan, init=init, calibration=calibration, seed=seed, progress=progress, **options
        )
    if options:
        raise KronyError(f"{', '.join(options)}: for a plan; a size finds plan and factors itself")
    wanted = parse_size(size, info.parameters(model))
    target = "everything" if structure == "factored" else "all"
    if not isinstance(calibration, Tensor):
        windows = needed.of_target(model, target)
        calibration = _text(model, calibration, tokenizer, windows, seed, progress)
    if structure == "plain":
        assert wanted is not None
        made = slim(model, calibration, parameters=wanted, seed=seed, progress=progress)
        return cast(Model, made)
    found = make_budget_plan(
        model, calibration, parameters=wanted, target=target, seed=seed, progress=progress
    )
    factorise.compress(
        model,
        found.plan,
        init=init,
        calibration=calibration,
        moments=found.moments,
        seed=seed,
        progress=progress,
    )
    if init == factorise.DATA:
        note_harm(model, found.harm)
    return model


def _text(
    model: PreTrainedModel,
    name: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: int,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> Tensor:
    name = calibrate.SELF if name is None else name
    if not isinstance(name, str | Path):
        raise KronyError(
            f"calibration is a {type(name).__name__}; give the name of a text, a file or a folder "
            "or token ids as a tensor (windows, window)"
        )
    if name != calibrate.SELF and tokenizer is None:
        tokenizer = checkpoints.tokenizer_of(model)
    return calibrate.calibration_windows(
        str(name),
        model,
        tokenizer,
        windows,
        seed=seed,
        progress=None if progress is None else lambda i, n: progress("Writing a text", i, n),
    )
