"""On which side small factors stand: matrix by matrix, in the order of less harm.

A ⊗ B and B ⊗ A of the same shapes are different matrices: copies of the large factor that lie
apart, or side by side. Which one comes nearer to what a matrix does depends on the model, and for
one term it may be far; so both are fitted for a while.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from krony.compression.calibrate import Moments
from krony.compression.embedding import RowMetric
from krony.hf.families import dense_weight
from krony.hf.plan import MatrixPlan, Plan
from krony.maths import fit
from krony.maths.kron import Layout

BOTH: tuple[Layout, Layout] = ("small-outer", "large-outer")
STEPS = 3  # of L-BFGS: enough to compare, the final fit takes more


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
        if isinstance(known, Moments) and not matrix.narrowed and not _same(matrix):
            ways = [_in(matrix, layout) for layout in BOTH]
            matrix = min(ways, key=lambda way: _harm(model, way, known))
        chosen.append(matrix)
        if progress is not None:
            progress(matrix.name, number, len(plan.matrices))
    return Plan(tuple(chosen))


def _same(matrix: MatrixPlan) -> bool:
    return all(fit.is_low_rank(group) for group in matrix.groups)


def _in(matrix: MatrixPlan, layout: Layout) -> MatrixPlan:
    return replace(matrix, groups=tuple(replace(g, layout=layout) for g in matrix.groups))


def _harm(model: PreTrainedModel, matrix: MatrixPlan, moments: Moments) -> float:
    inputs = moments.inputs
    weight = dense_weight(model.get_submodule(matrix.name)).detach().double().to(inputs.device)
    second = inputs.covariance if matrix.bias else inputs.second
    metric = fit.Metric.of(second, moments.gradient, matrix.shape[0])
    return fit.groups(weight, metric, matrix.groups, STEPS)[1][-1]
