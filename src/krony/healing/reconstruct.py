"""Reconstruction: the MLPs of a compressed model, one after the other, fitted to the dense ones.

Closed forms fit one matrix at a time and do not see the nonlinearity between two. Here all factors
and biases of an MLP move together, by Adam, towards what the dense MLP makes of the inputs that the
compressed model really gives it. Takes seconds a block, no backward pass through the model.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.healing import losses
from krony.hf.families import blocks, find_targets
from krony.hf.replay import BlockStream, captured

BATCH = 8  # windows that are replayed at a time
ROWS = 2048  # tokens in a step of Adam
RATE = 1e-3


def reconstruct(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Tensor,
    steps: int = 300,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, tuple[float, float]]:
    """Fit every MLP of the model, in place, in the order of the forward pass.

    Args:
        teacher: the dense model, with the same modules.
        windows: token ids (windows, window); their hidden states are kept, 4 bytes x tokens x
            width, and those of one MLP twice.
        steps: of Adam for each MLP; its learning rate falls to nothing by a cosine.
        progress: called with (name, number from 1, how many).
    Returns:
        The error before and after by MLP: ‖f - w‖² / ‖w - mean(w)‖² over all windows, for its
        outputs f and the dense one's w, on the same inputs.
    Raises:
        KronyError: the teacher has no MLPs of the same names, or they are no modules of their own.
    """
    names = _mlps(model, teacher)
    listed = [(name, block) for name, _, block in blocks(model)]
    stream = BlockStream(model, [block for _, block in listed], windows, BATCH)
    generator = torch.Generator().manual_seed(seed)
    hidden, errors = stream.hidden, {}
    for index, (block_name, block) in enumerate(listed):
        for name in [n for n in names if n.startswith(block_name + ".")]:
            mlp, dense = model.get_submodule(name), teacher.get_submodule(name)
            inputs = []
            with torch.no_grad(), captured({name: mlp}, outputs=False) as seen:
                for h in hidden:
                    stream.run(index, block, h)
                    inputs.append(seen[name].flatten(0, -2))
            x = torch.cat(inputs)
            with torch.no_grad():
                wanted = torch.cat([dense(part) for part in x.split(ROWS)])
            before = _error(mlp, x, wanted)
            best = {key: value.clone() for key, value in mlp.state_dict().items()}
            _adam(mlp, x, wanted, steps, generator)
            after = _error(mlp, x, wanted)
            if not after < before:  # a fit that was best already stays as it was
                mlp.load_state_dict(best)
                after = before
            errors[name] = (before, after)
            if progress is not None:
                progress(name, len(errors), len(names))
        with torch.no_grad():
            hidden = [stream.run(index, block, h) for h in hidden]
    return errors


def _mlps(model: PreTrainedModel, teacher: PreTrainedModel) -> list[str]:
    """Names of the modules that hold an up and a down matrix side by side."""
    downs = [t.name for t in find_targets(teacher, "mlp") if t.role == "down"]
    names = [down.rpartition(".")[0] for down in downs]
    there = dict(model.named_modules())
    whole = {name for name, _, _ in blocks(teacher)}
    for name in names:
        if name not in there:
            raise KronyError(
                f"the teacher has an MLP {name} and the model has none; the teacher must be the "
                "dense model it was made from"
            )
        if name in whole:
            raise KronyError(
                f"the MLP of {name} is no module of its own in {type(model).__name__}, so it can't "
                "be reconstructed; leave reconstruction out"
            )
    return names


@torch.no_grad()
def _error(mlp: nn.Module, x: Tensor, wanted: Tensor) -> float:
    made = torch.cat([mlp(part) for part in x.split(ROWS)])
    return float(losses.feature_error([made], [wanted]))


def _adam(
    mlp: nn.Module, x: Tensor, wanted: Tensor, steps: int, generator: torch.Generator
) -> None:
    """Adam on random rows; relative rates, since factors differ in size by orders of magnitude."""
    parameters = list(mlp.parameters())
    groups = [
        {"params": [p], "lr": RATE * max(float(p.detach().square().mean().sqrt()), 1e-3) * 10}
        for p in parameters
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    size = wanted.float().var(0).sum()
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(x), (min(ROWS, len(x)),), generator=generator).to(x.device)
            error = (mlp(x[rows]) - wanted[rows]).square().sum(-1).mean() / size
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
