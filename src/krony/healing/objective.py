"""What a model is healed towards: its forward is made to return the loss, nothing else.

The loss is computed inside of the model's own forward, so that whatever wraps the model
(DistributedDataParallel, FSDP2, autocast, torch.compile) sees one scalar and never the logits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.healing import losses
from krony.hf.families import blocks, states_and_head
from krony.hf.provenance import dense_blocks
from krony.hf.replay import captured


class Objective:
    """The loss of a model on token ids, with or without a teacher.

    Args:
        parts: of `losses.PARTS`, added up. Out of training mode it is always cross-entropy.
        teacher: the dense model; needed by "kl" and "features".
        temperature: of the KL divergence.
    Raises:
        KronyError: a part that needs a teacher without one, or a teacher of another kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Sequence[str],
        teacher: PreTrainedModel | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.parts, self.temperature = tuple(parts), temperature
        self.taught = tuple(p for p in parts if p != losses.CE)
        self.vocabulary = model.config.get_text_config().vocab_size
        if self.taught and teacher is None:
            raise KronyError(
                f"the loss {'+'.join(parts)} needs a teacher, the dense model; give one, or use ce"
            )
        self.teacher = teacher if self.taught else None
        self.student_states = states_and_head(model)
        self.student_layers: dict[str, nn.Module] = {}
        self.teacher_layers: dict[str, nn.Module] = {}
        if self.teacher is not None:
            size = self.teacher.config.get_text_config().vocab_size
            if size != self.vocabulary:
                raise KronyError(
                    f"the teacher has a vocabulary of {size} tokens and the model one of "
                    f"{self.vocabulary}; the teacher must be the dense model it was made from"
                )
            self.teacher.eval()
            self.teacher_states = states_and_head(self.teacher)
        if losses.FEATURES in parts and self.teacher is not None:
            self.student_layers, self.teacher_layers = _same_blocks(model, self.teacher)

    def __call__(self, model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
        """{"loss": mean nats a prediction} on (blocks, window) token ids."""
        training = model.training
        parts = self.parts if training else (losses.CE,)
        states, head = self.student_states
        if not training or self.teacher is None:
            hidden = states(input_ids=input_ids)
            loss = losses.next_token(_flat(hidden), head, _labels(input_ids), self.vocabulary)
            return {"loss": loss}
        with torch.no_grad(), captured(self.teacher_layers, outputs=True) as wanted:
            known, teach = self.teacher_states[0](input_ids=input_ids), self.teacher_states[1]
        with captured(self.student_layers, outputs=True, detach=False) as features:
            hidden = states(input_ids=input_ids)
        loss = hidden.new_zeros((), dtype=torch.float32)
        if set(parts) - {losses.FEATURES}:
            loss = losses.next_token(
                _flat(hidden),
                head,
                _labels(input_ids),
                self.vocabulary,
                parts,
                (_flat(known), teach),
                self.temperature,
            )
        if losses.FEATURES in parts:
            pairs = [(features[name], wanted[name]) for name in self.student_layers]
            error = losses.feature_error(*zip(*pairs, strict=True))
            loss = loss + losses.FEATURE_WEIGHT * error
        return {"loss": loss}


def _same_blocks(
    model: PreTrainedModel, teacher: PreTrainedModel
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The blocks of both under the names of the model's, those of the teacher that end where the
    model's do. Raises `KronyError` where they differ in width, or in number and nothing says which
    were taken out."""
    student, taught = ({name: block for name, _, block in blocks(m)} for m in (model, teacher))
    widths = [m.config.get_text_config().hidden_size for m in (model, teacher)]
    ends = dense_blocks(model, teacher)
    if not student or ends is None or widths[0] != widths[1]:
        raise KronyError(
            f"features are compared block by block, but the teacher has {len(taught)} blocks of "
            f"width {widths[1]} and the model {len(student)} of {widths[0]}; use the loss kl"
        )
    return student, {name: taught[end] for name, end in zip(student, ends, strict=True)}


def _flat(hidden: Tensor) -> Tensor:
    return hidden[:, :-1].flatten(0, 1)


def _labels(input_ids: Tensor) -> Tensor:
    return input_ids[:, 1:].flatten()


@contextmanager
def borrowed(teacher: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the teacher's weights are on that device and in that dtype; then what they were."""
    tensors = [*teacher.parameters(), *teacher.buffers()]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            # Buffers, of positions for example, keep their precision.
            weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            tensor.data = tensor.data.to(device, dtype if weight else tensor.dtype)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


@contextmanager
def returning_loss(model: PreTrainedModel, objective: Objective) -> Iterator[None]:
    """Inside, model(input_ids=...) returns {"loss": ...}, and dropout is off."""

    def forward(self: nn.Module, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        return objective(self, input_ids)

    before = _switch_off_dropout(model)
    model.forward = MethodType(forward, model)
    try:
        yield
    finally:
        # accelerate wraps the forward of the instance and keeps the one it found.
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        for module, name, value in before:
            setattr(module, name, value)


def _switch_off_dropout(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Dropout hinders the few tokens of healing: nanoGPT and the paper train without it."""
    changed = []
    for module in model.modules():
        for name, value in list(vars(module).items()):
            drops = (isinstance(module, nn.Dropout) and name == "p") or "drop" in name
            if drops and isinstance(value, float) and value > 0:
                changed.append((module, name, value))
                setattr(module, name, 0.0)
    return changed
