"""Ordinary, smaller models of least harm: one width for all MLPs, fewer heads, fewer blocks.

What is taken out is what an ordinary checkpoint of the same architecture can say (hf/smaller.py).
Hidden units and heads are ranked, and what the others can do for those that are gone is solved for
in closed form, in nats a token, as in width.py. Blocks are ranked by what they do to the hidden
states (block influence: ShortGPT, arXiv 2403.03853), and the harm of taking them out is measured.
Which mix of the three suits a size best is measured too: those that look best are built, and the
one whose predictions stay nearest to the dense model's, on windows kept for that, is taken.

Moments know a model only near to what it is, so a large cut is made in several, each with moments
of the model that the last one left, brought back to the dense one (settle.py).
"""

import importlib.metadata
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.compression import calibrate, factorise
from krony.compression.judge import Judge, influence
from krony.compression.removal import Heads, Reader, Units
from krony.compression.settle import settle
from krony.compression.work import Tensors, Work
from krony.errors import KronyError
from krony.hf.families import blocks, dense_weight, find_targets
from krony.hf.smaller import (
    Anatomy,
    Kept,
    Sizes,
    anatomy,
    own_tensors,
    rebuilt,
    skipped,
    smaller,
)
from krony.measure import info
from krony.words import parse_size

CUT = 0.85  # of the parameters of the blocks, about, that one cut leaves
UNITS = (64, 32, 16, 8, 1)  # a width is a multiple of the first of which it has at least sixteen
GONE = 4  # blocks, at the most, that one cut takes out
LOOKED_AT = 5  # blocks that are measured for one to go
TRIED = 6  # mixes that are built and measured
TAKEN = ("all", "mlp", "attention")
HELD_OUT = 8  # windows, at the end of those given, on which that is measured

Progress = Callable[[str, int, int], None]


def slim(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    parameters: int,
    target: str = "all",
    seed: int = 0,
    progress: Progress | None = None,
    work: Work | None = None,
    memory: int | None = None,
) -> PreTrainedModel:
    """An ordinary model of the same architecture with at most so many parameters, of least harm.

    Args:
        model: a dense model; it stays as it is.
        windows: token ids (windows, window) to calibrate on; the last eighth only measures.
        parameters: of the whole model.
        target: what may go: "mlp" hidden units, "attention" heads, "all" both and whole blocks.
        seed: of the labels that calibration samples.
        progress: called with (what, number, how many).
        work: where finished cuts are kept and looked for; default: in memory.
        memory: bytes that this may take in all; default: 60 % of what is free.
    Returns:
        A new model, in the dtype and on the device of the old one. `config.krony` says how it was
        made.
    Raises:
        KronyError: a size that can't be met, or a model whose configuration can't say it.
    """
    before = info.parameters(model)
    inner = matrices(model, target)
    if not before - inner < parameters < before:
        raise KronyError(
            f"a model of {parameters:,} parameters can't be: without any of what may go ({target}) "
            f"this one has {before - inner:,}, with all of it {before:,}"
        )
    if len(windows) < 2:
        raise KronyError("plain models need at least 2 windows, some to calibrate, some to measure")
    held = max(1, min(HELD_OUT, len(windows) // 8))
    current = dense = calibrate.full_precision(model)
    judge = Judge(dense, windows[-held:])
    wanted = (inner - before + parameters) / inner
    cuts = max(1, math.ceil(math.log(wanted) / math.log(CUT)))
    work, origin = work or Work(), list(range(len(blocks(model))))
    for number in range(1, cuts + 1):
        goal = before - inner + int(inner * wanted ** (number / cuts))

        def told(what: str, i: int, n: int, number: int = number) -> None:
            if progress is not None:
                progress(f"{what} (cut {number} of {cuts})", i, n)

        cut = _Cut(current, dense, origin, windows[:-held], judge, target, seed + number, told)
        current, origin = cut.done(goal, work.about(current, windows, seed + number), memory)
    made: PreTrainedModel = current.to(model.dtype)  # type: ignore[arg-type]
    text = vars(windows).get("text")
    made.config.krony = {
        "structure": "plain",
        "version": importlib.metadata.version("krony"),
        "seed": seed,
        "parameters": {"before": before, "after": info.parameters(made)},
        "blocks": origin,
        "texts": [] if text is None else [{**text, "use": "calibration"}],
    }
    return made


def parameters_of(
    model: PreTrainedModel,
    target: str = "all",
    *,
    share: float | None = None,
    size: float | int | str | None = None,
) -> int:
    """Parameters of the whole model that a size means, or a share of the matrices that may lose
    some.

    Raises:
        KronyError: both or neither, or what can't be.
    """
    if (share is None) == (size is None):
        raise KronyError("give a budget as a share or as the size of the model, one of the two")
    before, inner = info.parameters(model), matrices(model, target)
    if share is None:
        wanted = parse_size(size, before)
        assert wanted is not None
        return wanted
    if not 0 < share < 1:
        raise KronyError(f"a budget of {share} is no share; give a number between 0 and 1")
    return before - math.ceil((1 - share) * inner)


def matrices(model: PreTrainedModel, target: str = "all") -> int:
    """Parameters of the matrices of which a plain model may lose a part. Raises `KronyError`."""
    if target not in TAKEN:
        raise KronyError(
            f"a plain model can lose {', '.join(TAKEN)}, not {target!r}; give one of them, or "
            "leave the target out"
        )
    return sum(math.prod(t.shape) for t in find_targets(model, target))


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


@dataclass
class _Cut:
    """One cut: of `model`, which came from `dense` and has those of its blocks (`origin`)."""

    model: PreTrainedModel
    dense: PreTrainedModel
    origin: list[int]
    windows: Tensor
    judge: Judge
    target: str
    seed: int
    progress: Progress

    def done(self, goal: int, work: Work, memory: int | None) -> tuple[PreTrainedModel, list[int]]:
        """The model with at most `goal` parameters, and the dense blocks that are left in it."""
        body = anatomy(self.model)
        depends = goal, self.target, self.origin
        found = work.get("cut", *depends)
        if found is None:
            found = self._made(body, goal, work, memory)
            work.put(found, "cut", *depends)
        sizes, stay = Sizes(*found.pop(" sizes").tolist()), found.pop(" blocks").tolist()
        made = rebuilt(self.model, body, sizes, stay, found)
        return made, [self.origin[i] for i in stay]

    def _made(self, body: Anatomy, goal: int, work: Work, memory: int | None) -> Tensors:
        names = self._readers(body)
        moments = factorise.collect(
            self.model,
            self.windows,
            names,
            [],
            seed=self.seed,
            progress=partial(self.progress, "Calibrating"),
            work=work,
            memory=memory,
        )
        units, heads, widths = self._ranked(body, moments, work)
        gone = self._gone(GONE if self.target == "all" else 0)
        found = _choices(self.model, body, units, heads, gone, [*widths, body.sizes.width], goal)
        if not found:
            raise KronyError(
                f"no mix of widths, heads and blocks of this {type(self.model).__name__} has at "
                f"most {goal:,} parameters; ask for more"
            )
        choice = self._best(body, found, units, heads)
        made = smaller(self.model, body, choice.sizes, _kept(body, choice, units, heads))
        stay = [i for i in range(body.sizes.blocks) if i not in choice.gone]
        origin = [self.origin[i] for i in stay]
        told = partial(self.progress, "Settling")
        settle(made, self.dense, anatomy(made), origin, self.windows, told)
        for part in body.parts:
            work.drop("moments", part.name, [n for n in names if n.startswith(part.name + ".")])
        size = choice.sizes
        return {
            " sizes": torch.tensor([size.width, size.groups, size.heads, size.blocks]),
            " blocks": torch.tensor(stay),
            **own_tensors(made),
        }

    def _readers(self, body: Anatomy) -> list[str]:
        """Matrices that read what may go."""
        names = []
        for part in body.parts:
            if part.attention is not None and body.sizes.groups and self.target != "mlp":
                names.append(part.attention.output)
            if part.mlp is not None and self.target != "attention":
                names.append(part.mlp.down.name)
        return names

    def _ranked(
        self, body: Anatomy, moments: Mapping[str, Any], work: Work
    ) -> tuple[dict[int, Units], dict[int, Heads], list[int]]:
        """Rankings of each block, and the widths that can be chosen."""
        unit = next(u for u in UNITS if u * 16 <= body.sizes.width or u == 1)
        widths = [w for w in range(unit, body.sizes.width, unit) if 2 * w >= body.sizes.width]
        units: dict[int, Units] = {}
        heads: dict[int, Heads] = {}

        def read(name: str) -> Reader:
            return Reader.of(self.model.get_submodule(name), moments[name])

        for i, part in enumerate(body.parts):
            if part.attention is not None and part.attention.output in moments:
                heads[i] = Heads(partial(read, part.attention.output), body.sizes, body.head_size)
            if part.mlp is not None and widths and part.mlp.down.name in moments:
                name = part.mlp.down.name
                units[i] = Units(partial(read, name), widths, name, work)
            self.progress("Pricing", i + 1, len(body.parts))
        return units, heads, widths if units else []

    def _best(
        self,
        body: Anatomy,
        found: list[Choice],
        units: dict[int, Units],
        heads: dict[int, Heads],
    ) -> Choice:
        """The mix whose model is nearest to the dense one, of those that look best."""
        tried = _of_each_depth(found)[:TRIED]
        harms = []
        for number, choice in enumerate(tried, 1):
            made = smaller(self.model, body, choice.sizes, _kept(body, choice, units, heads))
            harms.append(self.judge.harm(made))
            self.progress("Measuring", number, len(tried))
        return tried[min(range(len(tried)), key=harms.__getitem__)]

    def _gone(self, most: int) -> list[tuple[tuple[int, ...], float]]:
        """Sets of blocks that can be taken out, from none on, and the harm of each, measured: the
        next to go is the one of least harm among those of least influence."""
        order = influence(self.model, self.windows[-HELD_OUT:]).argsort().tolist()
        most = min(most, len(order) - 1)
        start, some = self.judge.harm(self.model), list[int]()
        found: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        for count in range(1, most + 1):
            left = [i for i in order if i not in some][:LOOKED_AT]
            harms = []
            for out in left:
                with skipped(self.model, [*some, out]):
                    harms.append(self.judge.harm(self.model))
            some.append(left[min(range(len(left)), key=harms.__getitem__)])
            found.append((tuple(sorted(some)), max(min(harms) - start, 0.0)))
            self.progress("Measuring blocks", count, most)
        return found


def _of_each_depth(found: list[Choice]) -> list[Choice]:
    """The best of every number of blocks, then the others: what is predicted of units and heads
    and what is measured of blocks are not of one scale."""
    first = {len(choice.gone): choice for choice in reversed(found)}
    best = sorted(first.values(), key=lambda choice: choice.harm)
    return [*best, *(choice for choice in found if choice not in best)]


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
            found[i].units, found[i].down = units[i].kept(choice.sizes.width)
        shape = choice.sizes.groups, choice.sizes.heads
        if i in heads and shape != (body.sizes.groups, body.sizes.heads):
            found[i].heads, found[i].groups, _ = heads[i].kept[shape]
            found[i].output = heads[i].output(shape)
    return found
