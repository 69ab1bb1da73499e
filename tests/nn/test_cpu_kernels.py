"""decode.c against the dense oracle, where there is a C compiler, and doing without it."""

import subprocess

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import dense_sum
from krony import KroneckerGroup, KroneckerLinear
from krony.maths import kron
from krony.nn import dispatch
from krony.nn.cpu import decode as cpu_decode
from krony.nn.cpu import kernels as cpu_kernels
from krony.runtime.products import fill

compiled = pytest.mark.skipif(cpu_kernels.library() is None, reason="needs a C compiler")

# (large, small, terms, tokens): sides that fill no register and no block of rows, several chunks of
# m1, both orders of contraction, slices in fours, twos and ones, vectors, low rank.
CASES = [
    ((5, 7), (2, 2), 1, 1),
    ((18, 20), (2, 2), 2, 1),
    ((6, 300), (1, 2), 1, 2),
    ((150, 70), (3, 2), 2, 3),
    ((20, 9), (4, 1), 1, 16),
    ((9, 20), (1, 4), 1, 5),
    ((17, 37), (7, 3), 1, 2),
    ((33, 24), (3, 7), 2, 2),
    ((8, 1), (2, 5), 3, 2),
    ((1, 24), (24, 1), 3, 2),
    ((100, 1), (1, 90), 33, 1),
    ((100, 1), (1, 90), 13, 7),
]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """How often the compiled functions were called, whatever the number of rows."""
    made = []
    functions = cpu_kernels.library() or {}

    def counting(function):
        return lambda *arguments: made.append(1) or function(*arguments)

    counted = {key: counting(function) for key, function in functions.items()}
    monkeypatch.setattr(cpu_kernels, "library", lambda: counted)
    monkeypatch.setattr(cpu_decode, "MOST_ROWS", dict.fromkeys(cpu_kernels.NAMES, 10_000))
    return made


def group(large, small, terms, dtype=torch.float32, **options):
    made = KroneckerGroup(large, small, terms, **options)
    scalars = torch.randn(terms) if options.get("scalars") else None
    made.set_factors(torch.randn(terms, *large), torch.randn(terms, *small), scalars)
    return made.to(dtype)


@compiled
@pytest.mark.parametrize("dtype", list(cpu_kernels.NAMES))
@pytest.mark.parametrize("layout", kron.LAYOUTS)
@pytest.mark.parametrize("form", ["plain", "scalars", "interpolative"])
def test_it_is_the_dense_product(form, layout, dtype, calls):
    for large, small, terms, tokens in CASES:
        if form == "interpolative" and terms >= small[0] * small[1]:
            continue  # no number would be left to store
        options = {} if form == "plain" else {form: True}
        made = group(large, small, terms, dtype, layout=layout, **options)
        x = torch.randn(tokens, large[1] * small[1]).to(dtype)
        factors = made.large_factors.double(), made.scaled_small.double()
        dense = dense_sum(*kron.in_order(*factors, layout))
        bias = torch.randn(len(dense)).to(dtype)
        calls.clear()
        y = made(x[None], bias)[0]
        assert calls
        assert y.dtype == dtype
        expected = x.double() @ dense.T + bias.double()
        # Summed in float32, rounded to the dtype once, and once more with the bias.
        error = (y.double() - expected).norm() / expected.norm()
        limit = 3e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert error < limit, (large, small, terms, tokens)


@compiled
@pytest.mark.parametrize("dtype", list(cpu_kernels.NAMES))
@pytest.mark.parametrize(("terms", "entries"), [(1, 2), (3, 16), (7, 70), (64, 65), (200, 768)])
def test_small_factors_in_full(terms, entries, dtype):
    free = torch.randn(terms, entries - terms).to(dtype)
    kept, given = torch.randperm(entries)[:terms].sort().values, torch.arange(terms, entries)
    is_kept = torch.zeros(entries, dtype=torch.bool)
    is_kept[kept] = True
    order = torch.empty(entries, dtype=torch.int32)
    order[kept], order[~is_kept] = torch.arange(terms).int(), given.int()
    for each in (order, torch.randperm(entries).int()):  # as it is made, and any other
        for threads in (1, 2):
            torch.set_num_threads(threads)
            full = cpu_kernels.fill(free, each)
            assert torch.equal(full, fill(free, each))
            assert torch.equal(cpu_kernels.fill(torch.nn.Parameter(free), each), full)
    with torch.enable_grad():
        assert cpu_kernels.fill(free, order) is None
    assert cpu_kernels.fill(free.double(), order) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_kernels.fill(free, order) is None


@compiled
def test_the_number_of_threads_changes_no_bit():
    made, x = group((150, 70), (3, 2), 2), torch.randn(2, 140)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(dispatch.run(made, x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@compiled
def test_a_layer_takes_it_for_few_tokens_only(monkeypatch):
    lengths, functions = [], dict(cpu_kernels.library())
    plain = functions["decode", torch.float32]
    functions["decode", torch.float32] = lambda *a: lengths.append(a[6]) or plain(*a)
    monkeypatch.setattr(cpu_kernels, "library", lambda: functions)
    layer = KroneckerLinear(40, 36, [KroneckerGroup((18, 20), (2, 2)), group((36, 1), (1, 40), 3)])
    for tokens in (0, 1, 8, 9, 17):
        x = torch.randn(tokens, 40)
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
    # Two slices a token in the first group, one in the second; 16 rows at most. The whole layer is
    # one call, and where it can't be, a group that can is.
    assert lengths == [1, 8, 9]


@compiled
def test_what_it_leaves_to_torch():
    made, x = group((18, 20), (2, 2), 2), torch.randn(1, 40)
    assert dispatch.which(made, x) == "decode"
    with dispatch.restricted("torch"):
        assert dispatch.which(made, x) == "torch"
    with torch.enable_grad():
        assert dispatch.which(made, x) == "torch"
        made.requires_grad_(False)
        assert dispatch.which(made, x) == "decode"
        assert dispatch.which(made, x.clone().requires_grad_()) == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.which(made, x) == "torch"
    assert dispatch.which(made, x.double()) == "torch"
    assert dispatch.which(made, x.bfloat16()) == "torch"
    traced = torch.jit.trace(made, x)
    torch.testing.assert_close(traced(2 * x), 2 * made(x), rtol=1e-4, atol=1e-4)
    with FlopCounterMode(display=False) as counter:
        made(x)
    assert counter.get_total_flops() > 0
    many = group((4, 4), (300, 300), 1)
    assert dispatch.which(many, torch.randn(1, 1200)) == "torch"
    step = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(step(x), made(x), rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("dtype", list(cpu_kernels.NAMES))
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "p", "q", "k"), [(0, 2, 2, 16), (1, 1, 4, 17), (7, 4, 1, 33), (40, 5, 3, 900)]
)
def test_slices_of_many_tokens_are_mixed(tokens, p, q, k, with_bias, apart, dtype):
    x, mixing = torch.randn(tokens, q, k).to(dtype), torch.randn(p, q).to(dtype)
    bias = torch.randn(p, k).to(dtype) if with_bias else None
    wanted = mixing.double() @ x.double() + (bias.double() if with_bias else 0)
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    for lying in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        found = cpu_kernels.mix(mixing, lying, bias, apart)
        assert found.shape == wanted.shape
        assert found.transpose(0, 1).is_contiguous() if apart else found.is_contiguous()
        torch.testing.assert_close(found.double(), wanted, **close)
    scattered = x.repeat_interleave(2, -1)[..., ::2]
    assert cpu_kernels.mix(mixing, scattered, bias, apart) is None
    assert cpu_kernels.mix(mixing.double(), x, bias, apart) is None
    with torch.enable_grad():
        assert cpu_kernels.mix(mixing, x, bias, apart) is None


@compiled
@pytest.mark.parametrize("dtype", list(cpu_kernels.NAMES))
@pytest.mark.parametrize("shape", [(0,), (1,), (15,), (3, 7), (33, 1001)])
@pytest.mark.parametrize("threads", [1, 2])
def test_gelu_is_right_to_the_last_digits(shape, dtype, threads):
    x = (4 * torch.randn(shape)).to(dtype)
    wanted = torch.nn.functional.gelu(x.double(), approximate="tanh")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = cpu_kernels.gelu(x)
    finally:
        torch.set_num_threads(before)
    if dtype == torch.bfloat16:
        # Rounded once, so nearly always the nearest; far below, what is left has few digits.
        other = found != wanted.to(dtype)
        assert other[x > -6].sum() <= 1 + 1e-3 * x.numel()
    torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@compiled
def test_gelu_of_what_is_no_ordinary_number():
    special = torch.tensor([float("nan"), float("inf"), 0.0, 1e30, -1e3])
    for dtype in cpu_kernels.NAMES:
        found = cpu_kernels.gelu(special.to(dtype))
        assert found[0].isnan()
        torch.testing.assert_close(found[1:4].float(), special[1:4], rtol=1e-2, atol=0)
        assert abs(found[4]) < 1e-30
    columns = torch.randn(6, 5).T
    torch.testing.assert_close(
        cpu_kernels.gelu(columns), torch.nn.functional.gelu(columns, approximate="tanh")
    )
    assert cpu_kernels.has_gelu(columns)
    assert not cpu_kernels.has_gelu(torch.ones(3, dtype=torch.float64))
    assert not torch.func.vmap(lambda x: x + cpu_kernels.has_gelu(x))(torch.zeros(2, 3)).any()


@compiled
@pytest.mark.parametrize("dtype", list(cpu_kernels.NAMES))
@pytest.mark.parametrize("shape", [(0,), (1,), (15,), (3, 7), (33, 1001)])
def test_gradient_of_gelu_is_that_of_torch_in_float64(shape, dtype):
    x, gradient = (4 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    exact = x.double().requires_grad_()
    with torch.enable_grad():
        torch.nn.functional.gelu(exact, approximate="tanh").backward(gradient.double())
    found = cpu_kernels.gelu(x, gradient)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-5}
    torch.testing.assert_close(found.double(), exact.grad, **close)


@compiled
def test_gradient_of_gelu_far_out():
    x = torch.tensor([float("nan"), float("inf"), 1e30, 40.0, -40.0, -1e30, -float("inf")])
    found = cpu_kernels.gelu(x, torch.full((7,), 3.0))
    assert found[0].isnan()
    torch.testing.assert_close(found[1:], torch.tensor([3.0, 3, 3, 0, 0, 0]), rtol=1e-6, atol=1e-30)


def test_without_a_compiler_it_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = cpu_kernels.library.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernels.shutil, "which", lambda _: None)
        assert library() is None

    def fail(*arguments, **options):
        raise subprocess.CalledProcessError(1, "cc")

    monkeypatch.setattr(cpu_kernels.shutil, "which", lambda _: "cc")
    monkeypatch.setattr(cpu_kernels.subprocess, "run", fail)
    assert library() is None
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setattr(cpu_kernels, "library", lambda: None)
    made, x = group((18, 20), (2, 2), 1), torch.randn(1, 40)
    assert dispatch.which(made, x) == "torch"
    assert not cpu_kernels.has_gelu(x)
    torch.testing.assert_close(made(x), x @ made.to_dense().T, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.slow
def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = cpu_kernels.library.__wrapped__
    assert library() is not None
    monkeypatch.setattr(cpu_kernels.subprocess, "run", None)
    assert library() is not None
    assert [path.suffix for path in (tmp_path / "krony").iterdir()] == [".so"]
