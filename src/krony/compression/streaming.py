"""Moments block by block: never more in memory than one block, its activations and its moments.

Forward, the hidden states that enter each block are put aside, in memory if there is room and in a
folder if not. Then, from the last block to the first, each is run again on them with a graph, and
the gradient at its outputs becomes that at its inputs: gradient checkpointing, which costs one more
forward pass, and lets the moments of a block be finished, and leave memory, before the next one's
are begun. A model whose blocks can't be replayed like that goes through `calibrate` in one piece.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from krony.compression import calibrate, together
from krony.compression.calibrate import Collector, Inputs, Moments, backward_from_samples
from krony.compression.work import Tensors, Work
from krony.hf.families import blocks, dense_weight, states_and_head
from krony.hf.replay import BlockStream, fast_products
from krony.measure.memory import free_bytes

SHARE = 0.6  # of free memory, unless the caller says how much
PROGRAM = 600_000_000  # bytes of Python, torch and transformers


class Kept(Mapping[str, Moments]):
    """Moments in a `Work`, read a block at a time; the last block read is held."""

    def __init__(self, work: Work, places: dict[str, str]) -> None:
        self._work, self._places = work, places
        self._last: tuple[str, dict[str, Moments]] = ("", {})

    def __getitem__(self, name: str) -> Moments:
        block = self._places[name]
        if self._last[0] != block:
            self._last = ("", {})  # the old one leaves before the new one comes
            found = self._work.get("moments", block, _members(self._places, block))
            assert found is not None
            self._last = (block, _unpack(found))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def collect(
    model: PreTrainedModel,
    windows: Tensor,
    names: list[str],
    work: Work,
    *,
    room: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[str, Moments]:
    """Moments with gradients of linear layers, as `calibrate.calibrate` finds them.

    Args:
        room: bytes that hidden states put aside may take in memory.
    """
    found = _Streamed(model, windows, names, work, room, seed)
    if found.finished:
        return Kept(work, found.places)
    with fast_products(model):
        if not found.can_replay():
            return calibrate.calibrate(model, windows, names, seed=seed, progress=progress)
        found.run(progress)
    return Kept(work, found.places)


def room(
    model: PreTrainedModel, windows: Tensor, names: list[str], memory: int | None = None
) -> int:
    """Bytes that hidden states put aside may take of `memory` in all (default: `SHARE` of what is
    free)."""
    if memory is None:
        memory = int(SHARE * free_bytes(model.device))
    return max(0, memory - needs(model, windows, names))


def needs(model: PreTrainedModel, windows: Tensor, names: list[str]) -> int:
    """Bytes without which nothing goes: the model as it is and in float32, one block's moments and
    their decompositions in float64, its activations, and three copies of the hidden states."""
    widest = max(max(dense_weight(model.get_submodule(name)).shape) for name in names)
    stored = sum(p.numel() * (4 + p.element_size() % 4) for p in model.parameters())
    at_once = calibrate.batch_of(windows) * windows.shape[1]
    hidden = 4 * windows.numel() * int(model.config.get_text_config().hidden_size)
    return PROGRAM + stored + 8 * 12 * widest**2 + 4 * 24 * at_once * widest + 3 * hidden


class _Streamed:
    """One collection."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        names: list[str],
        work: Work,
        room: int,
        seed: int,
    ) -> None:
        self.model, self.work = model, work
        self.batch = calibrate.batch_of(windows)
        self.windows = together.share(windows, self.batch)
        self.room, self.seed = room, seed
        self.named = blocks(model)
        self.places: dict[str, str] = {}
        for name in names:
            inside = next((b for b, _, _ in self.named if name.startswith(b + ".")), None)
            if inside is not None:
                self.places[name] = inside
        self.whole = len(self.places) == len(names)
        self.todo = [b for b, _, _ in self.named if b in set(self.places.values())]

    @property
    def finished(self) -> bool:
        return self.whole and not self._missing()

    def _missing(self) -> list[str]:
        return [b for b in self.todo if self._get(b) is None]

    def _get(self, block: str) -> Tensors | None:
        return self.work.get("moments", block, _members(self.places, block))

    def can_replay(self) -> bool:
        """Whether the blocks, one after the other, do what the model does."""
        if not self.whole or not self.named:
            return False
        batch = self.batch
        modules = [module for _, _, module in self.named]
        self.states, self.head = states_and_head(self.model)
        with torch.no_grad():
            wanted = self.states(input_ids=self.windows[:batch].to(self.model.device))
            self.stream = BlockStream(self.model, modules, self.windows, batch)
            if len(self.stream.extra) != len(modules):
                return False
            hidden = self.stream.hidden[0]
            for i, module in enumerate(modules):
                hidden = self.stream.run(i, module, hidden)
            with self._skipping(hidden):
                again = self.states(input_ids=self.windows[:batch].to(self.model.device))
        return again.shape == wanted.shape and torch.allclose(again, wanted, rtol=1e-3, atol=1e-3)

    @contextmanager
    def _skipping(self, last: Tensor) -> Iterator[None]:
        """Inside, the blocks do nothing, and the last one gives `last`."""
        modules = [module for _, _, module in self.named]
        arguments, options = self.stream.extra[0]
        with torch.no_grad():
            made = modules[0](self.stream.hidden[0], *arguments, **options)

        def passing(*_: Any, **__: Any) -> Any:
            return type(made)((last, *made[1:])) if isinstance(made, tuple | list) else last

        try:
            for module in modules:
                module.forward = passing
            yield
        finally:
            for module in modules:
                del module.forward

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Collect what is missing, from the last block to the first."""
        order = [name for name, _, _ in self.named]
        missing = self._missing()
        first = min(order.index(block) for block in missing)
        alone = together.place()[1] == 1
        flags = [p.requires_grad for p in self.model.parameters()]
        self.model.requires_grad_(False)
        try:
            with _Shelf(self.room, self.work.folder) as shelf:
                last, gradient = self._start(first, len(order) - 1, shelf, progress)
                for i in range(last, first - 1, -1):
                    found = self._block(i, shelf.take(i), gradient)
                    if order[i] in missing:
                        members = _members(self.places, order[i])
                        self.work.put(_pack(found), "moments", order[i], members)
                    if i > first and self.work.folder is not None and alone:
                        self.work.put(_numbered(gradient), "gradient", i)
                    if alone:
                        self.work.drop("gradient", i + 1)
                    if progress is not None:
                        progress(2 * last + 2 - i, 2 * last + 2 - first)
        finally:
            for parameter, flag in zip(self.model.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)

    def _start(
        self,
        first: int,
        last: int,
        shelf: "_Shelf",
        progress: Callable[[int, int], None] | None,
    ) -> tuple[int, list[Tensor]]:
        """The block to begin with, and the gradients at its outputs; what enters the blocks from
        `first` to it goes to the shelf."""
        known = None
        for i in range(first + 1, last + 1):
            if (known := self.work.get("gradient", i)) is not None:
                last = i - 1
                break
        hidden = self.stream.hidden
        shelf.open(sum(h.numel() * h.element_size() for h in hidden) * (last - first + 1))
        with torch.no_grad():
            for i in range(last + 1):
                if i >= first:
                    shelf.put(i, hidden)
                if i < last or known is None:
                    module = self.named[i][2]
                    hidden = [self.stream.run(i, module, h) for h in hidden]
                if progress is not None:
                    progress(i + 1, 2 * last + 2 - first)
        self.stream.hidden = self.stream.hidden[:1]  # of which only the shape is needed now
        if known is None:
            return last, self._from_labels(hidden)
        return last, [known[str(n)].to(self.model.device) for n in range(len(known))]

    def _from_labels(self, hidden: list[Tensor]) -> list[Tensor]:
        """Gradients at what the last block gives, of the loss of labels sampled from the model."""
        vocabulary = self.model.config.get_text_config().vocab_size
        found, batch = [], self.batch
        rank, count = together.place()
        for number, last in enumerate(hidden):
            generator = calibrate.labels_of(self.seed, rank + number * count)
            leaf = last.detach().requires_grad_()
            ids = self.windows[number * batch : (number + 1) * batch].to(self.model.device)
            with self._skipping(leaf), torch.enable_grad():
                states = self.states(input_ids=ids)
            backward_from_samples(states, self.head, vocabulary, generator)
            assert leaf.grad is not None
            found.append(leaf.grad)
        return found

    def _block(self, i: int, hidden: list[Tensor], gradient: list[Tensor]) -> dict[str, Moments]:
        """Moments of block `i`; the gradients at its outputs become those at its inputs."""
        name, _, module = self.named[i]
        mine = {n: self.model.get_submodule(n) for n in _members(self.places, name)}
        collector = Collector(mine, True, calibrate.home_of(self.model, list(mine.values())))
        with collector, torch.enable_grad():
            for number, entering in enumerate(hidden):
                leaf = entering.detach().requires_grad_()
                self.stream.run(i, module, leaf).backward(gradient[number])
                assert leaf.grad is not None
                gradient[number] = leaf.grad
                collector.settle()
        for inputs in {id(m.inputs): m.inputs for m in collector.found.values()}.values():
            inputs.add_up()
        for entry in collector.found.values():
            assert entry.gradient_square is not None
            together.add_up(entry.gradient_square)
            entry.tokens = entry.inputs.tokens
        calibrate.check_moments(collector.found, list(mine))
        return collector.found


def _members(places: Mapping[str, str], block: str) -> list[str]:
    return [name for name, its in places.items() if its == block]


def _numbered(tensors: list[Tensor]) -> Tensors:
    return {str(n): tensor for n, tensor in enumerate(tensors)}


def _pack(found: Mapping[str, Moments]) -> Tensors:
    """Moments as tensors; inputs that matrices share are there once."""
    packed: Tensors = {}
    kinds: dict[int, int] = {}
    for name, entry in found.items():
        number = kinds.setdefault(id(entry.inputs), len(kinds))
        assert entry.gradient_square is not None
        packed[f"gradient {number} {name}"] = entry.gradient_square
        packed[f"total {number}"] = entry.inputs.total
        packed[f"square {number}"] = entry.inputs.square
        packed["tokens"] = torch.tensor(entry.tokens)
    return packed


def _unpack(packed: Tensors) -> dict[str, Moments]:
    tokens, shared, found = int(packed["tokens"]), {}, {}
    for key, square in packed.items():
        kind, _, rest = key.partition(" ")
        if kind == "gradient":
            number, _, name = rest.partition(" ")
            if number not in shared:
                inputs = packed[f"total {number}"], packed[f"square {number}"]
                shared[number] = Inputs(*inputs, tokens)
            found[name] = Moments(shared[number], square, tokens)
    return found


class _Shelf:
    """Hidden states put aside: in memory if all of them have room there, else in a folder."""

    def __init__(self, room: int, folder: Path | None) -> None:
        self.room, self.beside = room, folder
        self.held: dict[int, list[Tensor]] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "_Shelf":
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self.folder.cleanup()

    def open(self, size: int) -> None:
        """Make ready for so many bytes."""
        if size > self.room:
            if self.beside is not None:
                self.beside.mkdir(parents=True, exist_ok=True)
            self.folder = tempfile.TemporaryDirectory(dir=self.beside)

    def put(self, i: int, hidden: list[Tensor]) -> None:
        """Put aside what enters block `i`."""
        if self.folder is None:
            self.held[i] = hidden
        else:
            tensors = {k: v.contiguous().cpu() for k, v in _numbered(hidden).items()}
            save_file(tensors, Path(self.folder.name) / f"{i}")
            self.device = hidden[0].device

    def take(self, i: int) -> list[Tensor]:
        """Have it back, once."""
        if self.folder is None:
            return self.held.pop(i)
        path = Path(self.folder.name) / f"{i}"
        tensors = load_file(path)
        path.unlink()
        return [tensors[str(n)].to(self.device) for n in range(len(tensors))]
