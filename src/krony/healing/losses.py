"""Losses of healing: pure functions over hidden states, logits and features.

Letters: N predictions, D model axis, V vocabulary. The output matrix is applied here, in pieces of
tokens that are computed again in the backward pass, so that logits are never held for all tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from krony.errors import KronyError

CE, KL, FEATURES = "ce", "kl", "features"
PARTS = (CE, KL, FEATURES)
FEATURE_WEIGHT = 8.0  # beside the others (docs/log.md)
LOGITS = 2**26  # most logits held at a time; a quarter of a gigabyte in float32
IN_CACHE = 2**20  # of them that a core works on at once, and that its cache has room for

Head = Callable[[Tensor], Tensor]


def parse(text: str) -> tuple[str, ...]:
    """The parts of a loss such as "ce", "kl", "ce+kl" or "kl+features". Raises `KronyError`."""
    parts = tuple(text.split("+"))
    if not set(parts) <= set(PARTS) or len(set(parts)) != len(parts):
        raise KronyError(
            f"no loss {text!r}; give {', '.join(PARTS)}, or a sum of them such as ce+kl"
        )
    return parts


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross-entropy in nats: logits (N, V), labels (N,)."""
    loss: Tensor = cast(Any, _WithGradient).apply(logits, _cross_entropy, labels)
    return loss


def forward_kl(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Summed KL(teacher ‖ student) at a temperature, times its square (Hinton et al. 2015): (N, V).

    The square keeps the size of the gradient when the temperature changes. The teacher gets none.
    """
    loss: Tensor = cast(Any, _WithGradient).apply(
        logits, partial(_kl, temperature=temperature), teacher
    )
    return loss


# (logits, what they should predict) of some rows to the summed loss and its gradient.
Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient is q minus one at the label."""
    labels = labels[:, None]
    log_q = F.log_softmax(logits, -1)
    loss = -log_q.gather(1, labels).sum()
    one = torch.full_like(labels, -1, dtype=log_q.dtype)
    return loss, log_q.exp_().scatter_add_(1, labels, one)


def _kl(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The gradient is the temperature times q - p."""
    taught = teacher.to(logits.dtype)
    if temperature != 1:
        logits, taught = logits / temperature, taught / temperature
    log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(taught, -1)
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum() * temperature**2
    gradient = log_q.exp_().sub_(p)
    return loss, gradient if temperature == 1 else gradient.mul_(temperature)


class _WithGradient(torch.autograd.Function):
    """A sum over rows of logits that makes its gradient of the numbers at hand.

    The chain of operations that it is would pass over all logits several times more, in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rule: Rule, wanted: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        exact = torch.promote_types(logits.dtype, torch.float32)
        cached = logits.is_cpu and not torch.compiler.is_compiling()
        size = max(1, IN_CACHE // logits.shape[-1]) if cached else len(logits)
        losses = []
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            loss, of_rows = rule(logits[rows].to(exact), wanted[rows])
            losses.append(loss)
            if gradient is not None:
                gradient[rows] = of_rows
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def feature_error(features: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over layers of ‖f - w‖² / ‖w - mean(w)‖²: 1 for a layer that says nothing but its mean.

    Args:
        features, wanted: hidden states (..., D) after every block, of student and teacher.
    """
    errors = []
    for f, w in zip(features, wanted, strict=True):
        w = w.float().flatten(0, -2)
        size = (w - w.mean(0)).square().sum().clamp(min=1e-12)
        errors.append((f.float().flatten(0, -2) - w).square().sum() / size)
    return torch.stack(errors).mean()


def next_token(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    vocabulary: int,
    parts: Sequence[str] = (CE,),
    teacher: tuple[Tensor, Head] | None = None,
    temperature: float = 1.0,
    logits: int = LOGITS,
) -> Tensor:
    """Mean over predictions of the asked-for sum of cross-entropy and KL, in nats.

    Args:
        hidden: last hidden states of the student that predict something, (N, D).
        head: maps (n, D) to logits (n, V).
        labels: (N,), what they should predict.
        vocabulary: V.
        teacher: the hidden states (N, D') and head of the teacher, needed by KL.
        logits: most logits to hold at a time.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    size = max(1, logits // vocabulary)
    one_piece = len(hidden) <= size

    def piece(h: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
        made, value = head(h), h.new_zeros((), dtype=torch.float32)
        if CE in parts:
            value = value + cross_entropy(made, y)
        if KL in parts:
            assert teacher is not None
            assert t is not None
            with torch.no_grad():
                wanted = teacher[1](t)
            value = value + forward_kl(made, wanted, temperature)
        return value

    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        arguments = (hidden[rows], labels[rows], None if teacher is None else teacher[0][rows])
        if one_piece or not torch.is_grad_enabled():
            total = total + piece(*arguments)
        else:
            total = total + checkpoint(piece, *arguments, use_reentrant=False)
    return total / len(hidden)
