"""`krony.compress`: a model made smaller, by a plan or by nothing but a size."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from krony.compression import factorise
from krony.compression.budget import make_budget_plan
from krony.compression.calibrate import sample
from krony.errors import KronyError
from krony.hf.plan import Plan
from krony.measure import evaluate, info
from krony.words import parse_size

Model = TypeVar("Model", bound=PreTrainedModel)
WINDOWS = 128


def compress(
    model: Model,
    plan: Plan | None = None,
    *,
    size: float | int | str | None = None,
    calibration: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Model:
    """Make a model smaller, in place, and return it.

    Args:
        plan: which matrix gets which factors. Then this is `factorise.compress`, which says what
            `options` there are (`init`, `moments`, `options`).
        size: of the whole model instead: a share of its parameters (0.6, "60%") or their number
            (81_000_000, "81M"). What each matrix becomes is found for the least harm, and the
            factors are fitted to `calibration`.
        calibration: token ids (windows, window), see `calibration_windows`; None: with a size,
            text that the model samples.
        progress: called with (what, steps done, steps in all).
    Raises:
        KronyError: neither a plan nor a size, or both; a size that can't be; what
            `factorise.compress` raises.
    """
    if (plan is None) == (size is None):
        raise KronyError(
            "say how small: give a size (size=0.6 keeps 60 % of the parameters) or a plan, and "
            "one of the two"
        )
    if plan is not None:
        return factorise.compress(
            model, plan, calibration=calibration, seed=seed, progress=progress, **options
        )
    if options:
        raise KronyError(f"{', '.join(options)}: for a plan; a size finds plan and factors itself")
    wanted = parse_size(size, info.parameters(model))
    if calibration is None:
        calibration = sample(model, WINDOWS, min(1024, evaluate.context_length(model)), seed)
    found = make_budget_plan(
        model, calibration, parameters=wanted, target="everything", seed=seed, progress=progress
    )
    return factorise.compress(
        model,
        found.plan,
        init=factorise.DATA,
        calibration=calibration,
        moments=found.moments,
        seed=seed,
        progress=progress,
    )
