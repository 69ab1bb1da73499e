"""On which side small factors stand: matrix by matrix, in the order of less harm.

A ⊗ B and B ⊗ A of the same shapes are different matrices: copies of the large factor that lie
apart, or side by side. Which one comes nearer to what a matrix does depends on the model, and for
one term it may be far. Fitted to data, both are tried for a while, matrix by matrix. What is found
by weights alone may be so far from the dense model that the predicted harm of a matrix says
nothing (on the packaged model such a choice was worse than either order): there both models are
made, and the loss of the whole decides.
"""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from krony.compression.calibrate import Moments
from krony.compression.embedding import RowMetric
from krony.compression.factorise import compress
from krony.errors import KronyError
from krony.hf import ties
from krony.hf.families import dense_weight
from krony.hf.plan import MatrixPlan, Plan
from krony.maths import fit
from krony.maths.kron import Layout
from krony.measure.evaluate import perplexity

Model = TypeVar("Model", bound=PreTrainedModel)
BOTH: tuple[Layout, Layout] = ("small-outer", "large-outer")
STEPS = 3  # of L-BFGS: enough to compare, the final fit takes more
WINDOWS = 8  # of text, that tell two models apart


def choose_layouts(
    model: PreTrainedModel,
    plan: Plan,
    moments: Mapping[str, Moments | RowMetric],
    progress: Callable[[str, int, int], None] | None = None,
) -> Plan:
    """The same plan, with every Kronecker sum in the layout of less harm; the faster on a tie.

    Low rank is the same in both. The embedding, the output matrix and what lost hidden units stay
    as they are planned.

    Args:
        model: the dense model, which is only looked at.
        moments: of the planned matrices, as `make_budget_plan` and `calibrate.calibrate` find them.
        progress: called with (name of the matrix, its number from 1, how many).
    """
    chosen = []
    for number, matrix in enumerate(plan.matrices, 1):
        known = moments.get(matrix.name)
        if isinstance(known, Moments) and has_two_sides(matrix):
            ways = [_in(matrix, layout) for layout in BOTH]
            matrix = min(ways, key=lambda way: _harm(model, way, known))
        chosen.append(matrix)
        if progress is not None:
            progress(matrix.name, number, len(plan.matrices))
    return Plan(tuple(chosen))


def compress_in_better_layout(
    model: Model,
    plan: Plan,
    windows: Tensor,
    *,
    init: str,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Model, Plan, dict[Layout, float]]:
    """Compress by weights, all matrices in the layout of less loss; the dense model stays.

    Args:
        windows: token ids (windows, window), a few.
        init: a key of `INITS`.
        progress: called with (name of the matrix, its number from 1, how many), for each layout.
    Returns:
        The compressed model, the plan that it follows, and the loss of each in nats a token;
        infinite where a model overflows.
    """
    found: list[tuple[float, Model, Plan, Layout]] = []
    for layout in BOTH:
        # Tensors are shared: only what is factored is another one.
        shared: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        way = Plan(tuple(_in(m, layout) if has_two_sides(m) else m for m in plan.matrices))
        made = compress(
            copy.deepcopy(model, shared),
            way,
            init=init,
            seed=seed,
            calibration=windows,
            progress=progress,
        )
        loss = math.inf
        with suppress(KronyError):
            loss = perplexity(made, windows.flatten(), window=windows.shape[1]).nats
        found.append((loss, made, way, layout))
    _, made, way, _ = min(found, key=lambda each: each[0])
    return made, way, {layout: loss for loss, _, _, layout in found}


def two_sided(model: PreTrainedModel, plan: Plan) -> bool:
    """Whether in any matrix of a block a small factor may stand on either side."""
    return any(
        has_two_sides(m) and not m.embedding and not ties.is_output(model, m.name)
        for m in plan.matrices
    )


def has_two_sides(matrix: MatrixPlan) -> bool:
    """Whether the two layouts of a matrix differ, all of its hidden units being there."""
    return not matrix.narrowed and not all(fit.is_low_rank(group) for group in matrix.groups)


def _in(matrix: MatrixPlan, layout: Layout) -> MatrixPlan:
    return replace(matrix, groups=tuple(replace(g, layout=layout) for g in matrix.groups))


def _harm(model: PreTrainedModel, matrix: MatrixPlan, moments: Moments) -> float:
    inputs = moments.inputs
    weight = dense_weight(model.get_submodule(matrix.name)).detach().double().to(inputs.device)
    second = inputs.covariance if matrix.bias else inputs.second
    metric = fit.Metric.of(second, moments.gradient, matrix.shape[0])
    return fit.groups(weight, metric, matrix.groups, STEPS)[1][-1]
