"""The design space, and the paper's Tables I to III to the digit."""

import pytest
import torch

from krony.errors import KronyError
from krony.maths import schemes
from krony.maths.kron import to_dense
from krony.maths.schemes import Factors

# Krony-PT (arXiv 2412.12351 v2), Table I: shape of A, parameters of one factored matrix, model.
TABLE_I = [
    ((64, 32), 3_200, 67_893_504),
    ((64, 48), 3_840, 67_908_864),
    ((96, 32), 3_840, 67_908_864),
    ((64, 64), 4_672, 67_928_832),
    ((128, 32), 4_672, 67_928_832),
    ((96, 48), 5_120, 67_939_584),
    ((96, 64), 6_528, 67_973_376),
    ((128, 48), 6_528, 67_973_376),
    ((128, 64), 8_480, 68_020_224),
    ((96, 96), 9_472, 68_044_032),
    ((192, 48), 9_472, 68_044_032),
    ((128, 96), 12_480, 68_116_224),
    ((192, 64), 12_480, 68_116_224),
    ((128, 128), 16_528, 68_213_376),
    ((256, 64), 16_528, 68_213_376),
    ((1024, 256), 262_153, 74_108_376),
    ((768, 384), 294_920, 74_894_784),
    ((1024, 384), 393_222, 77_254_032),
    ((768, 768), 589_828, 81_972_576),
    ((1536, 384), 589_828, 81_972_576),
    ((1024, 768), 786_435, 86_691_144),
    ((1536, 768), 1_179_650, 96_128_304),
    ((3072, 384), 1_179_650, 96_128_304),
    ((3072, 768), 2_359_297, 124_439_832),
]
# Table II: shape, terms, the model in millions as printed.
TABLE_II = [
    ((256, 64), 1, 68.2),
    ((256, 64), 2, 68.6),
    ((256, 64), 3, 69.0),
    ((1024, 256), 1, 74.0),
    ((1024, 256), 2, 80.0),
    ((1024, 256), 3, 86.0),
]


def test_table_one_to_the_digit():
    rows = {shape: row for row in schemes.table_one() for shape in row["shapes"]}
    assert set(rows) == {shape for shape, _, _ in TABLE_I}
    for shape, matrix, model in TABLE_I:
        assert (rows[shape]["matrix"], rows[shape]["model"]) == (matrix, model)
        # Shapes on one line of the table do have one count.
        assert schemes.gpt2_total(shape) == model


def test_table_two():
    rows = {(row["shape"], row["terms"]): row["model"] for row in schemes.table_two()}
    for shape, terms, millions in TABLE_II:
        # The table cuts digits off where it prints whole millions: 86.69 is printed as 86M.
        step = 1.0 if millions == int(millions) else 0.1
        assert millions <= rows[shape, terms] / 1e6 < millions + step


def test_named_models():
    totals = {
        name: schemes.gpt2_total(s.shape, s.terms, s.scalars) for name, s in schemes.SCHEMES.items()
    }
    assert totals["67M"] == 67_893_504
    assert totals["MF2"] == 74_108_376
    assert totals["80M-2"] == 80_400_048
    assert totals["81M"] == 81_972_576
    assert totals["92M-4"] == 92_983_392 + 96  # 96 scalars
    assert totals["96M"] == 96_128_304
    with pytest.raises(KronyError, match="no scheme '82M'; the paper's names are 67M"):
        schemes.named("82M")


@pytest.mark.parametrize(
    ("factors", "rank"),
    [
        (Factors((12, 4), (1, 2)), 4),  # the paper calls this kind rank-preserving; it is not
        (Factors((6, 8), (2, 1)), 6),
        (Factors((6, 4), (2, 2)), 8),
        (Factors((12, 1), (1, 8), terms=3), 3),
        (Factors((3, 2), (4, 4), terms=2), 8),
    ],
)
def test_rank_is_that_of_a_random_sum(factors, rank):
    a = torch.randn(factors.terms, *factors.large, dtype=torch.float64)
    b = torch.randn(factors.terms, *factors.small, dtype=torch.float64)
    assert factors.rank == rank == int(torch.linalg.matrix_rank(to_dense(b, a)))
    assert factors.parameters == a.numel() + b.numel()


def test_design_space_is_complete_and_without_repetition():
    space = schemes.design_space((12, 8))
    products = {(f.large, f.small) for f in space}
    assert len(products) == len(space)
    # Every divisor pair once, as A or as B.
    pairs = {(m, n) for m in (1, 2, 3, 4, 6, 12) for n in (1, 2, 4, 8)}
    assert {f.large for f in space} | {f.small for f in space} == pairs
    assert all(f.shape == (12, 8) for f in space)
    assert [f.parameters for f in space] == sorted(f.parameters for f in space)
    for f in space:
        assert f.large[0] * f.large[1] >= f.small[0] * f.small[1]


def test_design_space_drops_more_terms_than_are_independent():
    assert all(min(f.small[0] * f.small[1], 99) >= 3 for f in schemes.design_space((12, 8), 3))


def test_multiply_adds_of_the_paper_schemes():
    def share(shape, terms):
        factors = Factors(shape, schemes.divide((3072, 768), shape), terms)
        return factors.multiply_adds / (3072 * 768)

    assert share((1536, 384), 1) == pytest.approx(0.50, abs=0.01)
    assert share((768, 768), 1) == pytest.approx(0.25, abs=0.01)
    assert share((1024, 256), 4) == pytest.approx(1.33, abs=0.01)


def test_a_shape_that_does_not_divide_names_the_neighbours():
    with pytest.raises(KronyError, match=r"1500x384 does not divide .*1500 is no divisor of 3072"):
        schemes.divide((3072, 768), (1500, 384))
