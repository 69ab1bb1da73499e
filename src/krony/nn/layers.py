"""Linear layers and embeddings whose weight is a sum of Kronecker products, by the fastest kernels.

What they compute stands in `krony.runtime.layers`; these ask the kernels first, and have what
compressing and training need.
"""

from typing import Any

import torch
from torch import Tensor, nn

from krony.errors import KronyError
from krony.maths import kron
from krony.maths.shapes import Layout, Shape, check_factors, check_scalars
from krony.nn import dispatch, lower, products
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.formed import formed
from krony.nn.packing import is_weight_only
from krony.runtime import layers as plain
from krony.runtime.layers import is_hooked


def is_adapted(group: plain.KroneckerGroup) -> bool:
    """Whether peft's adapters stand in the place of its large factors."""
    return hasattr(group.large, "base_layer")


class KroneckerGroup(plain.KroneckerGroup):
    """R Kronecker terms of one shape, no bias, as `runtime.layers.KroneckerGroup` describes them.

    A new one has random factors.

    Raises:
        KronyError: sides below 1, terms beyond the possible rank, an unknown layout, or scalars of
            interpolative factors.
    """

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
        check_factors(large, small, terms, layout)
        check_scalars(scalars, interpolative)
        super().__init__(large, small, terms, layout, scalars, interpolative, device, dtype)
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

    def filled(self, order: Tensor) -> Tensor:
        made = cpu_kernels.fill(self.small, order)
        return super().filled(order) if made is None else made

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

    @property
    def is_weight_only(self) -> bool:
        """Whether `large` is just a quantized weight, of which the numbers can be taken."""
        large: Any = self.large
        return type(large) is nn.Linear and is_weight_only(large.weight) and not is_hooked(large)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        lower.forget(self)  # what was made is of the dtype and the device that were
        module: Any = super()
        return module._apply(*arguments, **options)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias (m,), by the kernel that takes it."""
        made = dispatch.run(self, x, bias)
        return super().forward(x, bias) if made is None else made

    def factored(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias (m,) by the factors, whatever the number of tokens."""
        large = self.large.weight if self.is_plain else self.large
        shapes = (self.large_shape, self.layout, self.mix_first)
        return products.apply(x, self.scaled_small, large, *shapes, bias)


class KroneckerLinear(plain.KroneckerLinear):
    """y = x Wᵀ + b, as `runtime.layers.KroneckerLinear` describes it.

    Attributes:
        keeps_formed: W is kept beside the factors once inference has formed it (`formed`).
    Raises:
        KronyError: no group, or a group whose shapes do not multiply to (m, n).
    """

    keeps_formed = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: list[Any],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_groups(groups, out_features, in_features)
        super().__init__(in_features, out_features, groups, bias, device, dtype)

    def formed(self) -> Tensor | None:
        """W (m, n), kept from call to call, or None where the factors are to be used.

        For inference in layers that are to keep it: a sum of many terms takes several times the
        multiply-adds of W, for every token. It is made anew when a factor changes, and left to the
        factors in training, under autograd, tracing or hooks.
        """
        return formed(self)

    def train(self, mode: bool = True) -> "KroneckerLinear":
        if mode:  # no memory for what is not used; .eval() again is no reason to form it again
            lower.forget(self)
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        lower.forget(self)  # it is of the dtype and the device that were
        module: Any = super()
        return module._apply(*arguments, **options)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) to (..., m), by the kernel that takes it."""
        if self.tied:
            _check_unadapted(self.groups)
        made = dispatch.run(self, x)
        return super().forward(x) if made is None else made


class KroneckerEmbedding(plain.KroneckerEmbedding):
    """Rows of W, as `runtime.layers.KroneckerEmbedding` describes them.

    Raises:
        KronyError: no group, or a group whose shapes do not multiply to (V, D).
    """

    output = KroneckerLinear

    def forward(self, ids: Tensor) -> Tensor:
        _check_unadapted(self.groups)
        return super().forward(ids)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        groups: list[Any],
        padding_idx: int | None = None,
    ) -> None:
        _check_groups(groups, num_embeddings, embedding_dim)
        super().__init__(num_embeddings, embedding_dim, groups, padding_idx)


def _check_unadapted(groups: Any) -> None:
    """Raise `KronyError` for adapters that the lookup would leave out, or that, merged on one side
    of tied factors, would change the other."""
    if any(map(is_adapted, groups)):
        raise KronyError(
            "adapters can't be on the factors of an embedding, which are looked up by row, nor on "
            "those of an output matrix tied to it; leave both out of the target modules"
        )


def _check_groups(groups: list[Any], m: int, n: int) -> None:
    if not groups:
        raise KronyError("a factored layer needs at least one group of factors; none given")
    for group in groups:
        (m1, n1), (m2, n2) = group.large_shape, group.small_shape
        if (m1 * m2, n1 * n2) != (m, n):
            raise KronyError(
                f"factors {m1}x{n1} and {m2}x{n2} make a {m1 * m2}x{n1 * n2} matrix, but the "
                f"layer is {m}x{n}; choose factors that divide it"
            )
