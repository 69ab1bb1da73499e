"""Linear layers and embeddings whose weight is a sum of Kronecker products."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krony.errors import KronyError
from krony.maths import kron
from krony.maths.kron import Layout, Shape
from krony.nn import products
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.packing import is_quantised, is_weight_only
from krony.nn.watched import Formed, can_keep


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
    """Whether a module is just a weight and a bias: not quantised, adapted or sharded."""
    return type(module) in kinds and type(module._parameters.get("weight")) is nn.Parameter


class KroneckerGroup(nn.Module):
    """R Kronecker terms of one shape, no bias: Σ_r s_r (B_r ⊗ A_r), or Σ_r s_r (A_r ⊗ B_r).

    The large factors live in `large`, an ordinary `nn.Linear`, so that whatever works on linear
    layers (quantisation, adapters, sharding) works on them. Which of the two contraction orders is
    used follows from the shapes alone, because the order fixes the layout of that weight.

    Parameters:
        large.weight: (m1, R·n1) when the small factor is mixed in first, else (R·m1, n1).
        small: (R, m2, n2); with `interpolative=True` (R, m2·n2 - R), and a buffer `order` (m2·n2,)
            that says where the unit matrix and these go (`kron.interpolate`).
        scalars: (R,), only with `scalars=True` (Krony-PT, section III-F).
    """

    order: Tensor | None
    # Other ways for a few tokens and for many (kernels.py). Set where krony is imported: this
    # module is also copied into self-contained models, which do without.
    fused: Any = None

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
        kron.check_factors(large, small, terms, layout)
        kron.check_scalars(scalars, interpolative)
        self.large_shape: Shape = (large[0], large[1])
        self.small_shape: Shape = (small[0], small[1])
        self.terms, self.layout = terms, layout
        self.mix_first = kron.mixes_first(large, small)
        self.dense_from = kron.dense_from(large, small, terms, self.mix_first)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        m1, n1 = large
        if self.mix_first:
            self.large = nn.Linear(terms * n1, m1, bias=False, **where)
        else:
            self.large = nn.Linear(n1, terms * m1, bias=False, **where)
        entries = small[0] * small[1]
        stored = (entries - terms,) if interpolative else small
        self.small = nn.Parameter(torch.empty(terms, *stored, **where))
        order = torch.arange(entries, dtype=torch.int32, device=device) if interpolative else None
        self.register_buffer("order", order)
        self.scalars = nn.Parameter(torch.ones(terms, **where)) if scalars else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random factors whose sum has the entries of a fresh `nn.Linear`: variance 1/(3n)."""
        if self.small.is_meta:  # nothing to fill, and torch takes milliseconds to find that out
            return
        fan_in = self.large_shape[1] * self.small_shape[1]
        if self.order is None:
            deviation = (1 / (3 * fan_in * self.terms)) ** 0.25
            nn.init.normal_(self.large.weight, std=deviation)
            nn.init.normal_(self.small, std=deviation)
        else:  # the blocks that are kept, and combinations of all of them
            nn.init.normal_(self.large.weight, std=(1 / (3 * fan_in)) ** 0.5)
            nn.init.normal_(self.small, std=(1 / self.terms) ** 0.5)
        if self.scalars is not None:
            nn.init.ones_(self.scalars)

    @property
    def scaled_small(self) -> Tensor:
        """The small factors in full, with the learnable scalars multiplied in: (R, m2, n2)."""
        if self.order is not None:
            full = cpu_kernels.fill(self.small, self.order)
            full = kron.fill(self.small, self.order) if full is None else full
            return full.unflatten(1, self.small_shape)
        if self.scalars is None:
            return self.small
        return self.small * self.scalars[:, None, None]

    @property
    def large_factors(self) -> Tensor:
        """The large factors A: (R, m1, n1)."""
        weight = self.large.weight
        if is_quantised(weight):
            weight = weight.dequantize()
        return kron.linear_to_large(weight, self.terms, self.mix_first)

    @torch.no_grad()
    def set_factors(self, large: Tensor, small: Tensor, scalars: Tensor | None = None) -> None:
        """Copy in A (R, m1, n1), B (R, m2, n2), s (R,); absorb s where it is not learnable."""
        if self.scalars is None and scalars is not None:
            small = small * scalars[:, None, None]
        if self.order is not None:
            large, small, order = kron.interpolate(large, small)
            self.order.copy_(order)
        self.large.weight.copy_(kron.large_to_linear(large, self.mix_first))
        self.small.copy_(small)
        if self.scalars is not None:
            self.scalars.copy_(torch.ones(self.terms) if scalars is None else scalars)

    @torch.no_grad()
    def absorb_scalars(self) -> None:
        """Multiply the scalars into the small factor and drop them; the output keeps every bit."""
        self.small.copy_(self.scaled_small)
        self.scalars = None

    @torch.no_grad()
    def complete(self) -> None:
        """Keep interpolative small factors in full: R² numbers more, and nothing to put together
        at each call; the output keeps every bit."""
        if self.order is not None:
            self.small = nn.Parameter(self.scaled_small.clone(), self.small.requires_grad)
            self.order = None

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W of this group, (m, n), summed in `dtype` (default: that of the factors)."""
        large, small = self.large_factors.to(dtype), self.scaled_small.to(dtype)
        return kron.to_dense(*kron.in_order(large, small, self.layout))

    @property
    def is_plain(self) -> bool:
        """Whether `large` is just its weight: not quantised, adapted, sharded or offloaded."""
        large = self.large
        if not is_plain_linear(large) or is_hooked(large):
            return False
        return large.weight.device == self.small.device

    @property
    def is_weight_only(self) -> bool:
        """Whether `large` is just a quantised weight, of which the numbers can be taken."""
        large: Any = self.large
        return type(large) is nn.Linear and is_weight_only(large.weight) and not is_hooked(large)

    def forms_dense(self, tokens: int) -> bool:
        """Whether W is formed for a batch of so many tokens (`kron.dense_from`).

        Never where `large` is more than a plain layer, with a forward of its own, nor in an
        exported graph, where the number of tokens is not known.
        """
        if products.is_exporting():
            return False
        return tokens > self.dense_from and self.is_plain

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.terms > 1 and self.fused is not None:
            made: Tensor | None = self.fused.run_many(self, x, bias)
            if made is not None:
                return made
        if self.dense_from < math.inf and self.forms_dense(x.numel() // x.shape[-1]):
            return F.linear(x, self.to_dense(), bias)
        return self.factored(x, bias)

    def factored(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias (m,) by the factors, whatever the number of tokens."""
        plain = self.is_plain
        if plain and self.fused is not None:
            made: Tensor | None = self.fused.run(self, x)
            if made is not None:
                return made if bias is None else products.add(made, bias)
        large = self.large.weight if plain else self.large
        shapes = (self.large_shape, self.layout, self.mix_first)
        return products.apply(x, self.scaled_small, large, *shapes, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, (..., n), W not formed."""
        factors = kron.in_order(self.large_factors, self.scaled_small, self.layout)
        return products.rows(ids, *factors)

    def extra_repr(self) -> str:
        large, small = ("x".join(map(str, s)) for s in (self.large_shape, self.small_shape))
        learnable = ", scalars" if self.scalars is not None else ""
        form = ", interpolative" if self.order is not None else ""
        return f"{self.terms} x ({large} by {small}), {self.layout}{learnable}{form}"


class KroneckerLinear(nn.Module):
    """y = x Wᵀ + b with W = Σ_groups Σ_r s_r (B_r ⊗ A_r); drop-in for `nn.Linear` and `Conv1D`.

    One group of one shape is the common case; groups of different shapes add up, for example a
    low-rank group (A (m, 1), B (1, n): R terms are a rank-R matrix) and a Kronecker group.

    Args:
        in_features, out_features: n and m.
        groups: any number of `KroneckerGroup`, each of them m by n.
        bias: whether to hold a bias (m,).
    Attributes:
        keeps_formed: W is kept beside the factors once inference has formed it (`formed`).
    Raises:
        KronyError: no group, or a group whose shapes do not multiply to (m, n).
    """

    fused: Any = None  # see `KroneckerGroup`
    keeps_formed = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: list[KroneckerGroup],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_groups(groups, out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.groups = nn.ModuleList(groups)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:
        """The dense W (m, n), formed anew at each access; writing to it changes nothing.

        It exists because the model code of several families reads `.weight` of its linear layers.
        """
        return self.to_dense()

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense W (m, n), summed in `dtype` (default: that of the factors), differentiable."""
        return _sum_to_dense(self.groups, dtype)

    def formed(self) -> Tensor | None:
        """W (m, n), kept from call to call, or None where the factors are to be used.

        For inference in layers that are to keep it: a sum of many terms takes several times the
        multiply-adds of W, for every token. It is made anew when a factor changes, and left to the
        factors in training, under autograd, tracing or hooks.
        """
        if not self.keeps_formed or self.training:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        kept: Formed | None = self.__dict__.get("_formed")
        if kept is None or not kept.is_of(self) or not kept.unchanged():
            self.__dict__["_formed"] = None  # what it was goes first
            if not can_keep(self):
                return None
            kept = self.__dict__["_formed"] = Formed(self)
        return kept.weight

    def train(self, mode: bool = True) -> "KroneckerLinear":
        if mode:  # no memory for what is not used; .eval() again is no reason to form it again
            self.__dict__.pop("_formed", None)
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.__dict__.pop("_formed", None)  # it is of the dtype and the device that were
        return super()._apply(*arguments, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None:
            made: Tensor | None = self.fused.run_layer(self, x)
            if made is not None:
                return made
        if (weight := self.formed()) is not None:
            y = products.project(x.reshape(-1, self.in_features), weight, self.bias)
            return y.reshape(*x.shape[:-1], self.out_features)
        first, *others = self.groups
        # By name: torch counts FLOPs with hooks that choke on a parameter among the arguments.
        y = first(x, bias=self.bias)
        for group in others:
            y = products.add(y, group(x))
        return y

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"


class KroneckerEmbedding(nn.Module):
    """Rows of W = Σ_groups Σ_r s_r (B_r ⊗ A_r), (V, D), looked up without forming W.

    Args:
        num_embeddings, embedding_dim: V tokens and D.
        groups: any number of `KroneckerGroup`, each of them V by D.
        padding_idx: kept for the way back to `nn.Embedding`; no row has gradients of its own here.
    Raises:
        KronyError: no group, or a group whose shapes do not multiply to (V, D).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        groups: list[KroneckerGroup],
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        _check_groups(groups, num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.groups = nn.ModuleList(groups)

    @property
    def weight(self) -> Tensor:
        """The dense W (V, D), formed anew at each access; writing to it changes nothing."""
        return self.to_dense()

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense W (V, D), summed in `dtype` (default: that of the factors), differentiable."""
        return _sum_to_dense(self.groups, dtype)

    def tied_linear(self) -> KroneckerLinear:
        """The output matrix y = x Wᵀ with the same parameters: one set of them in memory."""
        shared = []
        for mine in self.groups:
            assert isinstance(mine, KroneckerGroup)
            with torch.device("meta"):
                group = KroneckerGroup(
                    mine.large_shape,
                    mine.small_shape,
                    mine.terms,
                    mine.layout,
                    mine.scalars is not None,
                    mine.order is not None,
                )
            # An index, not a weight, which transformers would not tie: it stays out of the file.
            order = None if mine.order is None else mine.order.clone()
            group.register_buffer("order", order, persistent=False)
            group.large.weight, group.small = mine.large.weight, mine.small
            if mine.scalars is not None:
                group.scalars = mine.scalars
            shared.append(group)
        return KroneckerLinear(self.embedding_dim, self.num_embeddings, shared, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        first, *others = self.groups
        y: Tensor = first.rows(ids)  # type: ignore[operator]
        for group in others:
            y = y + group.rows(ids)  # type: ignore[operator]
        return y

    def extra_repr(self) -> str:
        return f"tokens={self.num_embeddings}, model={self.embedding_dim}"


def _check_groups(groups: list[KroneckerGroup], m: int, n: int) -> None:
    if not groups:
        raise KronyError("a factored layer needs at least one group of factors; none given")
    for group in groups:
        (m1, n1), (m2, n2) = group.large_shape, group.small_shape
        if (m1 * m2, n1 * n2) != (m, n):
            raise KronyError(
                f"factors {m1}x{n1} and {m2}x{n2} make a {m1 * m2}x{n1 * n2} matrix, but the "
                f"layer is {m}x{n}; choose factors that divide it"
            )


def _sum_to_dense(groups: nn.ModuleList, dtype: torch.dtype | None) -> Tensor:
    parts: list[Any] = list(groups)
    dense: Tensor = parts[0].to_dense(dtype)
    for group in parts[1:]:
        dense = dense + group.to_dense(dtype)
    return dense
