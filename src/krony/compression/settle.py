"""A smaller model is brought back to what the dense one does, block after block, in closed form.

What a block writes to the residual stream (the last matrix of its attention, then that of its MLP)
is solved for anew: given the inputs that it really gets, come as close as possible to the hidden
states of the dense model where the block ends, or where the next block that stayed begins. So a
block also makes up for the errors of those before it, and for the blocks taken out behind it, as
far as its inputs tell (sequential.py does the same for factors).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression import calibrate, together
from krony.compression.calibrate import Inputs
from krony.compression.sequential import Pairing, refit
from krony.hf import replay
from krony.hf.families import blocks, dense_weight
from krony.hf.replay import BlockStream
from krony.hf.smaller import Anatomy

Progress = Callable[[int, int], None]


@torch.no_grad()
def settle(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    body: Anatomy,
    origin: Sequence[int],
    windows: Tensor,
    progress: Progress | None = None,
) -> None:
    """Solve for the matrices that write to the residual stream, in place.

    Args:
        model: the smaller one, and `body` its anatomy.
        dense: what it was made from; blocks of the same kind.
        origin: of each block of `model`, the index of the dense block that it was.
        windows: token ids (windows, window).
        progress: called with (blocks done, blocks in all).
    """
    batch = calibrate.batch_of(windows)
    windows = together.share(windows, batch)
    own = [module for _, _, module in blocks(model)]
    theirs = [module for _, _, module in blocks(dense)]
    with replay.fast_products(dense):
        followed = BlockStream(model, own, windows, batch)
        wanted = BlockStream(dense, theirs, windows, batch)
        hidden, goal = followed.hidden, wanted.hidden
        for index in range(origin[0]):
            goal = [wanted.run(index, theirs[index], h) for h in goal]
        ends = [*origin[1:], len(theirs)]
        for index, (first, end) in enumerate(zip(origin, ends, strict=True)):
            part, name = body.parts[index], body.parts[index].name
            block = own[index]
            if part.attention is not None:
                output = part.attention.output.removeprefix(name + ".")
                down = "" if part.mlp is None else part.mlp.down.name.removeprefix(name + ".")
                lift = _is_added(followed, index, block, output, down, hidden[0])
                batches = _attention(
                    followed, index, block, wanted, first, theirs[first], output, hidden, goal, lift
                )
                _put(block.get_submodule(output), _summed(batches))
            for number in range(first, end):
                goal = [wanted.run(number, theirs[number], h) for h in goal]
            if part.mlp is not None:
                down = part.mlp.down.name.removeprefix(name + ".")
                if _writes_last(followed, index, block, down, hidden[0]):
                    batches = _mlp(followed, index, block, down, hidden, goal)
                    _put(block.get_submodule(down), _summed(batches))
            hidden = [followed.run(index, block, h) for h in hidden]
            if progress is not None:
                progress(index + 1, len(own))


def _writes_last(
    stream: BlockStream, index: int, block: nn.Module, name: str, hidden: Tensor
) -> bool:
    """Whether the block's output is what the matrix writes plus what does not depend on it."""
    with replay.captured({name: block.get_submodule(name)}, outputs=True) as seen:
        full = stream.run(index, block, hidden)
    with replay.silent(block.get_submodule(name)):
        rest = stream.run(index, block, hidden)
    return _same(full - rest, seen[name])


def _is_added(
    stream: BlockStream, index: int, block: nn.Module, output: str, down: str, hidden: Tensor
) -> bool:
    """Whether what attention writes is added to the residual stream as it is."""
    if not down:
        return False
    layer = {output: block.get_submodule(output)}
    with replay.silent(block.get_submodule(down)), replay.captured(layer, outputs=True) as seen:
        full = stream.run(index, block, hidden)
    return _same(full - hidden, seen[output])


def _same(found: Tensor, written: Tensor) -> bool:
    # Blocks of some families make one row of tokens of a batch on the way.
    return found.numel() == written.numel() and replay.alike(found, written)


def _mlp(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    name: str,
    hidden: Sequence[Tensor],
    goal: Sequence[Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the matrix reads, with what it would have to write for the block to reach the goal."""
    layer = {name: block.get_submodule(name)}
    for here, there in zip(hidden, goal, strict=True):
        with (
            replay.captured(layer, outputs=True) as outputs,
            replay.captured(layer, outputs=False) as inputs,
        ):
            now = stream.run(index, block, here)
        yield inputs[name], outputs[name] + (there - now).reshape_as(outputs[name])


def _attention(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    wanted: BlockStream,
    number: int,
    dense: nn.Module,
    name: str,
    hidden: Sequence[Tensor],
    goal: Sequence[Tensor],
    lift: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the matrix reads, with what the dense one writes; with `lift` also the error that the
    stream carries."""
    layer = {name: block.get_submodule(name)}
    original = {name: dense.get_submodule(name)}
    for here, there in zip(hidden, goal, strict=True):
        with replay.captured(layer, outputs=False, stop=True) as inputs:
            stream.run(index, block, here)
        with replay.captured(original, outputs=True, stop=True) as outputs:
            wanted.run(number, dense, there)
        yield inputs[name], outputs[name] + (there - here) if lift else outputs[name]


def _summed(batches: Iterable[tuple[Tensor, Tensor]]) -> Pairing:
    """The moments of (inputs, outputs) of all batches."""
    found: Pairing | None = None
    for x, y in batches:
        if found is None:
            found = Pairing.zeros(y.shape[-1], Inputs.zeros(x.shape[-1], x.device))
        found.inputs.add(x)
        found.add(x, y)
    assert found is not None
    return found


def _put(layer: Any, pairing: Pairing) -> None:
    pairing.add_up()
    view, home = dense_weight(layer), pairing.inputs.device
    old = None if layer.bias is None else layer.bias.double().to(home)
    weight, bias = refit(view.double().to(home), old, pairing)
    view.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
