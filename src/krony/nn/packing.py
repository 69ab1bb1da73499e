"""Which weights are quantized, and how: the side of it that makes choices.

How they lie in memory and in the file stands in `krony.runtime.quantized`.
"""

import importlib
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from krony.errors import KronyError
from krony.maths.shapes import Shape
from krony.runtime.layers import is_quantized
from krony.runtime.quantized import tensors

FORMS = ("int8", "int8-dynamic", "int4")
GROUP, LEAST_GROUP, MOST_GROUP = 32, 16, 128  # numbers of a row that share a scale, in int4


@dataclass(frozen=True)
class Packed:
    """A quantized linear layer, as `config.json` lists it.

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
class Quantized:
    """What was quantized in a model, and to what; what was left, with the reason."""

    to: str
    matrices: tuple[Packed, ...]
    kept: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Quantized":
        """The inverse of `to_dict`. Raises `KronyError` for data of another form."""
        try:
            matrices = tuple(
                Packed(m["name"], tuple(m["shape"]), m["group"], m["bias"], m["conv1d"])
                for m in data["matrices"]
            )
            found = cls(data["to"], matrices, data["kept"])
        except (KeyError, TypeError) as error:
            raise KronyError(
                f"config.json does not say how the model was quantized ({error!r}); quantize it "
                "again with krony quantize"
            ) from error
        check_form(found.to)
        return found


def check_form(to: str) -> None:
    """Raise `KronyError` for a form that is none of `FORMS`."""
    if to not in FORMS:
        raise KronyError(f"can't quantize to {to!r}; there are {', '.join(FORMS)}")


def group_size(columns: int, to: str) -> int | None:
    """How many numbers of a row share a scale: all of them in int8.

    In int4 the divisor of the columns that is nearest to 32, from 16 to 128; None where there is
    none, and the matrix stays as it is.
    """
    if to != "int4":
        return columns
    fits = [g for g in range(LEAST_GROUP, MOST_GROUP + 1) if columns % g == 0]
    return min(fits, key=lambda g: max(g, GROUP) / min(g, GROUP), default=None)


def is_weight_only(weight: Tensor) -> bool:
    """Whether one of torchao's tensors stands for its numbers, and inputs are left as they are."""
    attributes = ("act_quant_kwargs", "activation_quantization")
    return is_quantized(weight) and all(getattr(weight, a, None) is None for a in attributes)


def torchao() -> Any:
    """torchao.quantization. Raises `KronyError` where it is not installed, or too old."""
    try:
        found = importlib.import_module("torchao.quantization")
        _ = found.Int8Tensor, found.IntxUnpackedToInt8Tensor
    except (ImportError, AttributeError) as error:
        raise KronyError(
            "quantized models need torchao 0.18 or later; install it with pip install "
            "'krony[quantize]'"
        ) from error
    return found


def stored_bytes(weight: Tensor, to: str | None) -> int:
    """Bytes of a weight in the file, quantized to that form or not."""
    if to is None or not is_quantized(weight):
        return weight.numel() * weight.element_size()
    return sum(part.nbytes for part in tensors(weight, to).values())
