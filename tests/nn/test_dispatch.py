"""The table of kernels as one meets it from outside: choosing, restricting, adding, explaining."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import krony
from helpers import tiny
from krony import KroneckerGroup, KroneckerLinear, KronyError
from krony.nn import dispatch, switches
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.dispatch import Backend, Request, register, unregister
from krony.nn.explain import summary
from krony.nn.lower import Lowered, lower

compiled = pytest.mark.skipif(cpu_kernels.library() is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def layer(*groups, bias=True):
    groups = groups or (((18, 20), (2, 2), 2),)
    made = KroneckerLinear(40, 36, [KroneckerGroup(*g) for g in groups], bias).eval()
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return made


def factored(**changes):
    model = tiny("gpt2", **changes)
    return krony.compress(
        model, krony.make_plan(model, small=(2, 2), target="mlp"), init="van-loan"
    ).eval()


@pytest.fixture
def outer():
    """A kernel from outside: float64 and dense, for up to three tokens of layers with one group."""
    prepared = []

    def can_take(lowered: Lowered, request: Request) -> str | None:
        if request.tokens > 3:
            return "more than 3 tokens"
        return None if len(lowered.groups) == 1 else "several groups"

    def prepare(lowered: Lowered) -> tuple[torch.Tensor, torch.Tensor | None]:
        prepared.append(lowered)
        return lowered.groups[0].to_dense().double(), lowered.bias

    def run(made: tuple[torch.Tensor, torch.Tensor | None], x: torch.Tensor) -> torch.Tensor:
        weight, bias = made
        return nn.functional.linear(x.double(), weight, None if bias is None else bias.double()).to(
            x.dtype
        )

    register(Backend("outer", can_take, run, prepare))
    yield prepared
    unregister("outer")


def test_a_kernel_from_outside_is_used_kept_and_explained(outer):
    made = layer()
    for tokens in (1, 3, 4):
        x = torch.randn(tokens, 40)
        assert (dispatch.which(made, x) == "outer") == (tokens <= 3)
        wanted = x.double() @ made.to_dense(torch.float64).T + made.bias.double()
        torch.testing.assert_close(made(x).double(), wanted, rtol=1e-5, atol=1e-4)
    assert len(outer) == 1
    made(torch.randn(2, 40))
    assert len(outer) == 1, "made once"
    made.groups[0].small.mul_(2)
    x = torch.randn(1, 40)
    wanted = x.double() @ made.to_dense(torch.float64).T + made.bias.double()
    torch.testing.assert_close(made(x).double(), wanted, rtol=1e-5, atol=1e-4)
    assert len(outer) == 2, "and again when a factor changes"
    (row,) = krony.explain(made, tokens=3)
    assert (row.backend, row.kind, row.why_not) == ("outer", "layer", ())
    (row,) = krony.explain(made, tokens=4)
    assert row.why_not[0] == ("outer", "more than 3 tokens")
    with dispatch.restricted("torch"):
        assert dispatch.which(made, x) == "torch"
    with dispatch.restricted("outer"):
        assert dispatch.which(made, x) == "outer"
    # Gradients are nothing that it was said to know.
    with torch.enable_grad():
        made(x).sum().backward()
    assert made.bias.grad is not None


def test_a_kernel_for_mlps_from_outside():
    model = factored()
    ids = torch.arange(6)[None]
    wanted, seen = model(ids).logits, []

    def run(mlp, x):
        seen.append(len(mlp.ups))
        (up,), down = mlp.ups, mlp.down
        hidden = nn.functional.linear(x, up.groups[0].to_dense(), up.bias)
        hidden = nn.functional.gelu(hidden, approximate="tanh")
        return nn.functional.linear(hidden, down.groups[0].to_dense(), down.bias)

    register(Backend("whole", lambda mlp, request: None, run), unit="mlp")
    try:
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        assert seen == [1, 1]
        assert {row.backend for row in krony.explain(model)} == {"whole"}
    finally:
        unregister("whole", unit="mlp")
    torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=0)
    assert seen == [1, 1]


def test_names_that_are_taken_or_unknown():
    some = Backend("some", lambda *_: None, lambda made, x: None)
    with pytest.raises(KronyError, match="there is a kernel 'decode' for a layer"):
        register(Backend("decode", some.can_take, some.run))
    with pytest.raises(KronyError, match=r"no kernel 'first' for a mlp; there are triton, decode"):
        register(some, unit="mlp", before="first")
    with pytest.raises(KronyError, match="no kernel 'some' for a layer"):
        unregister("some")
    with pytest.raises(KronyError, match="no kernel 'torch'"):
        unregister("torch")
    with (
        pytest.raises(KronyError, match=r"KRONY_KERNELS names nothing, .* there are decode, tiles"),
        dispatch.restricted("nothing"),
    ):
        pass
    with pytest.raises(KronyError, match="at least one token, not 0"):
        krony.explain(layer(), tokens=0)


def test_what_was_chosen_among_the_same_kernels_holds_again():
    before, inside = switches.version, []
    for _ in range(2):
        with dispatch.restricted("decode"):
            inside.append(switches.version)
        assert switches.version == before
    assert inside[0] == inside[1] != before
    register(Backend("some", lambda *_: "never", lambda made, x: None))
    unregister("some")
    assert switches.version not in (before, inside[0])


@compiled
def test_what_is_restricted_runs_in_torch_alone(monkeypatch):
    model = factored()
    ids = torch.arange(40)[None]
    wanted = model(ids).logits
    functions, called = cpu_kernels.library(), []
    noting = {
        key: lambda *a, of=key, run=function: called.append(of[0]) or run(*a)
        for key, function in functions.items()
    }
    monkeypatch.setattr(cpu_kernels, "library", lambda: noting)
    with dispatch.restricted("torch"):
        found = model(ids).logits
        assert {row.backend for row in krony.explain(model, 40)} == {"torch"}
    assert not called
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with dispatch.restricted("hidden"):
        model(ids)
        assert {row.backend for row in krony.explain(model, 40)} == {"hidden"}
    assert set(called) == {"hidden"}


@pytest.mark.slow
@pytest.mark.parametrize(("value", "backend"), [("torch", "torch"), ("decode, mix", "decode")])
@compiled
def test_the_environment_restricts(value, backend):
    code = (
        "import krony, torch; torch.set_grad_enabled(False);"
        "layer = krony.KroneckerLinear(8, 8, [krony.KroneckerGroup((4, 4), (2, 2))]);"
        "print(krony.explain(layer)[0].backend); layer(torch.ones(1, 8))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KRONY_KERNELS": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [backend]


@pytest.mark.slow
def test_a_kernel_that_there_is_none_of_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "krony", "info", "demo", "--explain"],
        env={**os.environ, "KRONY_KERNELS": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "KRONY_KERNELS names cuda, and there is no such kernel" in done.stderr


@compiled
def test_a_model_is_explained():
    model = factored()
    rows = krony.explain(model)
    assert [(row.name, row.kind, row.backend) for row in rows] == [
        (f"transformer.h.{i}.mlp", "mlp", "decode") for i in range(2)
    ]
    (one,) = summary(rows)
    assert (one.name, one.count) == ("transformer.h.*.mlp", 2)
    model.transformer.h[0].mlp.c_fc.groups[0].large.register_forward_hook(lambda *_: None)
    rows = krony.explain(model)
    assert [row.backend for row in rows] == ["torch", "torch", "decode", "decode"]
    assert "c_fc" in rows[0].why_not[0][1]
    model.train()
    assert {row.backend for row in krony.explain(model) if row.kind == "mlp"} == {"torch"}
    assert not any(isinstance(m, KroneckerLinear) for m in tiny("gpt2").modules())
    assert krony.explain(tiny("gpt2")) == []


def test_sums_of_groups_are_explained_group_by_group():
    made = layer(((18, 20), (2, 2), 1), ((36, 1), (1, 40), 3))
    rows = krony.explain(made, tokens=500)
    assert [(row.name, row.kind, row.how) for row in rows] == [
        ("", "layer", "group by group"),
        (".groups.0", "group", "the factors"),
        (".groups.1", "group", "the factors"),
    ]
    many = layer(((6, 8), (6, 5), 30))
    assert krony.explain(many, tokens=500)[0].how == "W, formed"
    many.keeps_formed = True
    assert krony.explain(many, tokens=500)[0].how == "W, kept"


@pytest.mark.parametrize("formed", [False, True])
def test_lowered_it_is_the_same_matrix(formed):
    made = layer(((18, 20), (2, 2), 1), ((36, 1), (1, 40), 3))
    made.keeps_formed = formed
    lowered = lower(made)
    assert lowered.formed == formed
    assert lowered.shape == (36, 40)
    weight = sum(group.to_dense() for group in lowered.groups)
    torch.testing.assert_close(weight, made.to_dense(), rtol=1e-5, atol=1e-5)
    assert lower(made) is lowered
    made.groups[0].large = nn.Sequential(made.groups[0].large)  # an adapter, say
    assert lower(made) is None
