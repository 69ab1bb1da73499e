"""Narrowing: which hidden units of an MLP stay, and what the others leave to them.

A unit costs a row of every matrix that writes the hidden axis and a column of the one that reads
it, whatever factors these get. Those that the others can replace are taken out first, one by one as
in optimal brain surgery (LeCun et al. 1990, Hassibi and Stork 1993): with P = C⁻¹, C the second
moment of the units, taking out unit j and letting the others make up for it as well as they can
costs ½ w_jᵀ G w_j / P_jj nats a token, w_j its column. What stays is solved for in closed form.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression.calibrate import Inputs, Moments, full_precision
from krony.compression.work import Work
from krony.errors import KronyError
from krony.hf.families import MLP, dense_weight
from krony.hf.modeling import Plain, plain_layer, sharing
from krony.hf.plan import MatrixPlan, Plan
from krony.hf.probes import PROBE
from krony.maths.fit import Metric

STEP = 64  # one in so many of the units goes before P is brought up to date everywhere
KEPT = 0.85  # of the units: with fewer left, those that are gone leave memory too
POOL = 4  # times as many are looked at, and among these P is always up to date


def elimination(weight: Tensor, metric: Metric) -> Tensor:
    """The units (n,) of a matrix (m, n) that reads them, the first to go first."""
    inverse = torch.linalg.inv(metric.inputs)
    columns = torch.linalg.cholesky(metric.outputs).T @ weight
    left = torch.arange(weight.shape[1], device=weight.device)
    dead = torch.zeros_like(left, dtype=torch.bool)
    gone: list[Tensor] = []
    while (count := int((~dead).sum())) > 1:
        if count < KEPT * len(left):  # what is gone was only zeroed so far
            stay = (~dead).nonzero().flatten()
            left, dead = left[stay], dead[stay]
            inverse = inverse.index_select(0, stay).index_select(1, stay)
            columns = columns.index_select(1, stay)
        harm = (columns.square().sum(0) / inverse.diagonal()).masked_fill_(dead, torch.inf)
        some = max(1, count // STEP)
        pool = harm.topk(min(count, POOL * some), largest=False).indices
        out = pool[_greedy(inverse[pool][:, pool], columns[:, pool], some)]
        gone.append(left[out])
        share = torch.linalg.solve(inverse[out][:, out], inverse[out])
        columns.addmm_(columns[:, out], share, alpha=-1)
        inverse.addmm_(inverse[:, out], share, alpha=-1)
        dead[out] = True
    return torch.cat([*gone, left[~dead]])


def order(name: str, weight: Tensor, metric: Metric, work: Work | None) -> Tensor:
    """`elimination` for the matrix of that name, once for all budgets."""
    if work is None:
        return elimination(weight, metric)
    found = work.once(lambda: {"order": elimination(weight, metric)}, "order", name)
    return found["order"].to(weight.device)


def _greedy(inverse: Tensor, columns: Tensor, count: int) -> Tensor:
    """The `count` units of a few that go first, each after the others made up for the last."""
    inverse, columns = inverse.clone(), columns.clone()
    gone: list[int] = []
    for _ in range(count):
        harm = columns.square().sum(0) / inverse.diagonal()
        harm[gone] = torch.inf
        j = int(harm.argmin())
        gone.append(j)
        row = inverse[j] / inverse[j, j]
        columns = columns - torch.outer(columns[:, j], row)
        inverse = inverse - torch.outer(inverse[:, j], row)
        inverse.diagonal()[gone] = 1.0  # rounding leaves anything there
    return torch.tensor(gone, device=inverse.device)


def compensated(weight: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """The matrix (m, kept) that does most nearly, on these inputs, what (m, n) does."""
    cross = inputs[kept] @ weight.T
    found: Tensor = torch.linalg.solve(inputs[kept][:, kept], cross)
    return found.T


@dataclass(frozen=True)
class Narrow:
    """One MLP with some of its hidden units.

    Attributes:
        kept: the units, ascending.
        down: the matrix that reads them, (m, kept).
        harm: nats a token.
    """

    kept: Tensor
    down: Tensor
    harm: float


def narrow(weight: Tensor, metric: Metric, order: Tensor, hidden: int) -> Narrow:
    """The last `hidden` units in the order of elimination, and the matrix that reads them."""
    kept = order[-hidden:].sort().values
    down = compensated(weight, metric.inputs, kept)
    lost = weight.clone()
    lost[:, kept] -= down
    return Narrow(kept, down, metric.harm(lost))


def rows_of(kept: Tensor, hidden: int, parts: int) -> Tensor:
    """Rows of a matrix that writes `parts` hidden axes one below the other (gate and up fused)."""
    return torch.cat([kept + part * hidden for part in range(parts)])


def up_moments(moments: Moments, rows: Tensor) -> Moments:
    """Of a matrix that writes the hidden axis: the same inputs, fewer outputs."""
    if moments.gradient_square is None:
        return moments
    return replace(moments, gradient_square=moments.gradient_square[rows][:, rows])


def down_moments(moments: Moments, kept: Tensor) -> Moments:
    """Of the matrix that reads the hidden axis: fewer inputs, the same outputs."""
    old = moments.inputs
    # Ascending, so that what is above the diagonal stays there.
    return replace(moments, inputs=Inputs(old.total[kept], old.square[kept][:, kept], old.tokens))


@dataclass(frozen=True)
class Narrowed:
    """A dense model without the hidden units that a plan takes out, and what is known of it.

    Attributes:
        moments: of the matrices as they are now.
        rows: of the dense matrices that write a hidden axis, those that stayed.
    """

    model: PreTrainedModel
    moments: Mapping[str, Moments]
    rows: dict[str, Tensor]


class _Sliced(Mapping[str, Moments]):
    """Moments of which some are of fewer units, cut out when they are asked for."""

    def __init__(
        self, whole: Mapping[str, Moments], writers: dict[str, Tensor], readers: dict[str, Tensor]
    ) -> None:
        self._whole, self._writers, self._readers = whole, writers, readers

    def __getitem__(self, name: str) -> Moments:
        entry = self._whole[name]
        if name in self._writers:
            return up_moments(entry, self._writers[name])
        if name in self._readers:
            return down_moments(entry, self._readers[name])
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


@torch.no_grad()
def narrowed(
    model: PreTrainedModel,
    plan: Plan,
    moments: Mapping[str, Moments],
    bias: bool = True,
    centered: bool = True,
    work: Work | None = None,
) -> Narrowed:
    """Take out the hidden units; the model is not changed.

    Args:
        bias: let the bias of the matrix that reads the units make up for the mean of those gone.
        centered: weigh the units by their covariance, where the bias takes the mean.
        work: where the order of elimination may be known already.
    """
    found = Narrowed(model, moments, {})
    if not any(matrix.narrowed for matrix in plan.matrices):
        return found
    writers: dict[str, Tensor] = {}
    readers: dict[str, Tensor] = {}
    found = Narrowed(sharing(model), _Sliced(moments, writers, readers), {})
    for ups, matrix in _groups(plan):
        layer: Any = found.model.get_submodule(matrix.name)
        entry = moments[matrix.name]
        (m, hidden), home = matrix.dense_shape or matrix.shape, entry.inputs.device
        weight = dense_weight(layer).double().to(home)
        shift = bias and layer.bias is not None
        metric = Metric.of(entry.inputs.weighing(shift and centered), entry.gradient, m)
        known = work if bias and centered else None
        units = narrow(weight, metric, order(matrix.name, weight, metric, known), matrix.shape[1])
        new_bias = layer.bias
        if shift:
            mean = entry.inputs.mean
            gone = weight @ mean - units.down @ mean[units.kept]
            new_bias = layer.bias + gone.to(layer.bias)
        down = units.down.to(layer.weight)
        found.model.set_submodule(matrix.name, plain_layer(down, new_bias, matrix.conv1d))
        readers[matrix.name] = units.kept
        for up in ups:
            layer = found.model.get_submodule(up.name)
            rows = rows_of(units.kept, hidden, up.parts)
            found.rows[up.name] = rows.to(layer.weight.device)
            fewer = _with_rows(layer, found.rows[up.name], up.conv1d)
            found.model.set_submodule(up.name, fewer)
            writers[up.name] = rows
    return found


def _with_rows(layer: Any, rows: Tensor, conv1d: bool) -> Plain:
    """The layer with these of its outputs only."""
    bias = None if layer.bias is None else layer.bias[rows]
    return plain_layer(dense_weight(layer)[rows], bias, conv1d)


def _groups(plan: Plan) -> list[tuple[list[MatrixPlan], MatrixPlan]]:
    """The matrices that write a narrowed hidden axis, and the one that reads it; checked."""
    by_parent: dict[str, list[MatrixPlan]] = defaultdict(list)
    for matrix in plan.matrices:
        if matrix.narrowed:
            by_parent[matrix.name.rpartition(".")[0]].append(matrix)
    found = []
    for parent, matrices in by_parent.items():
        downs = [m for m in matrices if m.dense_shape and m.dense_shape[0] == m.shape[0]]
        ups = [m for m in matrices if m not in downs]
        kept = downs[0].shape[1] if len(downs) == 1 else 0
        if not ups or any(up.shape[0] != up.parts * kept for up in ups):
            raise KronyError(
                f"the plan takes hidden units out of {parent}, but not the same number out of all "
                "of its matrices; make the plan with --budget"
            )
        found.append((ups, downs[0]))
    return found


def that_narrow(model: PreTrainedModel, mlps: list[MLP]) -> list[MLP]:
    """Those that work with fewer hidden units (`can_narrow`), tried on one of each kind."""
    if not mlps:
        return []
    exact = full_precision(model)  # rounding must not look like a difference
    answers: dict[Any, bool] = {}
    found = []
    for mlp in mlps:
        parent = model.get_submodule(mlp.down.name.rpartition(".")[0])
        kind = type(parent), repr(parent)
        if kind not in answers:
            answers[kind] = can_narrow(exact, mlp)
        if answers[kind]:
            found.append(mlp)
    return found


@torch.no_grad()
def can_narrow(model: PreTrainedModel, mlp: MLP) -> bool:
    """Whether the MLP works with fewer hidden units: without half of them, it does what it does
    with all when these are zero where they are read.

    No where the hidden axis is normalized, grouped, or cut by a number in the model's code.
    """
    hidden, down = mlp.down.hidden, model.get_submodule(mlp.down.name)
    kept = torch.arange(0, hidden, 2, device=down.weight.device)  # type: ignore[arg-type]
    ids = torch.arange(PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
    layers: dict[str, Any] = {t.name: model.get_submodule(t.name) for t in mlp.targets}

    def logits() -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    def masked(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask = torch.zeros(hidden, dtype=arguments[0].dtype, device=arguments[0].device)
        mask[kept] = 1
        return (arguments[0] * mask,)

    handle = down.register_forward_pre_hook(masked)
    try:
        wanted = logits()
    finally:
        handle.remove()
    try:
        for target in mlp.targets:
            layer = layers[target.name]
            if target.role == "down":
                fewer = plain_layer(dense_weight(layer)[:, kept], layer.bias, target.conv1d)
            else:
                fewer = _with_rows(layer, rows_of(kept, hidden, target.parts), target.conv1d)
            model.set_submodule(target.name, fewer)
        return torch.allclose(logits(), wanted, rtol=1e-3, atol=1e-3)
    except (RuntimeError, ValueError):  # a shape that the model's code insists on
        return False
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
