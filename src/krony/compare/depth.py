"""Rivals by depth: whole blocks are left out, by what each of them does.

ShortGPT (Men et al. 2024, arXiv 2403.03853) scores a block by how much it turns the hidden states,
Minitron (Muralidharan et al. 2024, arXiv 2407.14679) by the loss without it; DistilGPT2 (Sanh et
al. 2019) takes every other one, whatever it does. A budget is met in whole blocks: the nearest
number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from krony.compare.evidence import Evidence
from krony.compression.judge import influence
from krony.errors import KronyError
from krony.hf.families import blocks
from krony.hf.smaller import Kept, anatomy, skipped, smaller
from krony.measure import info

LOSS_WINDOWS = 4  # on which a block's absence is measured: once for each block


def without(model: PreTrainedModel, gone: Sequence[int]) -> PreTrainedModel:
    """The ordinary model of the other blocks."""
    body = anatomy(model)
    stay = [i for i in range(len(body.parts)) if i not in set(gone)]
    sizes = replace(body.sizes, blocks=len(stay))
    return smaller(model, body, sizes, {i: Kept() for i in stay})


def how_many(evidence: Evidence, share: float) -> int:
    """Blocks that go: the number whose parameters are nearest to what the budget takes away."""
    count = len(blocks(evidence.model))
    gone = round(evidence.removed(share) / (evidence.matrices / count))
    if not 0 < gone < count:
        raise KronyError(
            f"a budget of {share} can't be met in whole blocks: the model has {count}; give a "
            f"budget between {1 / count:.2f} and {1 - 1 / count:.2f}"
        )
    return gone


def block_influence(evidence: Evidence, share: float) -> PreTrainedModel:
    """Without the blocks that turn the hidden states least."""
    count = how_many(evidence, share)

    def found() -> dict[str, torch.Tensor]:
        return {"influence": influence(evidence.model, evidence.windows)}

    order = evidence.work.once(found, "influence")["influence"].argsort().tolist()
    return without(evidence.model, order[:count])


def by_loss(evidence: Evidence, share: float) -> PreTrainedModel:
    """Without the blocks that the loss on calibration text misses least, each on its own."""
    count = how_many(evidence, share)

    def found() -> dict[str, torch.Tensor]:
        return {"losses": losses_without(evidence)}

    order = evidence.work.once(found, "losses")["losses"].argsort().tolist()
    return without(evidence.model, order[:count])


@torch.inference_mode()
def losses_without(evidence: Evidence) -> torch.Tensor:
    """Nats a token without each block, (blocks,)."""
    model, total = evidence.model, len(blocks(evidence.model))
    step = max(1, len(evidence.windows) // LOSS_WINDOWS)
    ids = evidence.windows[::step][:LOSS_WINDOWS].to(model.device)
    found = torch.zeros(total, dtype=torch.float64)
    for index in range(total):
        with skipped(model, [index]):
            for row in ids:
                loss = model(input_ids=row[None], labels=row[None], use_cache=False).loss
                found[index] += float(loss) / len(ids)
        if evidence.progress is not None:
            evidence.progress("Losses without a block", index + 1, total)
    return found


def every_other(evidence: Evidence, share: float) -> PreTrainedModel:
    """Blocks at even distances stay, the first among them: every other one at a half."""
    total = len(blocks(evidence.model))
    left = total - how_many(evidence, share)
    stay = {i * total // left for i in range(left)}
    return without(evidence.model, [i for i in range(total) if i not in stay])


def drop_blocks(model: PreTrainedModel, most: int, windows: torch.Tensor) -> PreTrainedModel:
    """As few blocks less, those of least influence, as leave at most that many parameters."""
    order, all_blocks = influence(model, windows).argsort().tolist(), blocks(model)
    size, gone = info.parameters(model), 0
    while size > most * 1.001 and gone < len(order) - 1:
        size -= sum(p.numel() for p in all_blocks[order[gone]][2].parameters())
        gone += 1
    return without(model, order[:gone])
