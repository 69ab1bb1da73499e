"""What the recipes that pretrain share: batches, optimisers, the schedule, checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a finished temporary sibling in the place of a folder."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def fresh_sibling(folder: Path) -> Path:
    """An empty temporary folder beside the one that it will become."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


class Windows:
    """Training windows in an order that depends only on the seed and the position.

    Args:
        stream: token ids (T,).
        window: tokens in a window.
        batch: windows in a step.
    """

    def __init__(self, stream: np.ndarray, window: int, batch: int, seed: int) -> None:
        self.stream, self.window, self.batch, self.seed = stream, window, batch, seed
        self.count = (len(stream) - window) // window
        self.epoch = -1
        self.starts = np.zeros(0, dtype=np.int64)

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.count)
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            # A new offset each epoch, so that windows are not cut twice at the same places.
            order = random.permutation(self.count)
            self.starts = order * self.window + random.integers(self.window)
            self.epoch = epoch
        return int(self.starts[index])

    def __call__(self, step: int) -> torch.Tensor:
        """The batch of a step, (windows, window)."""
        first = step * self.batch
        starts = [self._start(position) for position in range(first, first + self.batch)]
        rows = np.stack([self.stream[start : start + self.window] for start in starts])
        return torch.from_numpy(rows.astype(np.int64))


def optimisers(
    model: PreTrainedModel, adam_lr: float, muon_lr: float | None
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, then AdamW for embeddings, norms and biases.

    Without a rate for Muon (its steps are in bfloat16, slow where that is only emulated), AdamW for
    all of them.
    """
    matrices: list[torch.nn.Parameter] = []
    embeddings: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and (".h." in name or ".layers." in name):
            matrices.append(parameter)
        else:
            (embeddings if parameter.ndim == 2 else vectors).append(parameter)
    groups = [
        {"params": embeddings, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
    ]
    decay = {"params": matrices, "weight_decay": 0.05}
    if muon_lr is None:
        return [_adam([decay, *groups], adam_lr)]
    muon = torch.optim.Muon(
        matrices,
        lr=muon_lr,
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        weight_decay=0.05,
        # The other rule depends on which side is the output, which Conv1D has transposed.
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, _adam(groups, adam_lr)]


def _adam(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-10, fused=True)


def learning_rate_factor(step: int, progress: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to nothing when ``progress`` is 1."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def save_checkpoint(
    folder: Path, model: PreTrainedModel, optims: list[torch.optim.Optimizer], state: dict[str, Any]
) -> None:
    """Write weights, optimisers and the JSON-ready state, with its "step"; older ones go."""
    final = folder / f"checkpoint-{state['step']:06d}"
    temporary = fresh_sibling(final)
    save_model(model, str(temporary / "model.safetensors"))
    torch.save([optim.state_dict() for optim in optims], temporary / "optimisers.pt")
    (temporary / "state.json").write_text(json.dumps(state))
    replace_folder(temporary, final)
    for other in folder.glob("checkpoint-*"):
        if other != final:
            shutil.rmtree(other)


def load_checkpoint(
    folder: Path, model: PreTrainedModel, optims: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Load the newest checkpoint in place and return its state; a first state if there is none."""
    found = [path for path in folder.glob("checkpoint-*") if path.suffix == ""]
    if not found:
        return {"step": 0, "seconds": 0.0, "curve": []}
    newest = max(found)
    load_model(model, str(newest / "model.safetensors"))
    loaded = torch.load(newest / "optimisers.pt", weights_only=True)
    for optim, saved in zip(optims, loaded, strict=True):
        optim.load_state_dict(saved)
    state: dict[str, Any] = json.loads((newest / "state.json").read_text())
    return state
