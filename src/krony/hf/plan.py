"""Plan: which matrix gets which factors. Frozen, JSON both ways, no choices left to apply."""

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.hf.families import Target, find_targets, left_out
from krony.hf.strict import (
    array,
    boolean,
    choice,
    integer,
    mapping,
    number,
    parse_json,
    read_json,
    string,
)
from krony.maths import schemes
from krony.maths.schemes import Factors
from krony.maths.shapes import LAYOUTS, Layout, Shape, check_scalars

MOST_MATRICES, MOST_GROUPS = 100_000, 64


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix (m, n) and the groups of factors whose sum replaces it; none: it stays dense.

    Attributes:
        shape: (m, n) of what replaces it, with the hidden units that stay.
        conv1d: stored transposed, in a transformers `Conv1D`.
        embedding: an input embedding, (tokens, model); its rows are looked up.
        tied: an embedding that is the output matrix too, whose factors both uses share.
        dense_shape: (m, n) before hidden units of its MLP were taken out; None: all are there.
        parts: how many hidden axes its rows are, one below the other (gate and up fused: two).
        scale: what an embedding multiplies its rows by (Gemma's: the root of the width).
    """

    name: str
    shape: Shape
    groups: tuple[Factors, ...]
    scalars: bool = False
    bias: bool = True
    conv1d: bool = False
    embedding: bool = False
    tied: bool = False
    dense_shape: Shape | None = None
    parts: int = 1
    scale: float = 1.0

    @property
    def narrowed(self) -> bool:
        """Whether hidden units of its MLP are taken out."""
        return self.dense_shape is not None

    @property
    def formed(self) -> int:
        """Parameters of W itself, with the hidden units that stay: m·n."""
        return self.shape[0] * self.shape[1]

    @property
    def parameters(self) -> int:
        """Of the factors, learnable scalars included, the bias (which stays) not."""
        if not self.groups:
            return self.formed
        scalars = sum(g.terms for g in self.groups) if self.scalars else 0
        return sum(g.parameters for g in self.groups) + scalars

    @property
    def dense_parameters(self) -> int:
        """m·n of the dense matrix, with all hidden units."""
        m, n = self.dense_shape or self.shape
        return m * n

    @property
    def saved(self) -> int:
        """Parameters that the model has less, biases of the units that are gone included."""
        gone = self.dense_shape[0] - self.shape[0] if self.dense_shape and self.bias else 0
        return self.dense_parameters - self.parameters + gone

    @property
    def keeps_formed(self) -> bool:
        """Whether inference keeps W beside the factors (`KroneckerLinear.formed`): where it takes
        fewer multiply-adds a token, and both take less memory than the dense matrix with all hidden
        units did."""
        if not self.groups or self.embedding:
            return False
        product = sum(g.multiply_adds for g in self.groups)
        return product > self.formed and self.formed + self.parameters <= self.dense_parameters

    @property
    def in_memory(self) -> int:
        """Parameters, and the entries of a W that inference keeps."""
        return self.parameters + (self.formed if self.keeps_formed else 0)

    @property
    def multiply_adds(self) -> int:
        """Per token, factors kept apart unless W is kept."""
        if not self.groups or self.keeps_formed:
            return self.formed_multiply_adds
        product = sum(g.multiply_adds for g in self.groups)
        if not self.embedding:
            return product
        lookup = sum(g.terms for g in self.groups) * self.shape[1]
        return lookup + (product if self.tied else 0)

    @property
    def dense_multiply_adds(self) -> int:
        """Per token with the dense matrix: a lookup alone takes none."""
        return 0 if self.embedding and not self.tied else self.dense_parameters

    @property
    def formed_multiply_adds(self) -> int:
        """Per token with W formed."""
        return 0 if self.embedding and not self.tied else self.formed

    @property
    def reads(self) -> int:
        """Numbers that one token reads: all parameters, W, or the rows that are looked up."""
        if not self.groups or self.keeps_formed:
            return self.shape[1] if self.embedding and not self.tied else self.formed
        if self.embedding and not self.tied:
            return sum(g.terms * (g.large[1] + g.small[1]) for g in self.groups)
        return self.parameters

    @property
    def dense_reads(self) -> int:
        """Parameters of the dense matrix that one token reads."""
        return self.shape[1] if self.embedding and not self.tied else self.dense_parameters

    @property
    def forming(self) -> int:
        """Multiply-adds to form W, once a batch or once for all."""
        return self.formed * sum(g.terms for g in self.groups)

    def check(self) -> None:
        """Raise `KronyError` unless every group multiplies to the matrix."""
        if not self.groups and not self.narrowed:
            raise KronyError(f"{self.name} has no group of factors in the plan; give at least one")
        if self.dense_shape is not None:
            (m, n), (most, wide) = self.shape, self.dense_shape
            if m > most or n > wide or self.parts < 1 or m % self.parts or most % self.parts:
                raise KronyError(
                    f"the plan makes {self.name} {m}x{n} of {most}x{wide} in {self.parts} parts, "
                    "which taking hidden units out can't; make the plan with --budget"
                )
        for group in self.groups:
            group.check()
            check_scalars(self.scalars, group.interpolative)
            if group.shape != tuple(self.shape):
                raise KronyError(
                    f"the plan's factors for {self.name} make {group.shape[0]}x{group.shape[1]}, "
                    f"but the matrix is {self.shape[0]}x{self.shape[1]}; make the plan from this "
                    "model"
                )


@dataclass(frozen=True)
class Plan:
    """What is to be factored, and into which shapes: all that rebuilding the modules needs."""

    matrices: tuple[MatrixPlan, ...]

    @property
    def parameters(self) -> int:
        """Parameters of all factors together."""
        return sum(m.parameters for m in self.matrices)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the same matrices before."""
        return sum(m.dense_parameters for m in self.matrices)

    @property
    def multiply_adds(self) -> int:
        """Per token over all matrices."""
        return sum(m.multiply_adds for m in self.matrices)

    @property
    def dense_multiply_adds(self) -> int:
        """Per token over the same matrices before."""
        return sum(m.dense_multiply_adds for m in self.matrices)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"matrices": [_entry(m) for m in self.matrices]}

    @classmethod
    def from_dict(cls, data: Any) -> "Plan":
        """The inverse of `to_dict`.

        Raises:
            KronyError: data of another form, numbers of another kind, factors that do not make
                their matrix, or more entries than any model has matrices.
        """
        entries = mapping(data, "the plan").get("matrices")
        matrices = tuple(
            _matrix(entry, f"matrix {number} of the plan")
            for number, entry in enumerate(array(entries, "matrices in the plan", MOST_MATRICES))
        )
        names = Counter(matrix.name for matrix in matrices)
        for matrix in matrices:
            if names[matrix.name] > 1:
                raise KronyError(f"the plan has {matrix.name} {names[matrix.name]} times")
            matrix.check()
        return cls(matrices)

    def to_json(self) -> str:
        """Indented JSON, the same bytes for the same plan."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`. Raises `KronyError` for text that is no plan."""
        return cls.from_dict(parse_json(text, "the plan"))

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """The plan in a JSON file. Raises `KronyError` if there is none."""
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except KronyError as error:
            raise KronyError(f"{path} is no plan: {error}; write one with krony plan") from error


def _entry(matrix: MatrixPlan) -> dict[str, Any]:
    """JSON-ready; what says that hidden units are gone only where they are."""
    entry = asdict(matrix)
    if not matrix.narrowed:
        del entry["dense_shape"], entry["parts"]
    if matrix.scale == 1:
        del entry["scale"]
    return entry


def matrix_plan(target: Target, groups: tuple[Factors, ...], scalars: bool = False) -> MatrixPlan:
    """The entry of a plan that gives these factors to that matrix."""
    return MatrixPlan(
        target.name,
        target.shape,
        groups,
        scalars,
        target.bias,
        target.conv1d,
        target.role == "embedding",
        target.tied,
        target.dense_shape,
        target.parts if target.dense_shape else 1,
        target.scale,
    )


def _matrix(data: Any, name: str) -> MatrixPlan:
    """One entry of a plan in JSON. Raises `KronyError` that names what can't be."""
    entry = mapping(data, name)
    known = {field.name for field in fields(MatrixPlan)}
    if unknown := sorted(entry.keys() - known):
        raise KronyError(f"{name} has {unknown[0][:60]!r}, which this krony does not know")
    name = string(entry.get("name"), f"the name of {name}")
    groups = array(entry.get("groups"), f"groups of {name}", MOST_GROUPS)
    dense = entry.get("dense_shape")
    return MatrixPlan(
        name=name,
        shape=_pair(entry.get("shape"), f"the shape of {name}"),
        groups=tuple(_factors(group, name) for group in groups),
        scalars=boolean(entry.get("scalars", False), f"scalars of {name}"),
        bias=boolean(entry.get("bias", True), f"bias of {name}"),
        conv1d=boolean(entry.get("conv1d", False), f"conv1d of {name}"),
        embedding=boolean(entry.get("embedding", False), f"embedding of {name}"),
        tied=boolean(entry.get("tied", False), f"tied of {name}"),
        dense_shape=None if dense is None else _pair(dense, f"the dense shape of {name}"),
        parts=integer(entry.get("parts", 1), f"parts of {name}"),
        scale=number(entry.get("scale", 1.0), f"the scale of {name}"),
    )


def _factors(data: Any, name: str) -> Factors:
    group = mapping(data, f"a group of {name}")
    layout = choice(group.get("layout"), f"the layout of {name}", LAYOUTS)
    return Factors(
        large=_pair(group.get("large"), f"the large factor of {name}"),
        small=_pair(group.get("small"), f"the small factor of {name}"),
        terms=integer(group.get("terms"), f"terms of {name}"),
        layout=cast(Layout, layout),
        interpolative=boolean(group.get("interpolative", False), f"interpolative of {name}"),
    )


def _pair(value: Any, name: str) -> Shape:
    if len(sides := array(value, name, 2)) != 2:
        raise KronyError(f"{name} has {len(sides)} sides, and a matrix has 2")
    return integer(sides[0], name), integer(sides[1], name)


def make_plan(
    model: PreTrainedModel,
    *,
    scheme: str | None = None,
    shape: Shape | None = None,
    small: Shape | None = None,
    terms: int = 1,
    scalars: bool = False,
    layers: Iterable[int] | None = None,
    target: str = "mlp",
    layout: Layout = "small-outer",
) -> Plan:
    """The same factors for every matrix that is selected. The model is only looked at.

    Exactly one of `scheme`, `shape` and `small` says which factors.

    Args:
        scheme: a named model of the paper ("67M" … "96M"), for MLPs of 3072 x 768.
        shape: of the large factor: hidden x model in an MLP (down matrices get the transpose),
            outputs x inputs elsewhere.
        small: of the small factor, in the same order: (2, 2) halves both axes of any matrix.
        terms: the number of Kronecker products that are summed.
        scalars: one learnable scalar per term (Krony-PT, section III-F).
        layers: indices of the blocks to change; None means all.
        target: see `families.find_targets`.
        layout: "small-outer" (fast) or "large-outer" (the paper's order of rows and columns).
    Raises:
        KronyError: shapes that do not divide a matrix, terms beyond the possible rank, layers or
            a target that select nothing.
    """
    if sum(choice is not None for choice in (scheme, shape, small)) != 1:
        raise KronyError("give one of a scheme, a shape or a small shape, and only one")
    chosen = None
    if scheme is not None:
        chosen = schemes.named(scheme)
        shape, terms, scalars = chosen.shape, chosen.terms, scalars or chosen.scalars
    targets = _in_layers(find_targets(model, target), layers)
    matrices = []
    for found in targets:
        if chosen is not None:
            _check_scheme(chosen, found, model)
        small_shape = _small_shape(found, model, shape, small)
        large = schemes.divide(found.shape, small_shape, found.name)
        factors = Factors(large, small_shape, terms, layout)
        try:
            factors.check()
        except KronyError as error:
            raise KronyError(f"{found.name}: {error}") from error
        matrices.append(matrix_plan(found, (factors,), scalars))
    if rest := left_out(model):
        warnings.warn(rest, stacklevel=2)
    return Plan(tuple(matrices))


def parse_shape(text: str | None, option: str) -> Shape | None:
    """(1536, 384) from "1536x384". Raises `KronyError` that names the option."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise KronyError(f"{option} {text!r} is no shape; write two numbers, for example 1536x384")
    return int(parts[0]), int(parts[1])


def parse_layers(text: str | None) -> list[int] | None:
    """[0, 2, 3, 4, 5] from "0,2-5". Raises `KronyError`."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise KronyError(f"--layers {text!r} is no list of layers; write for example 0,2-5")
        found += range(int(first), int(last if dash else first) + 1)
    return found


def _in_layers(targets: list[Target], layers: Iterable[int] | None) -> list[Target]:
    if layers is None:
        return targets
    wanted = set(layers)
    present = {t.layer for t in targets if t.layer is not None}
    missing = sorted(wanted - present)
    if missing or not wanted:
        last = max(present, default=-1)
        raise KronyError(f"there is no layer {missing or 'given'}: layers go from 0 to {last}")
    return [t for t in targets if t.layer in wanted]


def _small_shape(
    target: Target, model: PreTrainedModel, shape: Shape | None, small: Shape | None
) -> Shape:
    """The small factor (m2, n2) of one matrix, from either way of saying it."""
    axes = target.shape
    if target.role in ("up", "down"):
        axes = (target.hidden, model.config.get_text_config().hidden_size)
    if small is None:
        assert shape is not None
        small = schemes.divide(
            axes, shape, f"{target.name} (hidden x model)" if target.hidden else target.name
        )
    return (small[1], small[0]) if target.role == "down" else small


def _check_scheme(scheme: schemes.Scheme, target: Target, model: PreTrainedModel) -> None:
    paper = (schemes.GPT2_HIDDEN, schemes.GPT2_MODEL)
    axes = (target.hidden, model.config.get_text_config().hidden_size)
    if target.hidden and axes == paper:
        return
    small = schemes.divide(paper, scheme.shape)
    m, n = axes if target.hidden else target.shape
    raise KronyError(
        f"scheme {scheme.name} is the paper's, for MLPs of {paper[0]}x{paper[1]}, and "
        f"{target.name} is {m}x{n}; give the small factor {small[0]}x{small[1]} of that scheme "
        f"instead (--small {small[0]}x{small[1]} --terms {scheme.terms})"
    )
