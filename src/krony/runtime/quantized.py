"""Quantized weights: torchao's tensors in memory, plain integers and scales in the file.

A part of krony (Apache-2.0) that needs torch, and torchao once a weight is quantized. Directories
that load without krony hold a copy of it.

In the file a quantized linear layer `x` has, in the place of `x.weight` (m, n):
    int8, int8-dynamic    x.qdata int8 (m, n); x.scale float32 (m, 1), one a row
    int4                  x.qdata uint8, two values a byte, row after row; x.scale (m, n / group),
                          in the model's dtype; x.zero uint8, the zero points, two a byte
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def quantize_weight(weight: Tensor, to: str, group: int) -> Tensor:
    """A weight (m, n) as torchao's tensor of that form. Weight-only, but for int8-dynamic."""
    ao: Any = importlib.import_module("torchao.quantization")
    config = {
        "int8": lambda: ao.Int8WeightOnlyConfig(set_inductor_config=False),
        "int8-dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        # The one int4 tensor of torchao that works on every device; the packed ones are tied to
        # a GPU's kernels, or to the vector width of the CPU that packed them.
        "int4": lambda: ao.IntxWeightOnlyConfig(
            torch.int4,  # type: ignore[attr-defined]
            ao.PerGroup(group),
            ao.MappingType.ASYMMETRIC,
        ),
    }[to]()
    with torch.device("meta"):
        holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    # Scales below the epsilon of the weight's dtype are cut there, far too early in half precision.
    holder.weight = nn.Parameter(weight.float() if to == "int4" else weight, requires_grad=False)
    ao.quantize_(holder, config)
    made = holder.weight.detach()
    return made.to(weight.dtype) if to == "int4" else made


def quantized_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An `nn.Linear` around a quantized weight, which never has gradients."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = bias  # type: ignore[assignment]
    return layer


def tensors(weight: Any, to: str) -> dict[str, Tensor]:
    """The plain tensors that the file holds in the place of a quantized weight."""
    if to != "int4":
        return {"qdata": weight.qdata, "scale": weight.scale}
    zero = _pack(weight.zero_point)
    return {"qdata": _pack(weight.qdata), "scale": weight.scale, "zero": zero}


def _pack(values: Tensor) -> Tensor:
    """Values from -8 to 7, two to a byte, in order; a last single one is followed by -8."""
    flat = (values.flatten() + 8).to(torch.uint8)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | flat[1::2] << 4


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_pack`: int8 of that shape."""
    both = torch.stack([packed & 15, packed >> 4], 1).flatten()[: shape.numel()]
    return (both.to(torch.int8) - 8).reshape(shape)


class StoredLinear(nn.Module):
    """Stands for a quantized linear layer while a model loads: the tensors of the file.

    Buffers as the head of this file lists them, and `bias` (m,).
    """

    def __init__(
        self, entry: dict[str, Any], to: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        m, n = entry["shape"]
        self.shape, self.group, self.to_form, self.dtype = (m, n), entry["group"], to, dtype
        sizes: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if to == "int4":
            groups = n // self.group
            half = (m * n + 1) // 2, (m * groups + 1) // 2
            sizes = {
                "qdata": ((half[0],), torch.uint8),
                "scale": ((m, groups), dtype),
                "zero": ((half[1],), torch.uint8),
            }
        else:
            sizes = {"qdata": ((m, n), torch.int8), "scale": ((m, 1), torch.float32)}
        for name, (size, kind) in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device))
        bias = torch.empty(m, dtype=dtype, device=device) if entry["bias"] else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @property
    def weight(self) -> Tensor:
        """Nothing, in the weight's shape: initialization code of GPT-2 writes to it."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def restored(self) -> nn.Linear:
        """The linear layer with torchao's weight."""
        parts: dict[str, Any] = dict(self.named_buffers())
        blank = torch.zeros(self.shape, dtype=self.dtype, device=parts["qdata"].device)
        # torchao itself makes the tensor, with whatever else it holds; only the numbers are ours.
        weight: Any = quantize_weight(blank, self.to_form, self.group)
        if self.to_form == "int4":
            weight.qdata = _unpack(parts["qdata"], weight.qdata.shape)
            weight.zero_point = _unpack(parts["zero"], weight.zero_point.shape)
        else:
            weight.qdata = parts["qdata"]
        weight.scale = parts["scale"]
        return quantized_linear(weight, self.bias)  # type: ignore[arg-type]
