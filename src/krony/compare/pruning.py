"""Rivals by structure: hidden units of MLPs and key-value heads of attention are taken out.

    magnitude       norms of the columns that read a unit
    Wanda-sp        |W| ‖x‖ of these columns (Sun et al. 2023, structured by An et al. 2023)
    FLAP            the variance of the unit times its column's squared norm, standardized, all
                    blocks in one order, a bias for the mean of what is gone (An et al. 2023)
    LLM-Pruner      Σ |W dL/dW| over all weights of a unit, the first and last blocks left alone
                    (Ma et al. 2023, "param_first")
    Minitron        mean |x| over a window, its norm over windows (Muralidharan et al. 2024)

Where nothing else is said every block loses the same. Attention loses heads with their keys and
values, whole groups where several queries share them, and never more than the share of the budget;
MLPs pay for the rest. Models whose heads can't be told apart lose units only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compare.evidence import Evidence
from krony.compression.calibrate import Moments
from krony.compression.plain import Cost
from krony.compression.width import rows_of
from krony.errors import KronyError
from krony.hf.families import MLP, dense_weight
from krony.hf.modeling import plain_layer
from krony.hf.smaller import Attention, columns_of

FIRST, LAST = 1 / 8, 1 / 16  # of the blocks: LLM-Pruner's 4 and 2 of LLaMA's 32
Score = Callable[[str], Tensor]  # of the columns of a matrix, by its name


@dataclass(frozen=True)
class Cut:
    """What stays of one block: hidden units and key-value heads, ascending."""

    units: Tensor
    groups: Tensor


@dataclass(frozen=True)
class Scores:
    """Of one block: of its hidden units, and of its key-value heads; the lowest go first."""

    units: Tensor
    groups: Tensor


def magnitude(evidence: Evidence, share: float) -> PreTrainedModel:
    """By the weights alone."""

    def score(name: str) -> Tensor:
        norms: Tensor = _weight(evidence, name).norm(dim=0)
        return norms

    return _uniform(evidence, share, _by_columns(evidence, score))


def wanda(evidence: Evidence, share: float) -> PreTrainedModel:
    """By weights times the norms of their inputs."""

    def score(name: str) -> Tensor:
        norms = _moments(evidence, name).inputs.second.diagonal().sqrt().cpu()
        return (_weight(evidence, name).abs() * norms).mean(0)

    return _uniform(evidence, share, _by_columns(evidence, score))


def taylor(evidence: Evidence, share: float) -> PreTrainedModel:
    """By what the loss would lose to first order, element by element."""
    found, count = evidence.gradients, len(evidence.body.parts)
    scores = {}
    for i, mlp, attention in _parts(evidence):
        units = found[f"{mlp.down.name} columns"].clone()
        for up in mlp.ups:
            units += found[f"{up.name} rows"].view(up.parts, -1).sum(0)
        groups = torch.zeros(0)
        if attention is not None:
            groups = _grouped(evidence, found[f"{attention.output} columns"])
            groups = groups + _grouped(evidence, found[f"{attention.query} rows"])
            for name in (attention.key, attention.value):
                groups = groups + found[f"{name} rows"].view(len(groups), -1).sum(1)
        scores[i] = Scores(units, groups)
    first, last = round(FIRST * count), round(LAST * count)
    inner = {i: each for i, each in scores.items() if first <= i < count - last}
    return _uniform(evidence, share, inner or scores)


def minitron(evidence: Evidence, share: float) -> PreTrainedModel:
    """By activations alone: a mean over tokens, a norm over windows."""
    found, scores = evidence.activity, {}
    for i, mlp, attention in _parts(evidence):
        units = found[mlp.down.name].double().norm(dim=0)
        groups = torch.zeros(0)
        if attention is not None:
            heads = found[f"{attention.output} heads"].double().norm(dim=0)
            groups = heads.view(evidence.body.sizes.groups, -1).sum(1)
        scores[i] = Scores(units, groups)
    return _uniform(evidence, share, scores)


def flap(evidence: Evidence, share: float) -> PreTrainedModel:
    """By fluctuation, all blocks in one order, with a bias for what is gone."""

    def score(name: str) -> Tensor:
        variance = _moments(evidence, name).inputs.covariance.diagonal().clamp(min=0).cpu()
        fluctuation = variance * _weight(evidence, name).square().sum(0)
        return (fluctuation - fluctuation.mean()) / fluctuation.std()

    scores = _by_columns(evidence, score, mean=True)
    cuts = adaptive(evidence, share, scores)
    return pruned(
        evidence, cuts, {n: _moments(evidence, n).inputs.mean for n in _readers(evidence)}
    )


def adaptive(evidence: Evidence, share: float, scores: Mapping[int, Scores]) -> dict[int, Cut]:
    """The best units and heads of all blocks together, as many as the budget pays for.

    Of every block at least one of each stays.
    """
    cost, goal = Cost.of(evidence.model, evidence.body), evidence.removed(share)
    group = cost.group + evidence.body.sizes.heads * cost.head
    entries: list[tuple[float, int, int, int]] = []  # score, block, place, price
    for i, each in scores.items():
        for values, price, sign in ((each.units, cost.unit, 1), (each.groups, group, -1)):
            best = int(values.argmax()) if len(values) else 0
            for place, value in enumerate(values.tolist()):
                key = math.inf if place == best else value
                entries.append((key, i, sign * (place + 1), price))
    entries.sort(key=lambda entry: entry[0])
    gone: set[tuple[int, int]] = set()
    lost = 0
    for key, i, place, price in entries:
        if lost + price / 2 > goal or key == math.inf:
            break
        gone.add((i, place))
        lost += price

    def left(i: int, values: Tensor, sign: int) -> Tensor:
        return torch.tensor([p for p in range(len(values)) if (i, sign * (p + 1)) not in gone])

    return {i: Cut(left(i, s.units, 1), left(i, s.groups, -1)) for i, s in scores.items()}


def uniform(evidence: Evidence, share: float, scores: Mapping[int, Scores]) -> dict[int, Cut]:
    """The best units and heads of every block that has scores, the same number of each.

    Raises:
        KronyError: more than these blocks have would have to go.
    """
    body, goal = evidence.body, evidence.removed(share)
    cost, groups = Cost.of(evidence.model, body), len(next(iter(scores.values())).groups)
    inner = 1 - (1 - share) * len(body.parts) / len(scores)  # of the blocks that lose anything
    stay = max(1, math.ceil(inner * groups - 1e-9)) if groups else 0
    lost = len(scores) * (groups - stay) * (cost.group + body.sizes.heads * cost.head)
    units = round((goal - lost) / cost.unit)
    if units < 0 or units > len(scores) * (body.sizes.width - 1):
        raise KronyError(
            f"a budget of {share} can't be met: {len(scores)} blocks would have to lose {units} "
            f"hidden units, and they have {body.sizes.width} each"
        )
    cuts = {}
    for number, (i, each) in enumerate(scores.items()):
        gone = units * (number + 1) // len(scores) - units * number // len(scores)
        cuts[i] = Cut(_best(each.units, body.sizes.width - gone), _best(each.groups, stay))
    return cuts


@torch.no_grad()
def pruned(
    evidence: Evidence, cuts: Mapping[int, Cut], means: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """The model with what stays.

    Args:
        means: of the inputs of the matrices that read units and heads: their biases make up for
            the mean of what is gone.
    """
    model, body = evidence.copy(), evidence.body
    for i, mlp, attention in _parts(evidence):
        if (cut := cuts.get(i)) is None:
            continue
        if len(cut.units) < mlp.down.hidden:
            for up in mlp.ups:
                rows = rows_of(cut.units, up.hidden, up.parts)
                _put(model, up.name, rows=rows, conv1d=up.conv1d)
            _put(model, mlp.down.name, columns=cut.units, conv1d=mlp.down.conv1d, means=means)
        if attention is not None and len(cut.groups) < body.sizes.groups:
            heads = columns_of(cut.groups, body.sizes.heads)
            for name, which in (
                (attention.query, heads),
                (attention.key, cut.groups),
                (attention.value, cut.groups),
            ):
                _put(model, name, rows=columns_of(which, body.head_size))
            columns = columns_of(heads, body.head_size)
            _put(model, attention.output, columns=columns, means=means)
    return model


def _put(
    model: PreTrainedModel,
    name: str,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    conv1d: bool = False,
    means: Mapping[str, Tensor] | None = None,
) -> None:
    """Only these rows or columns of a matrix, in its place."""
    layer: Any = model.get_submodule(name)
    weight, bias = dense_weight(layer), layer.bias
    if rows is not None:
        bias = None if bias is None else bias[rows]
        made = plain_layer(weight[rows].clone(), bias, conv1d)
    else:
        assert columns is not None
        if means is not None:
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[columns] = False
            mean = means[name].to(weight)
            more = weight[:, gone] @ mean[gone.to(mean.device)]
            bias = more if bias is None else bias + more
        made = plain_layer(weight[:, columns].clone(), bias, conv1d)
    model.set_submodule(name, made.train(layer.training))


def _uniform(evidence: Evidence, share: float, scores: Mapping[int, Scores]) -> PreTrainedModel:
    return pruned(evidence, uniform(evidence, share, scores))


def _parts(evidence: Evidence) -> list[tuple[int, MLP, Attention | None]]:
    """(index, MLP, attention or None where it stays whole) of every block that has an MLP."""
    whole = bool(evidence.body.sizes.groups)
    return [
        (i, part.mlp, part.attention if whole else None)
        for i, part in enumerate(evidence.body.parts)
        if part.mlp is not None
    ]


def _readers(evidence: Evidence) -> list[str]:
    found = []
    for _, mlp, attention in _parts(evidence):
        found += [mlp.down.name] + ([attention.output] if attention is not None else [])
    return found


def _by_columns(evidence: Evidence, score: Score, mean: bool = False) -> dict[int, Scores]:
    """Scores of units and heads from those of the columns that read them."""
    scores = {}
    for i, mlp, attention in _parts(evidence):
        groups = torch.zeros(0)
        if attention is not None:
            groups = _grouped(evidence, score(attention.output))
            if mean:
                groups = groups / (evidence.body.sizes.heads * evidence.body.head_size)
        scores[i] = Scores(score(mlp.down.name), groups)
    return scores


def _grouped(evidence: Evidence, features: Tensor) -> Tensor:
    """Sums over the features of the heads that share one key-value head."""
    return features.view(evidence.body.sizes.groups, -1).sum(1)


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count).indices.sort().values


def _weight(evidence: Evidence, name: str) -> Tensor:
    module: nn.Module = evidence.model.get_submodule(name)
    return dense_weight(module).detach().double().cpu()


def _moments(evidence: Evidence, name: str) -> Moments:
    entry = evidence.moments[name]
    assert isinstance(entry, Moments)
    return entry
