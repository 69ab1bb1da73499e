"""Ordinary, smaller models of least harm: one width for all MLPs, fewer heads, fewer blocks.

What is taken out is what an ordinary checkpoint of the same architecture can say (hf/smaller.py).
Hidden units and heads are ranked, and what the others can do for those that are gone is solved for
in closed form, in nats a token, as in width.py. Blocks are ranked by what they do to the hidden
states (block influence: ShortGPT, arXiv 2403.03853), and the harm of taking them out is measured.
Which mix of the three suits a size best is measured too: those that look best are built, and the
one whose predictions stay nearest to the dense model's, on windows kept for that, is taken.

Moments know a model only near to what it is, so a large cut is made in several, each with moments
of the model that the last one left.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.compression import calibrate, width
from krony.compression.calibrate import Moments
from krony.errors import KronyError
from krony.hf.families import blocks, dense_weight, states_and_head
from krony.hf.smaller import Anatomy, Kept, Sizes, anatomy, columns_of, skipped, smaller
from krony.maths.fit import Metric
from krony.measure import info

CUT = 0.85  # of the parameters of the blocks, about, that one cut leaves
UNITS = (64, 32, 16, 8, 1)  # a width is a multiple of the first of which it has at least sixteen
PRICED = 6  # widths whose harm is computed, between them its logarithm is interpolated
GONE = 4  # blocks, at the most, that one cut takes out
TRIED = 4  # mixes that are built and measured
HELD_OUT = 8  # windows, at the end of those given, on which that is measured
LOGITS = 2**23  # at a time

Progress = Callable[[str, int, int], None]


def slim(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    parameters: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """An ordinary model of the same architecture with at most so many parameters, of least harm.

    Args:
        model: a dense model; it stays as it is.
        windows: token ids (windows, window) to calibrate on; the last eighth only measures.
        parameters: of the whole model.
        seed: of the labels that calibration samples.
        progress: called with (what, number, how many).
    Returns:
        A new model, in the dtype and on the device of the old one.
    Raises:
        KronyError: a size that can't be met, or a model whose configuration can't say it.
    """
    before = info.parameters(model)
    inner = sum(p.numel() for _, _, block in blocks(model) for p in block.parameters())
    if not before - inner < parameters < before:
        raise KronyError(
            f"a model of {parameters:,} parameters can't be: without any block this one has "
            f"{before - inner:,}, with all of them {before:,}"
        )
    if len(windows) < 2:
        raise KronyError("plain models need at least 2 windows, some to calibrate, some to measure")
    held = max(1, min(HELD_OUT, len(windows) // 8))
    current = calibrate.full_precision(model)
    judge = Judge(current, windows[-held:])
    wanted = (inner - before + parameters) / inner
    cuts = max(1, math.ceil(math.log(wanted) / math.log(CUT)))
    for number in range(1, cuts + 1):
        goal = before - inner + int(inner * wanted ** (number / cuts))

        def told(what: str, i: int, n: int, number: int = number) -> None:
            if progress is not None:
                progress(f"{what} (cut {number} of {cuts})", i, n)

        current = _cut(current, windows[:-held], judge, goal, seed + number, told)
    return current.to(model.dtype)  # type: ignore[arg-type]


class Judge:
    """The predictions of a dense model on some windows, to measure others against.

    Args:
        windows: token ids (windows, window).
    """

    def __init__(self, teacher: PreTrainedModel, windows: Tensor) -> None:
        states, self._head = states_and_head(teacher)
        self._windows = windows.to(teacher.device)
        with torch.inference_mode():
            self._hidden = [states(input_ids=row[None])[0] for row in self._windows]

    @torch.inference_mode()
    def harm(self, model: PreTrainedModel) -> float:
        """KL divergence of a model from the dense one, nats a token."""
        states, head = states_and_head(model)
        total, size = 0.0, max(1, LOGITS // model.config.get_text_config().vocab_size)
        for row, known in zip(self._windows, self._hidden, strict=True):
            found = states(input_ids=row[None])[0]
            for mine, its in zip(found.split(size), known.split(size), strict=True):
                wanted = self._head(its).float().log_softmax(-1)
                logits = head(mine).float().log_softmax(-1)
                total += float((wanted.exp() * (wanted - logits)).sum(dtype=torch.float64))
        return total / self._windows.numel()


@dataclass(frozen=True)
class Reader:
    """A matrix that reads what can be taken out, hidden units or heads, as columns of its own."""

    weight: Tensor
    metric: Metric
    mean: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: Any, moments: Moments) -> "Reader":
        """In float64, where its moments are."""
        inputs = moments.inputs
        weight = dense_weight(module).detach().double().to(inputs.device)
        bias = None if module.bias is None else module.bias.detach().double().to(weight.device)
        second = inputs.second if bias is None else inputs.covariance
        return cls(weight, Metric.of(second, moments.gradient, len(weight)), inputs.mean, bias)

    def with_only(self, kept: Tensor) -> tuple[tuple[Tensor, Tensor | None], float]:
        """The matrix (m, kept) and the bias that do the most with these columns, and the harm."""
        made = width.compensated(self.weight, self.metric.inputs, kept)
        lost = self.weight.clone()
        lost[:, kept] -= made
        bias = self.bias
        if bias is not None:
            bias = bias + self.weight @ self.mean - made @ self.mean[kept]
        return (made, bias), self.metric.harm(lost)


class Units:
    """The hidden units of one block's MLP, ranked."""

    def __init__(self, reader: Reader, widths: list[int]) -> None:
        self.reader = reader
        self.order = width.elimination(reader.weight, reader.metric)
        picked = sorted({widths[round(i)] for i in _spaced(len(widths), PRICED)})
        harms = [self.kept(w)[2] for w in picked]
        self._harms = dict(zip(picked, harms, strict=True))

    def kept(self, hidden: int) -> tuple[Tensor, tuple[Tensor, Tensor | None], float]:
        """The units of a width, the matrix and bias that read them, and the harm."""
        units = self.order[-hidden:].sort().values
        return units, *self.reader.with_only(units)

    def harm(self, hidden: int) -> float:
        """Of a width, in nats a token."""
        if hidden >= len(self.order):
            return 0.0
        known = sorted(self._harms)
        low = max((w for w in known if w <= hidden), default=known[0])
        high = min((w for w in known if w >= hidden), default=known[-1])
        if low == high:
            return self._harms[low]
        part = (hidden - low) / (high - low)
        logs = [math.log(max(self._harms[w], 1e-300)) for w in (low, high)]
        return math.exp(logs[0] + part * (logs[1] - logs[0]))


class Heads:
    """The heads of one block's attention: for each (groups, heads of a group) those that stay."""

    def __init__(self, reader: Reader, sizes: Sizes, size: int) -> None:
        self.reader, self._size = reader, size
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor, float]] = {}
        members = {
            g: list(range(g * sizes.heads, (g + 1) * sizes.heads)) for g in range(sizes.groups)
        }
        for groups in range(sizes.groups, 0, -1):
            if groups < sizes.groups:  # the group that costs the least
                best = min(
                    members, key=lambda g: self._harm({k: members[k] for k in members if k != g})
                )
                members = {g: members[g] for g in members if g != best}
            fewer = {g: list(own) for g, own in members.items()}
            self._note(fewer, groups, sizes.heads)
            for heads in range(sizes.heads - 1, 0, -1):
                for g in fewer:  # each group loses the head that costs the least
                    ways = [{**fewer, g: [h for h in fewer[g] if h != out]} for out in fewer[g]]
                    fewer = min(ways, key=self._harm)
                self._note(fewer, groups, heads)

    def _note(self, members: dict[int, list[int]], groups: int, heads: int) -> None:
        stay = torch.tensor([h for g in sorted(members) for h in members[g]])
        self.kept[groups, heads] = stay, torch.tensor(sorted(members)), self._harm(members)

    def _harm(self, members: dict[int, list[int]]) -> float:
        stay = [h for g in sorted(members) for h in members[g]]
        return self.reader.with_only(columns_of(torch.tensor(stay), self._size))[1]


@dataclass(frozen=True)
class Choice:
    """A mix, and its predicted harm in nats a token.

    Attributes:
        gone: blocks that are taken out.
    """

    sizes: Sizes
    gone: tuple[int, ...]
    harm: float


@dataclass(frozen=True)
class Cost:
    """Parameters of a model, and of what can be taken out of one block."""

    whole: int
    block: int
    unit: int
    head: int
    group: int

    @classmethod
    def of(cls, model: PreTrainedModel, body: Anatomy) -> "Cost":
        """Of a model whose blocks are alike."""
        part, (_, _, block) = body.parts[0], blocks(model)[0]
        unit = head = group = 0
        if part.mlp is not None:
            unit = sum(t.parts * (t.shape[1] + t.bias) for t in part.mlp.ups)
            unit += part.mlp.down.shape[0]
        if part.attention is not None and body.sizes.groups:
            query, key, _, output = (
                model.get_submodule(name)
                for name in (
                    part.attention.query,
                    part.attention.key,
                    part.attention.value,
                    part.attention.output,
                )
            )
            head = body.head_size * (_row(query) + len(dense_weight(output)))
            group = 2 * body.head_size * _row(key)
        own = sum(p.numel() for p in block.parameters())
        return cls(info.parameters(model), own, unit, head, group)

    def parameters(self, before: Sizes, after: Sizes) -> int:
        """Of the whole model with other sizes."""
        each = self.unit * (before.width - after.width)
        each += self.head * (before.groups * before.heads - after.groups * after.heads)
        each += self.group * (before.groups - after.groups)
        return self.whole - self.block * (before.blocks - after.blocks) - after.blocks * each


def _row(layer: Any) -> int:
    return int(dense_weight(layer).shape[1]) + (layer.bias is not None)


def _cut(
    model: PreTrainedModel,
    windows: Tensor,
    judge: Judge,
    goal: int,
    seed: int,
    progress: Progress,
) -> PreTrainedModel:
    """The model with at most `goal` parameters."""
    body = anatomy(model)
    names = [p.mlp.down.name for p in body.parts if p.mlp is not None]
    if body.sizes.groups:
        names += [p.attention.output for p in body.parts if p.attention is not None]
    moments = calibrate.calibrate(
        model, windows, names, seed=seed, progress=lambda i, n: progress("Calibrating", i, n)
    )
    unit = next(u for u in UNITS if u * 16 <= body.sizes.width or u == 1)
    widths = [w for w in range(unit, body.sizes.width, unit) if 2 * w >= body.sizes.width]
    units: dict[int, Units] = {}
    heads: dict[int, Heads] = {}
    for i, part in enumerate(body.parts):
        if part.mlp is not None and widths:
            name = part.mlp.down.name
            units[i] = Units(Reader.of(model.get_submodule(name), moments[name]), widths)
        if part.attention is not None and body.sizes.groups:
            name = part.attention.output
            reader = Reader.of(model.get_submodule(name), moments[name])
            heads[i] = Heads(reader, body.sizes, body.head_size)
        progress("Pricing", i + 1, len(body.parts))
    del moments
    gone = _gone(model, windows[-HELD_OUT:], judge)
    found = _choices(model, body, units, heads, gone, [*widths, body.sizes.width], goal)
    if not found:
        raise KronyError(
            f"no mix of widths, heads and blocks of this {type(model).__name__} has at most "
            f"{goal:,} parameters; ask for more"
        )
    best: tuple[float, PreTrainedModel] | None = None
    for number, choice in enumerate(found[:TRIED], 1):
        made = smaller(model, body, choice.sizes, _kept(body, choice, units, heads))
        harm = judge.harm(made)
        if best is None or harm < best[0]:
            best = harm, made
        progress("Measuring", number, min(len(found), TRIED))
    assert best is not None
    return best[1]


def _gone(
    model: PreTrainedModel, windows: Tensor, judge: Judge
) -> list[tuple[tuple[int, ...], float]]:
    """Sets of blocks that can be taken out, from none on, and the harm of each, measured."""
    order = influence(model, windows).argsort().tolist()
    start = judge.harm(model)
    found: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for count in range(1, min(GONE, len(order) - 1) + 1):
        some = tuple(sorted(order[:count]))
        with skipped(model, list(some)):
            found.append((some, max(judge.harm(model) - start, 0.0)))
    return found


@torch.inference_mode()
def influence(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """1 minus the cosine of what goes into a block and what comes out, a mean over tokens: one
    number a block."""
    modules = [block for _, _, block in blocks(model)]
    total = torch.zeros(len(modules), dtype=torch.float64)

    def hook(i: int) -> Any:
        def note(_: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            given = arguments[0] if arguments else options["hidden_states"]
            made = output[0] if isinstance(output, tuple) else output
            alike = torch.cosine_similarity(given.double(), made.double(), dim=-1)
            total[i] += float((1 - alike).sum())

        return note

    handles = [b.register_forward_hook(hook(i), with_kwargs=True) for i, b in enumerate(modules)]
    try:
        for row in windows.to(model.device):
            model.base_model(input_ids=row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return total / windows.numel()


def _choices(
    model: PreTrainedModel,
    body: Anatomy,
    units: dict[int, Units],
    heads: dict[int, Heads],
    gone: list[tuple[tuple[int, ...], float]],
    widths: list[int],
    goal: int,
) -> list[Choice]:
    """Mixes with at most `goal` parameters, the one of least predicted harm first."""
    before, cost = body.sizes, Cost.of(model, body)
    shapes = list(next(iter(heads.values())).kept) if heads else [(before.groups, before.heads)]
    found = []
    for (out, measured), (groups, each) in itertools.product(gone, shapes):
        sizes = replace(before, groups=groups, heads=each, blocks=before.blocks - len(out))
        fitting = [w for w in widths if cost.parameters(before, replace(sizes, width=w)) <= goal]
        if not fitting:
            continue
        sizes = replace(sizes, width=max(fitting))
        stay = [i for i in range(before.blocks) if i not in out]
        harm = measured + sum(units[i].harm(sizes.width) for i in stay if i in units)
        harm += sum(heads[i].kept[groups, each][2] for i in stay if i in heads)
        found.append(Choice(sizes, out, harm))
    return sorted(found, key=lambda c: c.harm)


def _kept(
    body: Anatomy, choice: Choice, units: dict[int, Units], heads: dict[int, Heads]
) -> dict[int, Kept]:
    """What stays of every block."""
    found = {}
    for i in range(len(body.parts)):
        if i in choice.gone:
            continue
        found[i] = Kept()
        if choice.sizes.width < body.sizes.width and i in units:
            found[i].units, found[i].down, _ = units[i].kept(choice.sizes.width)
        shape = choice.sizes.groups, choice.sizes.heads
        if i in heads and shape != (body.sizes.groups, body.sizes.heads):
            stay, groups, _ = heads[i].kept[shape]
            found[i].heads, found[i].groups = stay, groups
            columns = columns_of(stay, body.head_size)
            found[i].output = heads[i].reader.with_only(columns)[0]
    return found


def _spaced(length: int, count: int) -> list[float]:
    """`count` places from the first of a list to its last."""
    return [i * (length - 1) / max(count - 1, 1) for i in range(min(count, length))]
