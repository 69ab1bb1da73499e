"""Quantised weights: torchao's tensors in memory, plain integers and scales in the file.

In the file a quantised linear layer `x` has, in the place of `x.weight` (m, n):
    int8, int8-dynamic    x.qdata int8 (m, n); x.scale float32 (m, 1), one a row
    int4                  x.qdata uint8, two values a byte, row after row; x.scale (m, n / group),
                          in the model's dtype; x.zero uint8, the zero points, two a byte
"""

import importlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from krony.errors import KronyError
from krony.maths.kron import Shape

FORMS = ("int8", "int8-dynamic", "int4")
GROUP, LEAST_GROUP, MOST_GROUP = 32, 16, 128  # numbers of a row that share a scale, in int4


@dataclass(frozen=True)
class Packed:
    """A quantised linear layer, as `config.json` lists it.

    Attributes:
        name: its module's name in the model.
        shape: (m, n) of its weight.
        group: how many numbers of a row share a scale.
        bias: whether it has a bias.
        conv1d: the architecture has a transformers `Conv1D` there, for the way back.
    """

    name: str
    shape: Shape
    group: int
    bias: bool = False
    conv1d: bool = False


@dataclass(frozen=True)
class Quantised:
    """What was quantised in a model, and to what; what was left, with the reason."""

    to: str
    matrices: tuple[Packed, ...]
    kept: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Quantised":
        """The inverse of `to_dict`. Raises `KronyError` for data of another form."""
        try:
            matrices = tuple(
                Packed(m["name"], tuple(m["shape"]), m["group"], m["bias"], m["conv1d"])
                for m in data["matrices"]
            )
            found = cls(data["to"], matrices, data["kept"])
        except (KeyError, TypeError) as error:
            raise KronyError(
                f"config.json does not say how the model was quantised ({error!r}); quantise it "
                "again with krony quantize"
            ) from error
        check_form(found.to)
        return found


def check_form(to: str) -> None:
    """Raise `KronyError` for a form that is none of `FORMS`."""
    if to not in FORMS:
        raise KronyError(f"can't quantise to {to!r}; there are {', '.join(FORMS)}")


def group_size(columns: int, to: str) -> int | None:
    """How many numbers of a row share a scale: all of them in int8.

    In int4 the divisor of the columns that is nearest to 32, from 16 to 128; None where there is
    none, and the matrix stays as it is.
    """
    if to != "int4":
        return columns
    fits = [g for g in range(LEAST_GROUP, MOST_GROUP + 1) if columns % g == 0]
    return min(fits, key=lambda g: max(g, GROUP) / min(g, GROUP), default=None)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is one of torchao's tensors."""
    if type(weight) in (nn.Parameter, Tensor):  # the common case; torch.compile traces no more
        return False
    return type(weight).__module__.partition(".")[0] == "torchao"


def is_weight_only(weight: Tensor) -> bool:
    """Whether one of torchao's tensors stands for its numbers, and inputs are left as they are."""
    attributes = ("act_quant_kwargs", "activation_quantization")
    return is_quantised(weight) and all(getattr(weight, a, None) is None for a in attributes)


def torchao() -> Any:
    """torchao.quantization. Raises `KronyError` where it is not installed, or too old."""
    try:
        found = importlib.import_module("torchao.quantization")
        _ = found.Int8Tensor, found.IntxUnpackedToInt8Tensor
    except (ImportError, AttributeError) as error:
        raise KronyError(
            "quantised models need torchao 0.18 or later; install it with pip install "
            "'krony[quantize]'"
        ) from error
    return found


@torch.no_grad()
def quantise_weight(weight: Tensor, to: str, group: int) -> Tensor:
    """A weight (m, n) as torchao's tensor of that form. Weight-only, but for int8-dynamic."""
    ao = torchao()
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


def tensors(weight: Any, to: str) -> dict[str, Tensor]:
    """The plain tensors that the file holds in the place of a quantised weight."""
    if to != "int4":
        return {"qdata": weight.qdata, "scale": weight.scale}
    zero = _pack(weight.zero_point)
    return {"qdata": _pack(weight.qdata), "scale": weight.scale, "zero": zero}


def stored_bytes(weight: Tensor, to: str | None) -> int:
    """Bytes of a weight in the file, quantised to that form or not."""
    if to is None or not is_quantised(weight):
        return weight.numel() * weight.element_size()
    return sum(part.nbytes for part in tensors(weight, to).values())


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
    """Stands for a quantised linear layer while a model loads: the tensors of the file.

    Buffers as the head of this file lists them, and `bias` (m,).
    """

    def __init__(self, packed: Packed, to: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        (m, n), self.to_form, self.dtype, self.packed = packed.shape, to, dtype, packed
        sizes: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if to == "int4":
            groups = n // packed.group
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
        bias = nn.Parameter(torch.empty(m, dtype=dtype, device=device)) if packed.bias else None
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """Nothing, in the weight's shape: initialisation code of GPT-2 writes to it."""
        return torch.empty(self.packed.shape, dtype=self.dtype, device="meta")

    def restored(self) -> nn.Linear:
        """The linear layer with torchao's weight."""
        parts: dict[str, Any] = dict(self.named_buffers())
        blank = torch.zeros(self.packed.shape, dtype=self.dtype, device=parts["qdata"].device)
        # torchao itself makes the tensor, with whatever else it holds; only the numbers are ours.
        weight: Any = quantise_weight(blank, self.to_form, self.packed.group)
        if self.to_form == "int4":
            weight.qdata = _unpack(parts["qdata"], weight.qdata.shape)
            weight.zero_point = _unpack(parts["zero"], weight.zero_point.shape)
        else:
            weight.qdata = parts["qdata"]
        weight.scale = parts["scale"]
        return linear(weight, self.bias)  # type: ignore[arg-type]


def linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An `nn.Linear` around a quantised weight, which never has gradients."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = bias  # type: ignore[assignment]
    return layer
