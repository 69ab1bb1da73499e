"""The design space of Kronecker factorizations: shapes, rank, parameters, multiply-adds.

Also the paper's tables and named models, counted anew (Krony-PT, arXiv 2412.12351, Tables I to
III). Shapes are written hidden x model, as there: (1536, 384) is the shape of A in c_fc; c_proj
has its transpose.
"""

from dataclasses import asdict, dataclass
from typing import Any

from krony.errors import KronyError
from krony.maths.shapes import Layout, Shape, check_factors


@dataclass(frozen=True)
class Factors:
    """The shapes of one group of terms in one matrix: R terms of A (m1, n1) and B (m2, n2).

    Attributes:
        interpolative: stored without the R² numbers that say nothing (`kron.interpolate`).
    """

    large: Shape
    small: Shape
    terms: int = 1
    layout: Layout = "small-outer"
    interpolative: bool = False

    @property
    def shape(self) -> Shape:
        """(m, n) of the product."""
        return self.large[0] * self.small[0], self.large[1] * self.small[1]

    @property
    def sides(self) -> tuple[Shape, Shape]:
        """The shapes of the (outer, inner) factors."""
        small_outer = self.layout == "small-outer"
        return (self.small, self.large) if small_outer else (self.large, self.small)

    @property
    def parameters(self) -> int:
        """R·(m1·n1 + m2·n2), less R² in interpolative form."""
        (m1, n1), (m2, n2) = self.large, self.small
        fixed = self.terms if self.interpolative else 0
        return self.terms * (m1 * n1 + m2 * n2 - fixed)

    @property
    def rank(self) -> int:
        """The largest rank that the sum can have: rank(A ⊗ B) = rank A · rank B, times R."""
        one = min(self.large) * min(self.small)
        return min(self.terms * one, *self.shape)

    @property
    def multiply_adds(self) -> int:
        """Per token, in the cheaper of the two contraction orders, W not formed."""
        (m1, n1), (m2, n2) = self.large, self.small
        return self.terms * min(m2 * n1 * (n2 + m1), n2 * m1 * (n1 + m2))

    def check(self) -> None:
        """Raise `KronyError` for a side below 1, too many terms, or an unknown layout."""
        check_factors(self.large, self.small, self.terms, self.layout)


def divide(shape: Shape, large: Shape, what: str = "the matrix") -> Shape:
    """The small factor's shape: `shape` over `large`, side by side.

    Raises:
        KronyError: a side that does not divide, naming the divisors around it.
    """
    for side, part in zip(shape, large, strict=True):
        if part < 1 or side % part:
            choices = divisors(side)
            near = [d for d in choices if d < part][-2:] + [d for d in choices if d > part][:2]
            raise KronyError(
                f"{large[0]}x{large[1]} does not divide {what} of {shape[0]}x{shape[1]}: {part} is "
                f"no divisor of {side}; the nearest are {', '.join(map(str, near))}"
            )
    return shape[0] // large[0], shape[1] // large[1]


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def design_space(shape: Shape, terms: int = 1) -> list[Factors]:
    """Every way to write a matrix of `shape` as `terms` Kronecker products, smallest first.

    A ⊗ B and B ⊗ A of exchanged shapes are the same up to a reordering, so the larger factor is
    listed as A; ties go to the taller one.
    """
    found = []
    for m1 in divisors(shape[0]):
        for n1 in divisors(shape[1]):
            large, small = (m1, n1), (shape[0] // m1, shape[1] // n1)
            if (m1 * n1, m1) < (small[0] * small[1], small[0]):
                continue
            if terms <= small[0] * small[1]:
                found.append(Factors(large, small, terms))
    return sorted(found, key=lambda f: (f.parameters, -f.rank, f.large))


@dataclass(frozen=True)
class Scheme:
    """A named model of the paper: one shape in both MLP matrices of all 12 blocks of GPT-2."""

    name: str
    shape: Shape
    terms: int = 1
    scalars: bool = False
    note: str = ""


GPT2_HIDDEN, GPT2_MODEL, GPT2_BLOCKS = 3072, 768, 12
GPT2_PARAMETERS = 124_439_808  # the output matrix is tied to the embedding and counted once

# Counted here; where the paper says otherwise, the note says so.
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("67M", (64, 32)),
        Scheme("MF1", (256, 64), note="Table I has (128, 128), Table II (256, 64): same count"),
        Scheme("MF2", (1024, 256)),
        Scheme("80M-2", (1024, 256), terms=2),
        Scheme("81M", (1536, 384), note="Table I lists (768, 768) beside it: same count"),
        Scheme("92M-4", (1024, 256), terms=4, scalars=True, note="the text says 92.2M"),
        Scheme("96M", (1536, 768), note="the text uses (3072, 384): same count, half the rank"),
    )
}
"""The paper's models by name: one shape for all MLP matrices of GPT-2 small."""

TABLE_I: tuple[tuple[str, tuple[Shape, ...]], ...] = (
    ("67M", ((64, 32),)),
    ("", ((64, 48), (96, 32))),
    ("", ((64, 64), (128, 32))),
    ("", ((96, 48),)),
    ("", ((96, 64), (128, 48))),
    ("68M", ((128, 64),)),
    ("", ((96, 96), (192, 48))),
    ("", ((128, 96), (192, 64))),
    ("MF1", ((128, 128), (256, 64))),
    ("MF2", ((1024, 256),)),
    ("", ((768, 384),)),
    ("", ((1024, 384),)),
    ("81M", ((768, 768), (1536, 384))),
    ("", ((1024, 768),)),
    ("96M", ((1536, 768), (3072, 384))),
    ("GPT-2", ((3072, 768),)),
)
TABLE_II: tuple[tuple[Shape, tuple[int, ...]], ...] = (
    ((256, 64), (1, 2, 3)),
    ((1024, 256), (1, 2, 3, 4)),
)


def gpt2_total(shape: Shape, terms: int = 1, scalars: bool = False) -> int:
    """Parameters of GPT-2 small with both MLP matrices of every block factored this way."""
    matrix = GPT2_HIDDEN * GPT2_MODEL
    factors = Factors(shape, divide((GPT2_HIDDEN, GPT2_MODEL), shape), terms)
    factored = factors.parameters + (terms if scalars else 0)
    return GPT2_PARAMETERS + 2 * GPT2_BLOCKS * (factored - matrix)


def table_one() -> list[dict[str, Any]]:
    """The paper's Table I: name, shapes of A, parameters of a factored matrix, of the model."""
    rows = []
    for name, shapes in TABLE_I:
        small = divide((GPT2_HIDDEN, GPT2_MODEL), shapes[0])
        matrix = Factors(shapes[0], small).parameters
        rows.append(
            {"name": name, "shapes": shapes, "matrix": matrix, "model": gpt2_total(shapes[0])}
        )
    return rows


def table_two() -> list[dict[str, Any]]:
    """The paper's Table II: the model's parameters for several terms of one shape."""
    return [
        {"shape": shape, "terms": terms, "model": gpt2_total(shape, terms)}
        for shape, counts in TABLE_II
        for terms in counts
    ]


def named(name: str) -> Scheme:
    """The paper's scheme of that name. Raises `KronyError` that lists the names."""
    if name not in SCHEMES:
        raise KronyError(f"no scheme {name!r}; the paper's names are {', '.join(SCHEMES)}")
    return SCHEMES[name]


def describe(factors: Factors) -> dict[str, Any]:
    """The figures of one point of the design space, ready for JSON."""
    m, n = factors.shape
    return {
        **asdict(factors),
        "rank": factors.rank,
        "full_rank": factors.rank == min(m, n),
        "parameters": factors.parameters,
        "share": factors.parameters / (m * n),
        "multiply_adds": factors.multiply_adds,
    }
