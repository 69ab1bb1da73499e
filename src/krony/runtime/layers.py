"""Linear layers and embeddings whose weight is a sum of Kronecker products, in plain torch.

A part of krony (Apache-2.0) that needs torch alone. Directories that load without krony hold a copy
of it. Letters and layouts as in products.py.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .products import (
    Layout,
    Shape,
    add,
    apply,
    dense_from,
    fill,
    in_order,
    linear_to_large,
    mixes_first,
    rows,
    to_dense,
)


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether a graph is being made in which the number of tokens is not known.

    Older versions of torch.compile take `torch.compiler.is_exporting` for true of themselves.
    """
    return torch.compiler.is_exporting()


def is_hooked(module: nn.Module) -> bool:
    """Whether something is to happen when this module is called, before or after its forward.

    That inputs are moved to where it is, as accelerate does in a model on several devices, is
    nothing: the parts of a layer are in one place.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    hook: Any = module.__dict__.get("_hf_hook")
    return hook is not None and (type(hook).__name__ != "AlignDevicesHook" or bool(hook.offload))


def is_plain_linear(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> bool:
    """Whether a module is just a weight and a bias: not quantized, adapted or sharded."""
    return type(module) in kinds and type(module._parameters.get("weight")) is nn.Parameter


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is one of torchao's tensors."""
    if type(weight) in (nn.Parameter, Tensor):  # the common case; torch.compile traces no more
        return False
    return type(weight).__module__.partition(".")[0] == "torchao"


class KroneckerGroup(nn.Module):
    """R Kronecker terms of one shape, no bias: Σ_r s_r (B_r ⊗ A_r), or Σ_r s_r (A_r ⊗ B_r).

    The large factors live in `large`, an ordinary `nn.Linear`, so that whatever works on linear
    layers (quantization, adapters, sharding) works on them. Which of the two contraction orders is
    used follows from the shapes alone: the order fixes the layout of that weight.

    Parameters, not initialized:
        large.weight: (m1, R·n1) when the small factor is mixed in first, else (R·m1, n1).
        small: (R, m2, n2); with `interpolative=True` (R, m2·n2 - R), and a buffer `order` (m2·n2,)
            that says where the unit matrix and these go (`fill`).
        scalars: (R,), only with `scalars=True` (Krony-PT, section III-F).
    """

    order: Tensor | None

    def __init__(
        self,
        large: Shape,
        small: Shape,
        terms: int = 1,
        layout: Layout = "small-outer",
        scalars: bool = False,
        interpolative: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.large_shape: Shape = (large[0], large[1])
        self.small_shape: Shape = (small[0], small[1])
        self.terms, self.layout = terms, layout
        self.mix_first = mixes_first(large, small)
        self.dense_from = dense_from(large, small, terms, self.mix_first)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        m1, n1 = large
        sides = (terms * n1, m1) if self.mix_first else (n1, terms * m1)
        self.large = nn.Linear(*sides, bias=False, **where)
        entries = small[0] * small[1]
        stored = (entries - terms,) if interpolative else small
        self.small = nn.Parameter(torch.empty(terms, *stored, **where))
        order = torch.arange(entries, dtype=torch.int32, device=device) if interpolative else None
        self.register_buffer("order", order)
        self.scalars = nn.Parameter(torch.ones(terms, **where)) if scalars else None

    @property
    def scaled_small(self) -> Tensor:
        """The small factors in full, with the learnable scalars multiplied in: (R, m2, n2)."""
        if self.order is not None:
            full: Tensor = self.filled(self.order).unflatten(1, self.small_shape)
            return full
        if self.scalars is None:
            return self.small
        return self.small * self.scalars[:, None, None]

    def filled(self, order: Tensor) -> Tensor:
        """Interpolative small factors put together: (R, m2·n2)."""
        return fill(self.small, order)

    @property
    def large_factors(self) -> Tensor:
        """The large factors A: (R, m1, n1)."""
        weight: Any = self.large.weight
        if is_quantized(weight):
            weight = weight.dequantize()
        return linear_to_large(weight, self.terms, self.mix_first)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W of this group, (m, n), summed in `dtype` (default: that of the factors)."""
        large, small = self.large_factors.to(dtype), self.scaled_small.to(dtype)
        return to_dense(*in_order(large, small, self.layout))

    @property
    def is_plain(self) -> bool:
        """Whether `large` is just its weight: not quantized, adapted, sharded or offloaded."""
        plain = is_plain_linear(self.large) and not is_hooked(self.large)
        return plain and self.large.weight.device == self.small.device

    def forms_dense(self, tokens: int) -> bool:
        """Whether W is formed for a batch of so many tokens (`dense_from`).

        Never where `large` is more than a plain layer, with a forward of its own, nor in an
        exported graph, where the number of tokens is not known.
        """
        return not is_exporting() and tokens > self.dense_from and self.is_plain

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias: x (..., n), bias (m,) to (..., m)."""
        if self.dense_from < math.inf and self.forms_dense(x.numel() // x.shape[-1]):
            return F.linear(x, self.to_dense(), bias)
        return self.factored(x, bias)

    def factored(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same by the factors, whatever the number of tokens."""
        shapes = (self.large_shape, self.layout, self.mix_first)
        return apply(x, self.scaled_small, self.large, *shapes, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, (..., n), W not formed."""
        return rows(ids, *in_order(self.large_factors, self.scaled_small, self.layout))

    def extra_repr(self) -> str:
        large, small = ("x".join(map(str, s)) for s in (self.large_shape, self.small_shape))
        learnable = ", scalars" if self.scalars is not None else ""
        form = ", interpolative" if self.order is not None else ""
        return f"{self.terms} x ({large} by {small}), {self.layout}{learnable}{form}"


class _Sum(nn.Module):
    """What a factored linear layer and a factored embedding share: `groups` that add up to W."""

    groups: nn.ModuleList

    @property
    def weight(self) -> Tensor:
        """The dense W (m, n), formed anew at each access; writing to it changes nothing.

        It exists because the model code of several families reads `.weight` of its layers.
        """
        return self.to_dense()

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense W (m, n), summed in `dtype` (default: that of the factors), differentiable."""
        parts: list[Any] = list(self.groups)
        dense: Tensor = parts[0].to_dense(dtype)
        for group in parts[1:]:
            dense = dense + group.to_dense(dtype)
        return dense


class KroneckerLinear(_Sum):
    """y = x Wᵀ + b with W = Σ_groups Σ_r s_r (B_r ⊗ A_r); drop-in for `nn.Linear` and `Conv1D`.

    One group of one shape is the common case; groups of different shapes add up, for example a
    low-rank group (A (m, 1), B (1, n): R terms are a rank-R matrix) and a Kronecker group.

    Args:
        in_features, out_features: n and m.
        groups: any number of `KroneckerGroup`, each of them m by n.
        bias: whether to hold a bias (m,).
    """

    tied = False  # whether the factors are those of an embedding

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: list[Any],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.groups = nn.ModuleList(groups)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) to (..., m)."""
        first, *others = self.groups
        # By name: torch counts FLOPs with hooks that choke on a parameter among the arguments.
        y: Tensor = first(x, bias=self.bias)
        for group in others:
            y = add(y, group(x))
        return y

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"


class KroneckerEmbedding(_Sum):
    """Rows of W = Σ_groups Σ_r s_r (B_r ⊗ A_r), (V, D), looked up without forming W.

    Args:
        num_embeddings, embedding_dim: V tokens and D.
        groups: any number of `KroneckerGroup`, each of them V by D.
        padding_idx: kept for the way back to `nn.Embedding`; no row has gradients of its own here.
    """

    output: type[KroneckerLinear] = KroneckerLinear  # the class of a tied output matrix
    plain, scale = nn.Embedding, 1.0  # the class it stands for; what that multiplies rows by

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        groups: list[Any],
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.groups = nn.ModuleList(groups)

    def tied_linear(self) -> KroneckerLinear:
        """The output matrix y = x Wᵀ with the same parameters: one set of them in memory."""
        shared = []
        for mine in self.groups:
            assert isinstance(mine, KroneckerGroup)
            shapes = mine.large_shape, mine.small_shape, mine.terms, mine.layout
            with torch.device("meta"):
                group = type(mine)(*shapes, mine.scalars is not None, mine.order is not None)
            # An index, not a weight, which transformers would not tie: it stays out of the file.
            order = None if mine.order is None else mine.order.clone()
            group.register_buffer("order", order, persistent=False)
            group.large.weight, group.small = mine.large.weight, mine.small
            if mine.scalars is not None:
                group.scalars = mine.scalars
            shared.append(group)
        head = self.output(self.embedding_dim, self.num_embeddings, shared, bias=False)
        head.tied = True
        return head

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to (..., D)."""
        first, *others = self.groups
        y: Tensor = first.rows(ids)  # type: ignore[operator]
        for group in others:
            y = y + group.rows(ids)  # type: ignore[operator]
        return y if self.scale == 1 else y * torch.tensor(self.scale, dtype=y.dtype)

    def extra_repr(self) -> str:
        return f"tokens={self.num_embeddings}, model={self.embedding_dim}"
