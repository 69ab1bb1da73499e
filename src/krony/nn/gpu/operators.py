"""The Triton kernels as operators of torch, and where they can be launched.

`krony::decode` is a few tokens through a factored matrix, with plain torch backwards; `krony::step`
a matrix of an MLP with all that is around it, without gradients. Both are opaque to torch.compile,
which therefore keeps them whole, and CUDA graphs record them. Triton is imported at the first call,
never with krony.
"""

import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from krony.maths.kron import large_to_linear
from krony.maths.shapes import Layout, Shape
from krony.nn.gpu.step import Step
from krony.runtime.products import linear_to_large

# Beyond so many tokens the arithmetic of two matrix products weighs more than reading A once.
MAX_TOKENS = 16
# Larger small factors are mixed anew by too many programs; low rank above all, whose "small" factor
# is as large as the large one.
MAX_SIDE, MAX_ENTRIES = 16, 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None


def unusable(request: Any) -> str | None:
    """Why no kernel can run for a request, or None: Triton, a recent GPU, a dtype of theirs.

    With TRITON_INTERPRET=1, as in the tests, a CPU will do.
    """
    if request.device.type != "cuda" and not INTERPRETED:
        return "only on a GPU"
    if request.special is not None:
        return str(request.special)
    if request.dtype not in DTYPES:
        return "only float32, bfloat16 and float16"
    if not INSTALLED:
        return "Triton is not installed"
    if not _runs_on(request.device.type, request.device.index):
        return "its kernels can't be launched on this GPU"
    return None


def fits(small: Sequence[int]) -> bool:
    """Whether small factors (R, m2, n2) are small enough to be mixed anew by every program."""
    terms, m2, n2 = small
    return max(m2, n2) <= MAX_SIDE and terms * m2 * n2 <= MAX_ENTRIES


@torch.compiler.assume_constant_result
def _runs_on(kind: str, index: int | None) -> bool:
    return _launches_on(index) if kind == "cuda" else kind == "cpu" and INTERPRETED


@lru_cache
def _launches_on(index: int | None) -> bool:
    # Triton's bfloat16 needs compute capability 8; float16 alone is not worth a rule. On GPUs of
    # AMD, which torch calls CUDA's too, nothing was tried.
    if torch.version.hip is not None or torch.cuda.get_device_capability(index)[0] < 8:
        return False
    return launches(torch.device("cuda" if index is None else f"cuda:{index}"))


def launches(device: torch.device) -> bool:
    """Whether a kernel can be compiled and launched: Triton needs a C compiler where it runs."""
    try:
        with _disable_current_modes():  # whatever watches, or makes tensors without numbers
            x, weight = torch.ones(1, 2, device=device), torch.ones(1, 2, device=device)
            _launched(x, Step((weight,), (), (), (1, 2, 1, 1)), many=False)
    except Exception as error:  # whatever it is, the torch form does without
        logging.getLogger(__name__).info("no Triton kernels on %s: %s", device, error)
        return False
    return True


def decode(
    x: Tensor,
    small: Tensor,
    weight: Tensor,
    large_shape: Shape,
    layout: Layout = "small-outer",
    mix_first: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias for W = Σ_r B_r ⊗ A_r (or Σ_r A_r ⊗ B_r) in one launch; differentiable.

    The same as `products.apply` with a plain linear layer; call it where nothing is `unusable`.

    Args:
        x: (..., n), a few tokens.
        small: B, (R, m2, n2). weight: A, as `kron.large_to_linear` lays it out. bias: (m,).
    Returns:
        (..., m), summed in float32, in the dtype of x.
    """
    lead, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
    m1, n1 = large_shape
    y: Tensor = _decode(rows, small, weight, bias, m1, n1, layout == "small-outer", mix_first)
    return y.reshape(*lead, y.shape[-1])


def run_step(x: Tensor, step: Step, many: bool) -> Tensor:
    """What a step makes of x (T, n): (T, q·m1), no gradients.

    Args:
        many: by the kernel for many tokens, where the step `takes_many`.
    """
    if not torch.compiler.is_compiling():  # the way through the dispatcher takes longer
        return _launched(x, step, many)
    options = step.sides, step.small_outer, step.mix_first, step.kind, many
    y: Tensor = _step(x, step.weights, step.smalls, step.biases, step.inner, *options)
    return y


def _launched(x: Tensor, step: Step, many: bool) -> Tensor:
    from krony.nn.gpu.launch import launch

    x, y = x.contiguous(), x.new_empty(x.shape[0], step.outputs)
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        launch(x, step, y, many)
    else:  # Triton launches on the current device
        with torch.cuda.device(x.device):
            launch(x, step, y, many)
    return y


@torch.library.custom_op("krony::step", mutates_args=())
def _step(
    x: Tensor, weights: Sequence[Tensor], smalls: Sequence[Tensor], biases: Sequence[Tensor],
    inner: Tensor | None, sides: Sequence[int], small_outer: bool, mix_first: bool, kind: int,
    many: bool,
) -> Tensor:  # fmt: skip
    m1, n1, m2, n2 = sides
    held = tuple(weights), tuple(smalls), tuple(biases)
    step = Step(*held, (m1, n1, m2, n2), small_outer, mix_first, kind, inner)
    return _launched(x, step, many)


@_step.register_fake
def _(x, weights, smalls, biases, inner, sides, small_outer, mix_first, kind, many):  # type: ignore[no-untyped-def]
    slices = sides[2] if inner is None else len(inner)
    return x.new_empty(len(x), slices * sides[0])


@torch.library.custom_op("krony::decode", mutates_args=())
def _decode(
    x: Tensor, small: Tensor, weight: Tensor, bias: Tensor | None, m1: int, n1: int,
    small_outer: bool, mix_first: bool,
) -> Tensor:  # fmt: skip
    biases = () if bias is None else (bias.contiguous(),)
    _, m2, n2 = small.shape
    weights, smalls = (weight.contiguous(),), (small.contiguous(),)
    step = Step(weights, smalls, biases, (m1, n1, m2, n2), small_outer, mix_first)
    return _launched(x, step, many=False)


@_decode.register_fake
def _(x, small, weight, bias, m1, n1, small_outer, mix_first):  # type: ignore[no-untyped-def]
    return x.new_empty(len(x), m1 * small.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, small, weight, bias, ctx.m1, ctx.n1, ctx.small_outer, ctx.mix_first = inputs
    ctx.save_for_backward(x, small, weight)
    ctx.biased = bias is not None


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Gradients of x, small, weight and bias, by plain products over the few tokens.

    With G[t,c,a] that of y and V[t,c,r,b] = Σ_a G[t,c,a] A[r,a,b].
    """
    x, small, weight = ctx.saved_tensors
    terms, m2, n2 = small.shape
    large = linear_to_large(weight, terms, ctx.mix_first)
    if ctx.small_outer:
        inputs, outputs = x.reshape(-1, n2, ctx.n1), grad.reshape(-1, m2, ctx.m1)
    else:
        inputs = x.reshape(-1, ctx.n1, n2).transpose(1, 2)
        outputs = grad.reshape(-1, ctx.m1, m2).transpose(1, 2)
    pulled = torch.einsum("tca,rab->tcrb", outputs, large)
    d_inputs = torch.einsum("tcrb,rcd->tdb", pulled, small)
    if not ctx.small_outer:
        d_inputs = d_inputs.transpose(1, 2)
    d_small = torch.einsum("tcrb,tdb->rcd", pulled, inputs)
    mixed = torch.einsum("rcd,tdb->tcrb", small, inputs)
    d_large = torch.einsum("tca,tcrb->rab", outputs, mixed)
    d_weight = large_to_linear(d_large, ctx.mix_first)
    d_bias = grad.sum(0) if ctx.biased else None
    return d_inputs.reshape(x.shape), d_small, d_weight, d_bias, None, None, None, None


_decode.register_autograd(_backward, setup_context=_save)
