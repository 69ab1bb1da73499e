"""tiles.c against float64: MLPs in bfloat16 on a CPU with a tile unit."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.cpu import tiles as cpu_tiles
from krony.nn.cpu.tiles import Input, Matrix, Product, Tiles

pytestmark = pytest.mark.skipif(not cpu_kernels.has_tiles(), reason="needs a tile unit")


@dataclass(frozen=True)
class Shape:
    """Slices and sides; where a mixing is None, its slices stay."""

    given: tuple[int, int]  # slices of the inputs, features of each
    k: int  # that a product takes of them
    m: int
    weights: int = 1
    inner: int | None = None  # slices that the inputs are mixed to
    hidden: int | None = None  # that the products' are mixed to
    read: int | None = None  # that the hidden ones are mixed to
    k2: int | None = None  # of the product that reads them; None: m
    m2: int = 64
    weights2: int = 1
    outer: int | None = None


SHAPES = {
    "one slice": Shape((1, 64), 64, 64),
    "mixed between": Shape((1, 96), 96, 96, hidden=4, read=1),
    "mixed at both ends": Shape((2, 64), 64, 128, hidden=2, read=2, outer=2),
    "terms": Shape((3, 32), 64, 64, inner=6, hidden=3, weights2=2, outer=3),
    "more weights than slices": Shape((2, 32), 32, 96, weights=3, hidden=2, read=5),
    "slices anew": Shape((1, 64), 64, 192, k2=96),
    "edges": Shape((1, 70), 70, 50, hidden=2, read=1, m2=38),
    "wide": Shape((1, 512), 512, 1024, m2=512),
}
ACTIVATIONS = {
    cpu_kernels.NONE: lambda x: x,
    cpu_kernels.SILU: F.silu,
    cpu_kernels.TANH_GELU: lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def table(rows, columns):
    return None if rows is None else torch.randn(rows, columns).bfloat16()


def matrix(weights, m, k, features, mixed, bias):
    product = Product((torch.randn(weights, m, k) * k**-0.5).bfloat16(), features)
    mixing = table(mixed, product.slices)
    made = Matrix(product, mixing)
    return replace(made, bias=table(made.outs, m)) if bias else made


def made(name, tokens, inputs=1, ups=1, bias=True):
    """Inputs x, and what `Tiles` takes but for the activation."""
    of = SHAPES[name]
    xs = [torch.randn(tokens, *of.given).bfloat16() for _ in range(inputs)]
    given = [Input(*of.given, table(of.inner, of.given[0])) for _ in xs]
    features = given[0].features
    writing = [matrix(of.weights, of.m, of.k, features, of.hidden, bias) for _ in range(ups)]
    mixing = table(of.read, writing[0].outs)
    hidden = (of.read or writing[0].outs) * of.m
    reading = matrix(of.weights2, of.m2, of.k2 or of.m, hidden, of.outer, bias)
    return xs, given, writing, mixing, reading


def mixed(mixing, x):
    """Slices x (T, q, k), in float64."""
    return x if mixing is None else torch.einsum("ij,tjk->tik", mixing.double(), x)


def applied(of, x):
    """A `Matrix` to x (T, ...): (T, outs, m)."""
    w = of.product.weight.double()
    x = x.flatten(1).unflatten(1, (-1, w.shape[2]))
    y = mixed(of.mixing, torch.einsum("tsk,wmk->tswm", x, w).flatten(1, 2))
    return y if of.bias is None else y + of.bias.double()


def oracle(xs, inputs, ups, kind, mixing, down, enters=(), between=None):
    entered = [mixed(i.mixing, x.double()) for i, x in zip(inputs, xs, strict=True)]
    reads = entered * (len(ups) // len(entered))
    if enters:
        reads = [applied(half, x) for half, x in zip(enters, reads, strict=True)]
    gate, *other = (applied(up, x) for up, x in zip(ups, reads, strict=True))
    hidden = ACTIVATIONS[kind](gate)
    for factor in other:
        hidden = hidden * factor
    hidden = mixed(mixing, hidden)
    return applied(down, hidden if between is None else applied(between, hidden))


THREADS = (1, 2, 3)


@pytest.mark.parametrize("tokens", [9, 32, 45, 130])
@pytest.mark.parametrize(("inputs", "ups"), [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_mlp(name, inputs, ups, tokens):
    parts = made(name, tokens, inputs, ups, bias=tokens != 45)
    # The pairs that have code of their own, and others.
    kind = cpu_kernels.NONE if tokens == 130 else (cpu_kernels.TANH_GELU, cpu_kernels.SILU)[ups - 1]
    xs, given, writing, mixing, reading = parts
    wanted = oracle(xs, given, writing, kind, mixing, reading)
    tiles = Tiles(given, writing, kind, mixing, reading)
    assert tiles.fits
    for threads in THREADS:
        torch.set_num_threads(threads)
        found = tiles.run(xs)
        assert found.shape == wanted.shape
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() / wanted.norm() < 5e-3


@pytest.mark.parametrize("tokens", [9, 45, 130])
@pytest.mark.parametrize(("inputs", "ups"), [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("halves", ["both", "enters", "between"])
def test_low_rank_at_both_ends(halves, inputs, ups, tokens):
    n, first, hidden, second, m = 96, 40, 100, 38, 64
    xs = [torch.randn(tokens, 1, n).bfloat16() for _ in range(inputs)]
    enters = [matrix(1, first, n, n, None, False) for _ in range(ups)]
    width, between = first, matrix(1, second, hidden, hidden, None, False)
    if halves == "between":
        enters, width = [], n
    if halves == "enters":
        between, second = None, hidden
    writing = [matrix(1, hidden, width, width, None, True) for _ in range(ups)]
    down = matrix(1, m, second, second, None, True)
    kind = (cpu_kernels.TANH_GELU, cpu_kernels.SILU)[ups - 1]
    parts = [Input(1, n)] * inputs, writing, kind, None, down, enters, between
    wanted, tiles = oracle(xs, *parts), Tiles(*parts)
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert (tiles.run(xs).double() - wanted).norm() / wanted.norm() < 5e-3


@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_is_what_it_is_alone(threads):
    """Whatever lies beside it, in whatever block, by however many threads: to the last bit."""
    torch.set_num_threads(threads)
    (x,), given, writing, *rest = made("wide", 900)
    tiles = Tiles(given, writing, cpu_kernels.TANH_GELU, *rest)
    whole = tiles.run([x])
    panels = cpu_tiles.ROOM // (2 * (512 + 1024) * cpu_tiles.SIDE)
    assert len(whole) > panels * cpu_tiles.SIDE  # more than one block
    torch.set_num_threads(3 - threads)
    for start, end in ((0, 12), (500, 565), (899, 900)):
        assert torch.equal(tiles.run([x[start:end].contiguous()]), whole[start:end])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(value):
    (x,), given, writing, *rest = made("edges", 40)
    tiles = Tiles(given, writing, cpu_kernels.TANH_GELU, *rest)
    right = tiles.run([x])
    x[17, 0, 3] = value
    found = tiles.run([x])
    others = torch.arange(40) != 17
    assert torch.equal(found[others], right[others])
    assert not found[17].isfinite().any()


@pytest.mark.parametrize(
    ("m", "k", "features"),
    [(33, 64, 64), (64, 33, 33), (64, 48, 96), (64, 64, 96), (64, 64, 64)],
)
def test_slices_that_it_does_not_take(m, k, features):
    weight = torch.randn(1, m, k).bfloat16()
    if (m, k, features) == (64, 64, 64):
        weight = weight.mT  # inputs that do not lie side by side
    product = Product(weight, features)
    assert not product.fits
    down = Matrix(Product(torch.randn(1, 64, m).bfloat16(), m * (features // k)))
    one = Input(1, features)
    assert not Tiles([one], [Matrix(product)], cpu_kernels.NONE, None, down).fits


def test_inputs_that_it_does_not_mix():
    four = Input(4, 16, torch.randn(2, 4).bfloat16())
    up = Matrix(Product(torch.randn(1, 64, 32).bfloat16(), 32))
    down = Matrix(Product(torch.randn(1, 64, 64).bfloat16(), 64))
    assert not Tiles([four], [up], cpu_kernels.NONE, None, down).fits


def test_blocks_too_small_to_be_worth_it():
    down = Matrix(Product(torch.zeros(1, 64, 64).bfloat16(), 64))
    most = cpu_tiles.ROOM // (2 * cpu_tiles.SIDE * cpu_tiles.LEAST_PANELS) - 64
    for features, taken in ((most // 2 * 2, True), (most // 2 * 2 + 2, False)):
        up = Matrix(Product(torch.zeros(1, 64, features).bfloat16(), features))
        assert Tiles([Input(1, features)], [up], cpu_kernels.NONE, None, down).fits == taken
