"""What a layer multiplies by, in one description for all kernels.

It holds tensors and shapes, no modules: whatever a kernel needs besides, it makes of that. `keep`
and `keep_mlp` make it of a layer or an MLP, once, and keep it with what kernels made of it, until a
factor changes (`watched.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from krony.nn import tensor_rank
from krony.nn.activations import kind_of
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.products import mixing
from krony.nn.watched import Watched
from krony.runtime import layers as plain
from krony.runtime import products
from krony.runtime.layers import is_hooked, is_plain_linear
from krony.runtime.products import Layout, Shape

PLAIN = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Parts:
    """The names of an MLP's children.

    Attributes:
        ups: the matrix that writes the hidden axis, or gate and up. One that writes twice the axis
            that `down` reads is both, the gate first.
        activation: the module. kind: which of cpu/kernels.py's.
    """

    ups: tuple[str, ...]
    activation: str
    down: str
    kind: int


@dataclass(frozen=True, eq=False)
class LoweredGroup:
    """Σ_r s_r (B_r ⊗ A_r), or Σ_r s_r (A_r ⊗ B_r), or a matrix that is not factored: one term
    without a small factor.

    Attributes:
        weight: A as `kron.large_to_linear` lays it out: (m1, R·n1) where the small factor is mixed
            in first, else (R·m1, n1). With `by_columns` (n1, m1), as in a `Conv1D`.
        large_shape, small_shape: (m1, n1) and (m2, n2).
        small, scalars, order: as a `KroneckerGroup` holds them, or None.
        dense_from: tokens from which forming W costs less than the factors.
    """

    weight: Tensor
    large_shape: Shape
    small_shape: Shape = (1, 1)
    terms: int = 1
    layout: Layout = "small-outer"
    mix_first: bool = True
    small: Tensor | None = None
    scalars: Tensor | None = None
    order: Tensor | None = None
    by_columns: bool = False
    dense_from: float = float("inf")

    @property
    def slices(self) -> int:
        """Of a token, each a row that meets the large factor."""
        return self.small_shape[0] if self.mix_first else self.small_shape[1]

    @property
    def is_low_rank(self) -> bool:
        """Whether the "small" factors, a row a term, are a matrix like the large one."""
        return self.small is not None and self.mix_first and self.large_shape[1] == 1 == self.slices

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held = (self.weight, self.small, self.scalars, self.order)
        return [tensor for tensor in held if tensor is not None]

    def full_small(self) -> Tensor:
        """B (R, m2, n2) in full, scalars multiplied in; differentiable."""
        assert self.small is not None
        if self.order is not None:
            full = cpu_kernels.fill(self.small, self.order)
            full = products.fill(self.small, self.order) if full is None else full
            unfolded: Tensor = full.unflatten(1, self.small_shape)
            return unfolded
        return self.small if self.scalars is None else self.small * self.scalars[:, None, None]

    def mixing(self) -> Tensor:
        """That as one matrix, for `products.mix`."""
        return mixing(self.full_small(), self.mix_first)

    @property
    def decomposition(self) -> tensor_rank.Decomposition | None:
        """That of the small factors, found when first asked for, or None where it saves nothing.

        By the numbers: those made in inference mode do not count their changes.
        """
        small, known = self.full_small(), self.__dict__.get("_decomposition")
        if known is None or not torch.equal(known[0], small):
            found = tensor_rank.decompose(small)
            known = small.clone(), None if found is None else found.to(self.weight.dtype)
            self.__dict__["_decomposition"] = known
        result: tensor_rank.Decomposition | None = known[1]
        return result

    def to_dense(self) -> Tensor:
        """W (m, n)."""
        if self.small is None:
            return self.weight.T if self.by_columns else self.weight
        large = products.linear_to_large(self.weight, self.terms, self.mix_first)
        return products.to_dense(*products.in_order(large, self.full_small(), self.layout))


@dataclass(frozen=True, eq=False)
class Lowered:
    """y = x Wᵀ + bias (m,), W a sum of `groups`.

    Attributes:
        formed: whether the one group is W itself, kept in the place of the factors.
        counted: whether all of its tensors count the changes of their numbers.
        memo: what was made of it (`once`).
    """

    groups: tuple[LoweredGroup, ...]
    bias: Tensor | None = None
    formed: bool = False
    counted: bool = False
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def matrices(self) -> "tuple[Lowered, ...]":
        """Itself, as an MLP has several."""
        return (self,)

    @cached_property
    def shape(self) -> Shape:
        """(m, n)."""
        (m1, n1), (m2, n2) = self.groups[0].large_shape, self.groups[0].small_shape
        return m1 * m2, n1 * n2

    @property
    def is_dense(self) -> bool:
        """Whether it is one matrix that is not factored."""
        return len(self.groups) == 1 and self.groups[0].small is None

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held = [tensor for group in self.groups for tensor in group.tensors]
        return held if self.bias is None else [*held, self.bias]


@dataclass(frozen=True, eq=False)
class LoweredMLP:
    """down(activation(first of `ups`)), times what the second of `ups` makes where there is one.

    One that writes twice the axis that `down` reads is both, the first half the one that is
    activated.

    Attributes:
        kind: of the activation, as cpu/kernels.py numbers them.
        counted, memo: those of `Lowered`.
    """

    ups: tuple[Lowered, ...]
    kind: int
    down: Lowered
    counted: bool = False
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def matrices(self) -> tuple[Lowered, ...]:
        """Those that write the hidden axis, then the one that reads it."""
        return (*self.ups, self.down)

    @property
    def tensors(self) -> list[Tensor]:
        """All that they hold."""
        return [tensor for matrix in self.matrices for tensor in matrix.tensors]


def once(
    lowered: Lowered | LoweredMLP, name: str, make: Callable[[Any], Any], copies: bool = True
) -> Any:
    """What `make` makes of it, once, if that can be kept: numbers may only be copied (`copies`) of
    tensors that count their changes."""
    if copies and not lowered.counted:
        return make(lowered)
    if name not in lowered.memo:
        lowered.memo[name] = make(lowered)
    return lowered.memo[name]


def stray(lowered: Lowered | LoweredMLP, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why inputs of that dtype and device can't meet all of the numbers as they are, or None."""
    for tensor in lowered.tensors:
        if tensor.dtype != dtype and tensor.is_floating_point():
            return f"its numbers are not all in the inputs' {str(dtype).removeprefix('torch.')}"
        if tensor.device != device:
            return "its numbers are not all where the inputs are"
    return None


class NotPlainError(Exception):
    """Why a layer is more than factors, or a weight, and a bias."""


class Kept(Watched):
    """A layer or an MLP, lowered, with what kernels made of it, until something of it changes.

    Attributes:
        owner: the module's dictionary of children: a replica on another device starts with its
            attributes.
        lowered: None where it is not plain, and `why` then.
        choices: what `dispatch` chose for a request, under the `switches.version` of then.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner: Any = owner._modules
        self.why: str | None = None
        self.lowered: Any = None
        self.version = -1
        self.choices: dict[Any, Any] = {}
        self._formed: list[tuple[Any, Tensor | None]] = []
        self._users: WeakSet[Kept] = WeakSet()

    def include(self, other: "Kept") -> None:  # type: ignore[override]
        """All that another one depends on, and to be dropped with it."""
        super().include(other)
        self._formed += other._formed
        other._users.add(self)

    def drop(self) -> None:
        """Let go of what was made, here and where it was included."""
        self.owner = self.lowered = None
        self.choices, self._formed = {}, []
        for user in self._users:
            user.drop()

    def formed(self, layer: Any) -> Tensor | None:
        """The W that a layer keeps, or None, which is to stay so."""
        weight: Tensor | None = layer.formed()
        self._formed.append((layer, weight))
        return weight

    def unchanged(self) -> bool:
        for layer, weight in self._formed:
            if (layer.keeps_formed or weight is not None) and layer.formed() is not weight:
                return False
        return super().unchanged()


class Once:
    """In the place of `Kept` where nothing is to be kept: in a graph that is being traced."""

    counted = False

    def child(self, module: nn.Module, name: str) -> Any:
        """The child of that name."""
        return module._modules[name]

    def tensor(self, module: nn.Module, name: str) -> Tensor | None:
        """The parameter or buffer of that name."""
        if name in module._buffers:
            return module._buffers[name]
        return module._parameters.get(name)

    def weight(self, module: nn.Module) -> Tensor | None:
        """Its weight."""
        return self.tensor(module, "weight")

    def formed(self, layer: Any) -> Tensor | None:
        """None: nothing says in a graph that a factor has changed."""
        return None


def lower(layer: nn.Module) -> Lowered | None:
    """What a layer multiplies by, or None where something else than its numbers makes the product
    (hooks, adapters, quantized weights, offloading).

    Args:
        layer: a `KroneckerLinear` (with W where it keeps that, and may use it now), a
            `KroneckerGroup`, an `nn.Linear` or a `Conv1D`.
    """
    found: Lowered | None = keep(layer).lowered
    return found


def keep(layer: nn.Module) -> Kept:
    """A layer, lowered, as it was at the last call or anew."""
    kept: Kept | None = layer.__dict__.get("_kept")
    if kept is None or kept.owner is not layer._modules or not kept.unchanged():
        layer.__dict__["_kept"] = None  # what it was goes first
        kept = layer.__dict__["_kept"] = _made(layer, of_layer)
    return kept


def keep_mlp(mlp: nn.Module, parts: Parts) -> Kept:
    """The same for an MLP: `LoweredMLP`."""
    kept: Kept | None = mlp.__dict__.get("_kept")
    if kept is None or kept.owner is not mlp._modules or not kept.unchanged():
        mlp.__dict__["_kept"] = None
        kept = mlp.__dict__["_kept"] = _made(mlp, of_mlp, parts)
    return kept


def forget(module: nn.Module) -> None:
    """Drop what is kept of a layer or an MLP, and with it the memory that it takes."""
    module.__dict__.pop("_formed", None)
    kept: Kept | None = module.__dict__.pop("_kept", None)
    if kept is not None:
        kept.drop()


def _made(owner: nn.Module, make: Callable[..., Any], *arguments: Any) -> Kept:
    kept = Kept(owner)
    try:
        kept.lowered = make(kept, owner, *arguments)
    except NotPlainError as reason:
        kept.why = str(reason)
        if kept.hooked:  # which may end without a trace
            kept.owner = None
    return kept


def of_mlp(watch: Kept | Once, mlp: nn.Module, parts: Parts) -> LoweredMLP:
    """An MLP, lowered. Raises `NotPlainError`."""
    for name in mlp._modules:
        child = watch.child(mlp, name)
        if child is not None and is_hooked(child):
            raise NotPlainError(f"something hooks into its {name}")
    if kind_of(mlp._modules[parts.activation]) != parts.kind:
        raise NotPlainError("its activation is another one than it was")
    found = []
    for name in (*parts.ups, parts.down):
        layer: Any = mlp._modules[name]
        if isinstance(watch, Kept) and isinstance(layer, plain.KroneckerLinear):
            kept = keep(layer)
            watch.include(kept)
            if kept.lowered is None:
                raise NotPlainError(f"{name}: {kept.why}")
            found.append(kept.lowered)
        else:
            found.append(of_layer(watch, layer))
    (*ups, down) = found
    return LoweredMLP(tuple(ups), parts.kind, down, watch.counted)


def of_layer(watch: Kept | Once, layer: Any) -> Lowered:
    """A layer, lowered. Raises `NotPlainError`."""
    if isinstance(layer, plain.KroneckerGroup):
        return Lowered((_group(watch, layer),), counted=watch.counted)
    bias = watch.tensor(layer, "bias")
    if not isinstance(layer, plain.KroneckerLinear):
        weight = watch.weight(layer)
        if not is_plain_linear(layer, PLAIN) or weight is None:
            raise NotPlainError(f"it is a {type(layer).__name__}, or adapted or sharded")
        return Lowered((_whole(weight, isinstance(layer, Conv1D)),), bias, counted=watch.counted)
    if (formed := watch.formed(layer)) is not None:
        return Lowered((_whole(formed),), bias, True, watch.counted)
    held, groups = watch.child(layer, "groups"), []
    for name in held._modules:
        group = watch.child(held, name)
        if is_hooked(group):
            raise NotPlainError(f"something hooks into its group {name}")
        if isinstance(watch, Kept):
            kept = keep(group)
            watch.include(kept)
            if kept.lowered is None:
                raise NotPlainError(str(kept.why))
            groups += kept.lowered.groups
        else:
            groups.append(_group(watch, group))
    return Lowered(tuple(groups), bias, counted=watch.counted)


def _group(watch: Kept | Once, group: Any) -> LoweredGroup:
    large = watch.child(group, "large")
    weight = watch.weight(large)
    if not group.is_plain or weight is None:
        raise NotPlainError(
            "a large factor is more than its numbers (quantized, adapted, sharded, …)"
        )
    small, scalars, order = (watch.tensor(group, name) for name in ("small", "scalars", "order"))
    return LoweredGroup(
        weight, group.large_shape, group.small_shape, group.terms, group.layout, group.mix_first,
        small, scalars, order, dense_from=group.dense_from,
    )  # fmt: skip


def _whole(weight: Tensor, by_columns: bool = False) -> LoweredGroup:
    """A matrix that is not factored: (m, n), or (n, m) by columns."""
    (m, n) = weight.shape[::-1] if by_columns else weight.shape
    return LoweredGroup(weight, (m, n), by_columns=by_columns)
