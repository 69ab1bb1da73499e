"""Linear layers and embeddings whose weight is a sum of Kronecker products, in plain torch.

A part of krony (Apache-2.0) that needs torch alone. Directories that load without krony hold a copy
of it.

W (m, n) maps n inputs to m outputs, y = x Wᵀ. Its large factors are A_r (m1, n1), the small ones
B_r (m2, n2), with m = m1·m2 and n = n1·n2; there are R terms, and T tokens. The layouts are
"small-outer", W = Σ_r B_r ⊗ A_r, and "large-outer", W = Σ_r A_r ⊗ B_r.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layout = Literal["small-outer", "large-outer"]
Shape = tuple[int, int]
Side = TypeVar("Side")  # a factor, or its shape
Mix = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Multiply-adds that a CPU could do in the time in which one entry of W is written, put in its place
# and read again: some 40 to 85 in float32, and more in bfloat16, by the CPU.
FORMING = 80


def in_order(first: Side, second: Side, layout: Layout) -> tuple[Side, Side]:
    """(large, small) as (outer, inner) in that layout, and (outer, inner) as (large, small)."""
    return (second, first) if layout == "small-outer" else (first, second)


def to_dense(outer: Tensor, inner: Tensor) -> Tensor:
    """Σ_r outer_r ⊗ inner_r, from (R, m1, n1) and (R, m2, n2) to (m1·m2, n1·n2)."""
    rows, columns = outer.shape[1] * inner.shape[1], outer.shape[2] * inner.shape[2]
    # One matrix product of the rearranged factors, (m1·n1, R) by (R, m2·n2), then the way back.
    product = outer.flatten(1).T @ inner.flatten(1)
    blocks = product.reshape(*outer.shape[1:], *inner.shape[1:])
    return blocks.permute(0, 2, 1, 3).reshape(rows, columns)


def fill(free: Tensor, order: Tensor) -> Tensor:
    """Small factors (R, q) of the interpolative form: the columns of [I, free] in their order.

    Args:
        free: (R, q - R). order: (q,), entry j is column order[j].
    """
    unit = torch.eye(len(free), dtype=free.dtype, device=free.device)
    return torch.cat([unit, free], 1).index_select(1, order)


def multiply_adds(large: Shape, small: Shape, terms: int, mix_first: bool) -> int:
    """Multiply-adds per token of the factored product in one of its two orders."""
    (m1, n1), (m2, n2) = large, small
    if mix_first:
        return terms * m2 * n1 * (n2 + m1)
    return terms * n2 * m1 * (n1 + m2)


def mixes_first(large: Shape, small: Shape) -> bool:
    """Whether mixing with the small factor before the large product takes fewer operations."""
    return multiply_adds(large, small, 1, True) <= multiply_adds(large, small, 1, False)


def dense_from(large: Shape, small: Shape, terms: int, mix_first: bool) -> float:
    """The number of tokens from which forming W, once, costs less than the factors; perhaps ∞.

    W costs R·m·n multiply-adds, the time of `FORMING`·m·n more for its bytes, then m·n a token; the
    factors cost `multiply_adds` a token.
    """
    entries = large[0] * large[1] * small[0] * small[1]
    saved = multiply_adds(large, small, terms, mix_first) - entries
    return (terms + FORMING) * entries / saved if saved > 0 else math.inf


def linear_to_large(weight: Tensor, terms: int, mix_first: bool) -> Tensor:
    """The weight of one linear map, (m1, R·n1), or (R·m1, n1) if mixed last, as A (R, m1, n1)."""
    if mix_first:
        return weight.unflatten(1, (terms, -1)).transpose(0, 1)
    return weight.unflatten(0, (terms, -1))


def to_slices(x: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """An axis of q·k numbers as q slices, a side of the small factor, of k, one of the large.

    Args:
        x: (..., q·k). shape: (..., q, k), of the result.
    """
    *lead, q, k = shape
    if layout == "small-outer":
        return x.reshape(shape)
    return x.reshape(*lead, k, q).transpose(-1, -2)


def from_slices(y: Tensor, lead: tuple[int, ...], layout: Layout) -> Tensor:
    """The inverse of `to_slices` for y (T, q, k): (*lead, q·k)."""
    _, q, k = y.shape
    if layout == "large-outer":
        y = y.transpose(-1, -2)
    return y.reshape(*lead, q * k)


def mixing(small: Tensor, mix_first: bool) -> Tensor:
    """B (R, m2, n2) as one matrix, for `mix`: (m2·R, n2) before the large product, else (m2, n2·R)
    after it."""
    if len(small) == 1:
        return small[0]
    return (small.transpose(0, 1).flatten(0, 1)) if mix_first else small.permute(1, 2, 0).flatten(1)


def add(y: Tensor, bias: Tensor) -> Tensor:
    """y + bias, in y's own memory where no gradient is wanted: fresh pages cost more than sums.

    In y's dtype: autocast leaves sums alone, and float32 would spread from here.
    """
    bias = bias.to(y.dtype)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return y + bias
    return y.add_(bias)


def mix(mixing: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """mixing (p, q) times x (T, q, k), plus a bias (p, k): (T, p, k)."""
    tokens, q, k = x.shape
    if k == 1:  # the low-rank corner: an ordinary linear map
        offset = None if bias is None else bias.squeeze(-1)
        return F.linear(x.squeeze(-1), mixing, offset).unsqueeze(-1)
    if q == 1:  # in the dtype of x, see `add`
        mixing = mixing.to(x.dtype)
        return mixing * x if bias is None else torch.addcmul(bias.to(x.dtype), mixing, x)
    # torch.matmul, which would do for all, spends several times as long on finding the call.
    many = mixing.expand(tokens, -1, -1)
    return torch.bmm(many, x) if bias is None else torch.baddbmm(bias, many, x)


def apply(
    x: Tensor,
    small: Tensor,
    large: Callable[[Tensor], Tensor],
    large_shape: Shape,
    layout: Layout = "small-outer",
    mix_first: bool = True,
    bias: Tensor | None = None,
    mix: Mix = mix,
) -> Tensor:
    """y = x Wᵀ + bias for W = Σ_r B_r ⊗ A_r (or Σ_r A_r ⊗ B_r), without forming W.

    Two matrix products: a large one, and a small one that mixes n2 (or m2·R) slices of the
    activations, before it or after it.

    Args:
        x: (..., n). small: B, (R, m2, n2). bias: (m,).
        large: the linear map of A, as `linear_to_large` reads it: (T, R·n1) to (T, m1) when mixed
            first, else (T, n1) to (T, R·m1).
        mix: what is to be used in the place of `mix`.
    Returns:
        (..., m).
    """
    (m1, n1), (terms, m2, n2) = large_shape, small.shape
    lead, matrix = x.shape[:-1], mixing(small, mix_first)
    x = to_slices(x, (-1, n2, n1), layout)
    offset = None if bias is None else to_slices(bias, (m2, m1), layout)
    if mix_first:
        y = large(mix(matrix, x, None).reshape(-1, terms * n1)).reshape(-1, m2, m1)
        y = y if offset is None else add(y, offset)
    else:
        rows = large(x.reshape(-1, n1))
        y = mix(matrix, rows.reshape(-1, n2 * terms, m1), offset)
    return from_slices(y, lead, layout)


def rows(ids: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Rows of W = Σ_r outer_r ⊗ inner_r: an embedding's lookup.

    Row c·m_inner + a of a Kronecker product is outer's row c ⊗ inner's row a.

    Args:
        ids: (...), row numbers from 0 to m - 1. outer, inner: (R, ·, ·) each.
    Returns:
        (..., n).
    """
    left = _pick(outer, ids // inner.shape[1])
    right = _pick(inner, ids % inner.shape[1])
    return torch.einsum("...rd,...rb->...db", left, right).flatten(-2).reshape(*ids.shape, -1)


def _pick(factors: Tensor, ids: Tensor) -> Tensor:
    """Row `ids` of every term: (..., R, n); a single row is not repeated: (R, n)."""
    if factors.shape[1] == 1:
        return factors[:, 0]
    table = factors.transpose(0, 1).flatten(1)
    return F.embedding(ids, table).unflatten(-1, (len(factors), -1))


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

    Parameters, not initialised:
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
            return self.filled(self.order).unflatten(1, self.small_shape)
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
        return self.output(self.embedding_dim, self.num_embeddings, shared, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to (..., D)."""
        first, *others = self.groups
        y: Tensor = first.rows(ids)  # type: ignore[operator]
        for group in others:
            y = y + group.rows(ids)  # type: ignore[operator]
        return y if self.scale == 1 else y * torch.tensor(self.scale, dtype=y.dtype)

    def extra_repr(self) -> str:
        return f"tokens={self.num_embeddings}, model={self.embedding_dim}"
