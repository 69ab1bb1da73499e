"""Whole MLPs through the Triton kernels, on a GPU or in Triton's interpreter.

As in test_kernels.py, on a CPU the tests that launch a kernel run in a process of their own.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import INTERPRETED, in_the_interpreter, launches
from helpers import KERNEL_DEVICE as DEVICE
from krony import KroneckerGroup, KroneckerLinear
from krony.nn import mlp
from krony.nn.activations import TanhGELU
from krony.nn.explain import explain
from krony.nn.gpu import mlp as gpu_mlp
from krony.nn.gpu import operators
from krony.nn.lower import LoweredMLP, lower

MODEL, HIDDEN = 24, 48


class Gelu(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.c_fc, self.act, self.c_proj = up, TanhGELU(nn.GELU), down

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class Gated(nn.Module):
    def __init__(self, gate, up, down):
        super().__init__()
        self.gate, self.up, self.down, self.act = gate, up, down, nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def factored(m, n, large, terms=1, layout="small-outer", interpolative=False, bias=True):
    if large is None:
        return nn.Linear(n, m, bias=bias)
    small = (m // large[0], n // large[1])
    group = KroneckerGroup(large, small, terms, layout, interpolative=interpolative)
    layer = KroneckerLinear(n, m, [group], bias=bias)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


# Large factors of what writes the hidden axis and what reads it, terms, layout; None is dense.
SHAPES = {
    "halved both ways": ((24, 12), (12, 24), 1, "small-outer"),
    "a quarter, never written": ((12, 24), (24, 12), 1, "small-outer"),
    "rows alone": ((24, 24), (24, 24), 1, "small-outer"),
    "inputs alone": ((48, 12), (12, 48), 1, "small-outer"),
    "the paper's order": ((24, 12), (12, 24), 1, "large-outer"),
    "terms": ((16, 8), (8, 16), 2, "small-outer"),
    "more terms": ((16, 8), (8, 16), 3, "small-outer"),
    "slices that do not meet": ((24, 24), (12, 12), 1, "small-outer"),
    "more slices out than in": ((24, 12), (8, 24), 1, "small-outer"),
    "low rank": ((48, 1), (24, 1), 7, "small-outer"),
    "low rank, then factored": ((48, 1), (12, 24), 1, "small-outer"),
    "dense, then factored": (None, (12, 24), 1, "small-outer"),
    "factored, then dense": ((24, 12), None, 1, "small-outer"),
}


def made(name, gated=False, bias=True, **options):
    """An MLP as `install` leaves it."""
    up, down, terms, layout = SHAPES[name]
    options |= {"terms": terms, "layout": layout, "bias": bias}
    ups = [factored(HIDDEN, MODEL, up, **options) for _ in range(1 + gated)]
    layers = [*ups, factored(MODEL, HIDDEN, down, **options)]
    block = nn.Sequential((Gated if gated else Gelu)(*layers)).to(DEVICE).eval()
    mlp.install(block)
    (module,) = block
    assert mlp.record_of(module) is not None
    return module


def layers_of(module):
    parts = mlp.record_of(module).parts
    return [module.get_submodule(name) for name in (*parts.ups, parts.down)]


def steps(*layers, kind=1):
    (*ups, down) = map(lower, layers)
    return gpu_mlp.steps(LoweredMLP(tuple(ups), kind, down))


def oracle(module, x):
    """In float64, every matrix dense."""
    *ups, down = layers_of(module)
    found = [
        F.linear(x.double(), u.weight.double(), u.bias if u.bias is None else u.bias.double())
        for u in ups
    ]
    first, *others = found
    hidden = F.gelu(first, approximate="tanh") if not others else F.silu(first) * others[0]
    bias = None if down.bias is None else down.bias.double()
    return F.linear(hidden, down.weight.double(), bias)


@pytest.fixture
def launched(monkeypatch):
    """How many launches there were of each kind, few tokens and many."""
    counts = {False: 0, True: 0}
    run = operators.run_step

    def counting(x, step, many):
        counts[many] += 1
        return run(x, step, many)

    monkeypatch.setattr(operators, "run_step", counting)
    return counts


def close(found, expected, tolerance):
    error = (found.double() - expected).norm() / expected.norm()
    assert error < tolerance, float(error)


@launches
@torch.no_grad()
@pytest.mark.parametrize(("tokens", "gated"), [(1, False), (6, True)])
@pytest.mark.parametrize("name", SHAPES)
def test_few_tokens(name, tokens, gated, launched):
    module = made(name, gated)
    x = torch.randn(1, tokens, MODEL, device=DEVICE)
    close(module(x), oracle(module, x), 2e-6)
    halves = sum(large is not None and large[1] == 1 for large in SHAPES[name][:2])
    beyond = gated and name.startswith("low rank")  # two halves each, which read different inputs
    assert launched[False] == (0 if beyond else 2 + halves)


@launches
@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_many_tokens(name, gated, launched):
    module = made(name, gated).half()
    x = torch.randn(70, MODEL, device=DEVICE).half()  # two blocks of them
    close(module(x), oracle(module, x), 2e-3)
    known = steps(*layers_of(module))
    fused = [step for step in known or [] if step.kind or step.terms > 1]
    taken = all(step.takes_many for step in fused)
    assert launched[True] == (len(fused) if taken else 0)
    assert taken or name in ("the paper's order", "more terms") or (gated and name == "terms")


@launches
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_half_precision_rounds_what_is_written(gated, dtype):
    module = made("halved both ways", gated).to(dtype)
    x = torch.randn(5, MODEL, device=DEVICE, dtype=dtype)
    assert module(x).dtype == dtype
    close(module(x), oracle(module, x), 2 * torch.finfo(dtype).eps)


@launches
@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 20])
def test_without_biases(tokens):
    module = made("halved both ways", bias=False).half()
    x = torch.randn(tokens, MODEL, device=DEVICE).half()
    close(module(x), oracle(module, x), 2e-3)


@launches
@torch.no_grad()
def test_numbers_that_change_are_seen(launched):
    module = made("low rank", interpolative=True)
    x = torch.randn(2, MODEL, device=DEVICE)
    module(x)
    for tensor in (module.c_fc.groups[0].small, module.c_proj.groups[0].large.weight):
        tensor.mul_(1.5)
        close(module(x), oracle(module, x), 2e-6)
    module.c_proj.bias = nn.Parameter(torch.ones(MODEL, device=DEVICE))
    close(module(x), oracle(module, x), 2e-6)
    assert launched[False] == 16
    assert explain(module, 2)[0].backend == "triton"


@launches
def test_hooks_gradients_and_autocast_take_the_modules_own_forward(launched):
    module, seen = made("halved both ways"), []
    x = torch.randn(2, MODEL, device=DEVICE)
    with torch.no_grad():
        module(x)
        assert launched[False] == 2
        with torch.autocast(DEVICE, torch.bfloat16):
            module(x)
        hook = module.act.register_forward_hook(lambda *_: seen.append(1))
        module(x)
        assert seen
        hook.remove()
    module(x).sum().backward()
    assert module.c_fc.groups[0].small.grad is not None
    assert launched[False] == 2


@launches
@torch.no_grad()
@pytest.mark.parametrize("tokens", [16, 17])
def test_compile_keeps_the_launches(tokens):
    module = made("a quarter, never written").half()
    x = torch.randn(tokens, MODEL, device=DEVICE).half()
    expected, nodes = module(x), []

    def backend(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    made_of = torch.compile(module, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(made_of, expected, rtol=0, atol=0)
    assert sum("krony.step" in node for node in nodes) == (2 if tokens == 16 else 1)


@launches
def test_the_operator_is_well_formed_for_torch():
    module = made("halved both ways")
    (step, _) = steps(module.c_fc, module.c_proj)
    x = torch.randn(2, MODEL, device=DEVICE)
    options = list(step.sides), step.small_outer, step.mix_first, step.kind, False
    arguments = (x, step.weights, step.smalls, step.biases, step.inner, *options)
    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    torch.library.opcheck(operators._step, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or not operators.INSTALLED, reason="needs Triton, and no nesting")
def test_under_the_interpreter():
    in_the_interpreter(__file__)


def test_a_matrix_that_is_gate_and_other_in_one_is_left_alone():
    layers = [KroneckerLinear(4, 12, [KroneckerGroup((6, 4), (2, 1))]), nn.Linear(6, 4)]
    pytest.importorskip("triton")
    assert steps(*layers, kind=2) is None
