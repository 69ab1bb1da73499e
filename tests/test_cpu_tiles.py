"""tiles.c against float64: MLPs in bfloat16 on a CPU with a tile unit."""

import pytest
import torch
import torch.nn.functional as F

from krony import cpu_kernels, cpu_tiles
from krony.cpu_tiles import Product, Up

pytestmark = pytest.mark.skipif(not cpu_kernels.has_tiles(), reason="needs a tile unit")

# (m2, m1, slices, k) of the matrix that writes the hidden axis; (p, or None: not mixed; m, k) of
# the one that reads it; through how many weights the slices of the first go.
SHAPES = {
    "one slice": ((1, 64, 1, 64), (None, 64, 64), 1),
    "mixed between": ((4, 96, 1, 96), (1, 96, 96), 1),
    "mixed at both ends": ((2, 128, 2, 64), (2, 64, 128), 1),
    "many slices": ((3, 64, 3, 32), (5, 96, 64), 1),
    "terms": ((3, 64, 6, 32), (3, 96, 64), 2),
    "slices anew": ((1, 192, 1, 64), (None, 64, 96), 1),
    "edges": ((2, 50, 1, 70), (1, 38, 50), 1),
    "wide": ((1, 1024, 1, 512), (None, 512, 1024), 1),
}


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.set_num_threads(1)


def made(shape, tokens, gated, bias=True):
    """What `run` takes."""
    (m2, m1, slices, k), (p, m, read), weights = SHAPES[shape]
    x = torch.randn(tokens, slices // weights * k).bfloat16()
    ups = [
        Up(
            Product((torch.randn(weights, m1, k) * k**-0.5).bfloat16(), x.shape[1]),
            x,
            torch.randn(m2, slices).bfloat16() if m2 != slices or slices > 1 else None,
            torch.randn(m2, m1).bfloat16() if bias else None,
        )
        for _ in range(1 + gated)
    ]
    features = (m2 if p is None else p) * m1
    mixing = None if p is None else torch.randn(p, m2).bfloat16()
    down = Product((torch.randn(1, m, read) * read**-0.5).bfloat16(), features)
    offset = torch.randn(features // read, m).bfloat16() if bias else None
    return ups, mixing, down, offset


def sliced(product, x):
    """Slices of x (T, features) through every weight, in float64: (T, slices, m)."""
    x = x.double().unflatten(1, (-1, product.weight.shape[2]))
    return torch.einsum("tsk,wmk->tswm", x, product.weight.double()).flatten(1, 2)


def oracle(ups, activation, mixing, down, offset):
    hidden = None
    for up in ups:
        h = sliced(up.product, up.x)
        h = h if up.mixing is None else torch.einsum("ij,tjm->tim", up.mixing.double(), h)
        h = h if up.bias is None else h + up.bias.double()
        hidden = activation(h) if hidden is None else hidden * h
    if mixing is not None:
        hidden = torch.einsum("ij,tjm->tim", mixing.double(), hidden)
    y = sliced(down, hidden.flatten(1))
    return y if offset is None else y + offset.double()


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [9, 32, 45, 130])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_mlp(shape, gated, tokens, threads):
    torch.set_num_threads(threads)
    ups, mixing, down, offset = made(shape, tokens, gated, bias=tokens != 45)
    # Every pair of activation and gate, and not those alone that have code of their own.
    kind, activation = (cpu_kernels.SILU, F.silu) if gated else (cpu_kernels.TANH_GELU, tanh_gelu)
    if tokens == 130:
        kind, activation = cpu_kernels.NONE, lambda x: x
    found = cpu_tiles.run(ups, kind, mixing, down, offset)
    wanted = oracle(ups, activation, mixing, down, offset)
    assert found.shape == wanted.shape
    assert found.dtype == torch.bfloat16
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < 5e-3


@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_is_what_it_is_alone(threads):
    """Whatever lies beside it, in whatever block, by however many threads: to the last bit."""
    torch.set_num_threads(threads)
    ups, *rest = made("wide", 900, gated=False)
    whole = cpu_tiles.run(ups, cpu_kernels.TANH_GELU, *rest)
    panels = cpu_tiles.ROOM // (2 * (512 + 1024) * cpu_tiles.SIDE)
    assert len(whole) > panels * cpu_tiles.SIDE  # more than one block
    torch.set_num_threads(3 - threads)
    for start, end in ((0, 12), (500, 565), (899, 900)):
        part = [Up(up.product, up.x[start:end].contiguous(), up.mixing, up.bias) for up in ups]
        found = cpu_tiles.run(part, cpu_kernels.TANH_GELU, *rest)
        assert torch.equal(found, whole[start:end])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(value):
    ups, *rest = made("edges", 40, gated=False)
    right = cpu_tiles.run(ups, cpu_kernels.TANH_GELU, *rest)
    ups[0].x[17, 3] = value
    found = cpu_tiles.run(ups, cpu_kernels.TANH_GELU, *rest)
    others = torch.arange(40) != 17
    assert torch.equal(found[others], right[others])
    assert not found[17].isfinite().any()


@pytest.mark.parametrize(
    ("m", "k", "features"), [(33, 64, 64), (64, 33, 33), (64, 48, 96), (64, 64, 96)]
)
def test_slices_that_it_does_not_take(m, k, features):
    assert not Product(torch.randn(1, m, k), features).fits
    x = torch.randn(40, features).bfloat16()
    up = Up(Product(torch.randn(1, m, k).bfloat16(), features), x, None, None)
    down = Product(torch.randn(1, 64, m).bfloat16(), m * (features // k))
    assert cpu_tiles.run([up], cpu_kernels.NONE, None, down, None) is None


def test_blocks_too_small_to_be_worth_it():
    features = cpu_tiles.ROOM // (2 * cpu_tiles.SIDE * cpu_tiles.LEAST_PANELS)
    features += features % 2
    up = Up(
        Product(torch.zeros(1, 64, features).bfloat16(), features),
        torch.zeros(9, features).bfloat16(),
        None,
        None,
    )
    down = Product(torch.zeros(1, 64, 64).bfloat16(), 64)
    assert cpu_tiles.run([up], cpu_kernels.NONE, None, down, None) is None
