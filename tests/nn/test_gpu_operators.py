"""Few tokens through the Triton kernels, as operators, against the dense oracle.

On a GPU or in Triton's interpreter, which has to be asked for before Triton is imported, so that on
a CPU the tests that launch a kernel run in a process that `test_under_the_interpreter` starts.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

from helpers import INTERPRETED, dense_sum, in_the_interpreter, launches
from helpers import KERNEL_DEVICE as DEVICE
from krony import KroneckerGroup, KroneckerLinear
from krony.maths import kron
from krony.nn import dispatch, products
from krony.nn.gpu import few, operators
from krony.nn.lower import lower

# (large, small, terms, tokens): by element and by tile, sides that fill no block, several blocks of
# m1, of n1 and of tokens, vectors.
CASES = [
    ((5, 7), (2, 2), 1, 1),
    ((18, 20), (2, 2), 2, 1),
    ((6, 300), (1, 2), 1, 1),
    ((18, 70), (3, 2), 2, 3),
    ((20, 9), (4, 1), 1, 16),
    ((9, 20), (1, 4), 1, 5),
    ((17, 5), (16, 3), 1, 6),
    ((4, 6), (3, 16), 2, 6),
    ((8, 1), (1, 5), 3, 2),
]


def inputs(large, small, terms, tokens, dtype=torch.float32, mix_first=True):
    a, b, x, bias = (
        torch.randn(*shape, device=DEVICE).to(dtype)
        for shape in [
            (terms, *large),
            (terms, *small),
            (tokens, large[1] * small[1]),
            (large[0] * small[0],),
        ]
    )
    return x, b, kron.large_to_linear(a, mix_first).contiguous(), bias, a


@launches
@pytest.mark.parametrize(("layout", "mix_first"), [("small-outer", True), ("large-outer", False)])
@pytest.mark.parametrize(("large", "small", "terms", "tokens"), CASES)
def test_decode_is_the_dense_product(large, small, terms, tokens, layout, mix_first):
    x, b, weight, bias, a = inputs(large, small, terms, tokens, mix_first=mix_first)
    dense = dense_sum(*kron.in_order(a.double(), b.double(), layout))
    expected = x.double() @ dense.T
    made = operators.decode(x, b, weight, large, layout, mix_first)
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-4)
    made = operators.decode(x[None], b, weight, large, layout, mix_first, bias)
    torch.testing.assert_close(made.double(), (expected + bias)[None], rtol=1e-5, atol=1e-4)


@launches
def test_a_layer_decodes_with_them_and_takes_many_tokens_without(monkeypatch):
    calls, decode = [], operators.decode
    monkeypatch.setattr(operators, "decode", lambda *a: calls.append(len(a[0])) or decode(*a))
    layer = KroneckerLinear(40, 36, [KroneckerGroup((18, 20), (2, 2), 2)]).to(DEVICE)
    for tokens in (1, 16, 17):
        x = torch.randn(tokens, 40, device=DEVICE)
        expected = x @ layer.weight.T + layer.bias
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert calls == [1, 16]


@launches
@pytest.mark.parametrize("mix_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("large", "small", "terms", "tokens"), CASES[1:5:2])
def test_half_precision_sums_in_float32(large, small, terms, tokens, dtype, mix_first):
    x, b, weight, bias, a = inputs(large, small, terms, tokens, dtype, mix_first)
    expected = x.double() @ dense_sum(b.double(), a.double()).T + bias.double()
    made = operators.decode(x, b, weight, large, "small-outer", mix_first, bias)
    assert made.dtype == dtype
    # Rounded once at the end, and once where the mix becomes the input of a tile product.
    error = (made.double() - expected).abs().max() / expected.abs().max()
    assert error < 2 * torch.finfo(dtype).eps


@launches
@pytest.mark.parametrize("mix_first", [True, False])
@pytest.mark.parametrize("layout", kron.LAYOUTS)
@pytest.mark.parametrize(("large", "small", "terms", "tokens"), CASES[1:4:2])
def test_gradients_are_those_of_the_torch_form(large, small, terms, tokens, layout, mix_first):
    leaves = [v.requires_grad_() for v in inputs(large, small, terms, tokens, mix_first=mix_first)]
    x, b, weight, bias, _ = leaves
    made = operators.decode(x, b, weight, large, layout, mix_first, bias)
    plain = products.apply(x, b, lambda z: F.linear(z, weight), large, layout, mix_first) + bias
    torch.testing.assert_close(made, plain, rtol=1e-5, atol=1e-4)
    upstream = torch.randn_like(plain)
    found = torch.autograd.grad(made, leaves[:4], upstream)
    expected = torch.autograd.grad(plain, leaves[:4], upstream)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@launches
def test_no_bias_no_gradient():
    x, b, weight, _, _ = inputs((5, 7), (2, 2), 1, 2)
    operators.decode(x, b.requires_grad_(), weight, (5, 7)).sum().backward()
    assert b.grad is not None
    assert weight.grad is None


@launches
def test_the_operator_is_well_formed_for_torch():
    x, b, weight, bias, _ = inputs((5, 7), (2, 2), 2, 2)
    arguments = (x.requires_grad_(), b, weight.requires_grad_(), bias, 5, 7, True, True)
    # Ahead-of-time dispatch is what test_compile_keeps_it_whole goes through.
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators._decode, arguments, test_utils=parts)


@launches
def test_compile_keeps_it_whole():
    x, b, weight, _, _ = inputs((5, 7), (2, 2), 1, 2)
    nodes = []

    def backend(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def step(x):
        return operators.decode(x, b, weight, (5, 7)) * 2

    torch.testing.assert_close(step(x), operators.decode(x, b, weight, (5, 7)) * 2)
    layer = KroneckerLinear(14, 10, [KroneckerGroup((5, 7), (2, 2))]).to(DEVICE)
    with torch.no_grad():
        made = torch.compile(layer, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(made, layer(x))
    assert sum("krony.decode" in node for node in nodes) == 2


@launches
def test_a_gpu_on_which_nothing_can_be_launched_takes_the_torch_form(monkeypatch):
    device = torch.device(DEVICE)
    assert operators.launches(device)

    def fails(*_):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("krony.nn.gpu.launch.launch", fails)
    assert not operators.launches(device)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or not operators.INSTALLED, reason="needs Triton, and no nesting")
def test_under_the_interpreter():
    in_the_interpreter(__file__)


def refusal(tokens=1, small=(2, 2), terms=1, dtype=torch.float32, inputs=None, special=None):
    layer = KroneckerLinear(8 * small[1], 8 * small[0], [KroneckerGroup((8, 8), small, terms)])
    request = dispatch.Request(tokens, inputs or dtype, torch.device("cpu"), special=special)
    return few.can_take(lower(layer.to(dtype)), request)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({}, None),
        ({"tokens": 16, "dtype": torch.bfloat16}, None),
        ({"tokens": 17}, "more than 16 tokens"),
        ({"small": (1, 64)}, "no small factor, or too large a one"),
        ({"small": (16, 16), "terms": 5}, "no small factor, or too large a one"),
        ({"dtype": torch.float64}, "only float32, bfloat16 and float16"),
        ({"inputs": torch.bfloat16}, "its numbers are not all in the inputs' bfloat16"),
        ({"special": "autocast"}, "autocast"),
    ],
)
def test_what_a_launch_takes(wanted, reason, monkeypatch):
    monkeypatch.setattr(operators, "INSTALLED", True)
    monkeypatch.setattr(operators, "INTERPRETED", True)
    assert refusal(**wanted) == reason
    monkeypatch.setattr(operators, "INSTALLED", False)
    assert refusal() == "Triton is not installed"


def test_a_cpu_falls_back_and_imports_no_kernel(monkeypatch):
    monkeypatch.setattr(operators, "INSTALLED", True)
    monkeypatch.setattr(operators, "INTERPRETED", False)
    monkeypatch.delitem(sys.modules, "krony.nn.gpu.triton_kernels", raising=False)
    assert refusal() == "only on a GPU"
    dispatch.run(KroneckerGroup((8, 8), (2, 2)), torch.zeros(1, 16))
    assert INTERPRETED or DEVICE == "cuda" or "krony.nn.gpu.triton_kernels" not in sys.modules
