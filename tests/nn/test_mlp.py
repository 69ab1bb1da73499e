"""Factored MLPs at once on a CPU, against the modules that they stand for."""

import copy
import gc
import io
import weakref

import accelerate
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, Phi3Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.pytorch_utils import Conv1D

from helpers import replicated
from krony import KroneckerGroup, KroneckerLinear
from krony.nn import activations, lower, mlp
from krony.nn.cpu import fewer
from krony.nn.cpu import kernels as cpu_kernels
from krony.nn.explain import explain

pytestmark = pytest.mark.skipif(cpu_kernels.library() is None, reason="needs a C compiler")
MODEL, HIDDEN = 48, 144

# (large, small, terms) of the matrix that writes the hidden axis and of the one that reads it; a
# list is a sum of groups, None a matrix that is not factored.
PAIRS = {
    "mixed between": (((48, 48), (3, 1), 1), ((48, 48), (1, 3), 1)),
    "mixed at both ends": (((72, 24), (2, 2), 1), ((24, 72), (2, 2), 1)),
    "terms": (((48, 16), (3, 3), 2), ((16, 48), (3, 3), 4)),
    "unlike slices": (((48, 48), (3, 1), 1), ((24, 72), (2, 2), 2)),
    "many slices": (((9, 16), (16, 3), 1), ((16, 9), (3, 16), 1)),
    "low rank": (((144, 1), (1, 48), 7), ((48, 1), (1, 144), 5)),
    "sums of groups": ([((144, 1), (1, 48), 3), ((48, 48), (3, 1), 1)], ((48, 48), (1, 3), 1)),
    "one dense": (((48, 48), (3, 1), 1), None),
    "by columns": (Conv1D, ((48, 48), (1, 3), 1)),
    "nothing factored": (Conv1D, Conv1D),
}


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """Names of the compiled functions, as they are called."""
    made = []
    functions = cpu_kernels.library()

    def noting(name, function):
        return lambda *arguments: made.append(name) or function(*arguments)

    noted = {key: noting(key[0], function) for key, function in functions.items()}
    monkeypatch.setattr(cpu_kernels, "library", lambda: noted)
    return made


def layer(m, n, spec, bias, layout="small-outer"):
    if spec is None:
        return nn.Linear(n, m, bias)
    if spec is Conv1D:
        made = Conv1D(m, n)
        made.bias.copy_(torch.randn(m))
        return made
    specs = spec if isinstance(spec, list) else [spec]
    made = KroneckerLinear(n, m, [KroneckerGroup(*s, layout) for s in specs], bias)
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


def gpt2(pair=PAIRS["mixed between"], bias=True, layout="small-outer"):
    made = GPT2MLP(HIDDEN, GPT2Config(n_embd=MODEL, activation_function="gelu_new"))
    made.c_fc = layer(HIDDEN, MODEL, pair[0], bias, layout)
    made.c_proj = layer(MODEL, HIDDEN, pair[1], bias, layout)
    activations.fuse(made)
    return made.eval()


def llama(pair=PAIRS["mixed between"], bias=False, layout="small-outer"):
    config = LlamaConfig(
        hidden_size=MODEL, intermediate_size=HIDDEN, mlp_bias=bias, num_attention_heads=4
    )
    made = LlamaMLP(config)
    made.gate_proj = layer(HIDDEN, MODEL, pair[0], bias, layout)
    made.up_proj = layer(HIDDEN, MODEL, pair[0], bias, layout)
    made.down_proj = layer(MODEL, HIDDEN, pair[1], bias, layout)
    return made.eval()


def phi3(pair=PAIRS["mixed between"], bias=False, layout="small-outer"):
    made = Phi3MLP(Phi3Config(hidden_size=MODEL, intermediate_size=HIDDEN))
    made.gate_up_proj = layer(2 * HIDDEN, MODEL, ((96, 48), (3, 1), 1), bias, layout)
    made.down_proj = layer(MODEL, HIDDEN, pair[1], bias, layout)
    return made.eval()


def close(found, wanted):
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < (3e-6 if wanted.dtype == torch.float32 else 1.5e-2)
    assert found.dtype == wanted.dtype


@pytest.mark.parametrize("dtype", list(cpu_kernels.NAMES))
@pytest.mark.parametrize(
    ("bias", "layout"),
    [
        (True, "small-outer"),
        (False, "large-outer"),
        pytest.param(False, "small-outer", marks=pytest.mark.slow),
        pytest.param(True, "large-outer", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("make", [gpt2, llama, phi3])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_it_is_the_module_that_it_was(pair, make, bias, layout, dtype, monkeypatch):
    # Also for these few tokens.
    monkeypatch.setattr(fewer, "SUMMING", {True: (1, 1), False: (1, 1)})
    monkeypatch.setattr(fewer, "SUMMING_WITH_TILES", 1)
    module = make(pair, bias, layout).to(dtype)
    plain = copy.deepcopy(module)
    narrowed = [name for name, x in module.named_children() if isinstance(x, Conv1D)]
    mlp.install(module, narrowed)
    assert mlp.record_of(module) is not None
    for shape in ((1, 1), (2, 1), (1, 5), (32,), (2, 40), (0,)):
        x = torch.randn(*shape, MODEL).to(dtype)
        wanted = plain(x)
        found = module(x)
        assert found.shape == wanted.shape
        if x.numel():
            close(found, wanted)


@pytest.mark.parametrize(("tokens", "name"), [(2, "decode"), (60, "hidden")])
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    "pair", ["mixed between", "mixed at both ends", "terms", "one dense", "by columns"]
)
def test_one_call_does_it(pair, make, tokens, name, calls):
    module = make(PAIRS[pair])
    mlp.install(module)
    x = torch.randn(tokens, MODEL)
    module(x)
    calls.clear()
    module(x)
    # For many tokens the slices at both ends are mixed by the same function.
    assert set(calls) == {name}
    assert name == "hidden" or len(calls) == 1


def test_what_is_left_to_the_module(calls):
    module = gpt2()
    mlp.install(module)
    x = torch.randn(1, MODEL)
    wanted = module(x)
    calls.clear()

    def at_once(x=x):
        calls.clear()
        close(module(x), wanted.to(x.dtype))
        return calls == ["decode"]

    assert at_once()
    module.double()
    assert not at_once(x.double())
    module.float()
    assert at_once()
    with torch.enable_grad():
        assert not at_once()
        loss = module(x).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    module.train()
    module.dropout.p = 0.0
    assert not at_once()
    module.eval()
    for child in (module.c_fc, module.act, module.c_proj, module.c_fc.groups[0]):
        seen = []
        handle = child.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert not at_once()
        handle.remove()
        assert at_once()
        if child is not module.c_fc.groups[0]:
            assert seen == [1]
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() > 0
    close(module.forward(hidden_states=x), wanted)
    step = torch.compile(module, backend="eager", fullgraph=True)
    close(step(x), wanted)


def test_changes_are_seen():
    module = gpt2()
    mlp.install(module)

    def check():
        plain = copy.deepcopy(module)
        mlp.restore(plain)
        assert "forward" not in plain.__dict__
        for tokens in (1, 60):
            x = torch.randn(tokens, MODEL, dtype=module.c_fc.bias.dtype)
            close(module(x), plain(x))

    check()
    module.c_fc.groups[0].small.mul_(2)  # in place
    check()
    group = module.c_proj.groups[0]
    group.large.weight = nn.Parameter(torch.randn_like(group.large.weight))
    check()
    group.large = nn.Sequential(copy.deepcopy(group.large), nn.Identity())  # an adapter, say
    check()
    group.large = copy.deepcopy(module.c_proj.groups[0].large[0])
    check()
    module.act = nn.ReLU()
    check()
    module.act = activations.TanhGELU(nn.GELU)
    check()
    module.to(torch.bfloat16)
    check()
    module.to(torch.float32)
    check()
    module.c_fc = layer(HIDDEN, MODEL, PAIRS["mixed at both ends"][0], True)
    check()
    copied = copy.deepcopy(module)
    copied.c_fc.bias.zero_()
    x = torch.randn(1, MODEL)
    assert not torch.allclose(copied(x), module(x))
    check()


def test_classes_and_names_stay():
    module = llama()
    mlp.install(module)
    assert type(module) is LlamaMLP
    before = list(module.state_dict())
    mlp.install(module)
    assert list(module.state_dict()) == before
    mlp.restore(module)
    assert mlp.record_of(module) is None
    assert "forward" not in module.__dict__


def test_a_module_is_copied_pickled_and_replicated_whole():
    module = gpt2()
    mlp.install(module)
    x = torch.randn(1, MODEL)
    wanted = module(x)
    twin = copy.deepcopy(module)
    assert explain(twin)[0].backend == "decode"
    module.c_fc.bias.add_(1)
    assert torch.equal(twin(x), wanted)
    stream = io.BytesIO()
    torch.save(twin, stream)
    stream.seek(0)
    close(torch.load(stream, weights_only=False)(x), wanted)
    # As nn.DataParallel makes one for another device: with parameters of its own.
    replica = replicated(twin)
    for group in (replica.c_fc.groups[0], replica.c_proj.groups[0]):
        group.small *= 2
    assert not torch.allclose(replica(x), wanted)
    assert torch.equal(twin(x), wanted)


def test_hooks_of_accelerate_are_kept_whatever_came_first():
    x = torch.randn(1, MODEL)
    for first in ("hook", "install"):
        module, seen = gpt2(), []

        class Hook(accelerate.hooks.ModelHook):
            def pre_forward(self, module, *args, seen=seen, **kwargs):
                seen.append(1)
                return args, kwargs

        wanted = module(x)
        if first == "hook":
            accelerate.hooks.add_hook_to_module(module, Hook())
        mlp.install(module)
        if first == "install":
            accelerate.hooks.add_hook_to_module(module, Hook())
        close(module(x), wanted)
        assert seen == [1]
        assert explain(module)[0].backend == "decode"
        mlp.restore(module)
        close(module(x), wanted)
        assert seen == [1, 1]
        accelerate.hooks.remove_hook_from_module(module)
        close(module(x), wanted)
        assert seen == [1, 1]


class Doubled(nn.Module):
    """The children of an MLP, and something else made of them."""

    def __init__(self):
        super().__init__()
        self.up, self.act = layer(HIDDEN, MODEL, PAIRS["mixed between"][0], True), nn.SiLU()
        self.down = layer(MODEL, HIDDEN, PAIRS["mixed between"][1], True)

    def forward(self, x):
        return 2 * self.down(self.act(self.up(x)))


class Shuffled(Doubled):
    """The parts, in another order than they are named in."""

    def __init__(self):
        super().__init__()
        self.up, self.down = self.down, self.up

    def forward(self, x):
        return self.up(self.act(self.down(x)))


@pytest.mark.parametrize("kind", [Doubled, Shuffled])
def test_what_only_looks_like_an_mlp_stays_what_it_is(kind):
    module = kind().eval()
    plain = copy.deepcopy(module)
    mlp.install(module)
    for tokens in (1, 60):
        x = torch.randn(tokens, MODEL)
        assert torch.equal(module(x), plain(x))
    (row, *_) = explain(module)
    assert row.backend == "torch"
    assert {why for _, why in row.why_not} == {"it computes something else than its parts make up"}


def test_others_are_let_alone():
    dense = GPT2MLP(HIDDEN, GPT2Config(n_embd=MODEL))
    more = gpt2()
    more.norm = nn.LayerNorm(MODEL)
    erf = gpt2()
    erf.act = nn.GELU()
    model = nn.ModuleList([dense, more, erf])
    mlp.install(model)
    assert not any(map(mlp.record_of, model))


LAYOUTS = ("small-outer", "large-outer")
LOW_RANK = ((192, 1), (1, 64), 8), ((64, 1), (1, 192), 6)
BETWEEN = ((64, 64), (3, 1), 1), ((64, 64), (1, 3), 1)


@pytest.mark.skipif(not cpu_kernels.has_tiles(), reason="needs a tile unit")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    ("pair", "layouts"),
    [
        (BETWEEN, LAYOUTS),
        ((((96, 32), (2, 2), 1), ((32, 96), (2, 2), 1)), LAYOUTS),
        ((((96, 32), (2, 2), 2), ((32, 96), (2, 2), 3)), LAYOUTS),
        ((None, BETWEEN[1]), ()),  # slices of what is in one piece
        ((BETWEEN[0], None), LAYOUTS[:1]),  # hidden features in their own order only
        (LOW_RANK, LAYOUTS),
        ((LOW_RANK[0], BETWEEN[1]), ()),
        ((((192, 1), (1, 64), 7), ((64, 1), (1, 192), 5)), ()),  # features in pairs
        (([BETWEEN[0], LOW_RANK[0]], BETWEEN[1]), ()),
    ],
)
def test_what_goes_through_the_tile_unit(pair, layouts, make, layout, monkeypatch):
    monkeypatch.setattr(f"{__name__}.MODEL", 64)
    monkeypatch.setattr(f"{__name__}.HIDDEN", 192)
    module = make(pair, True, layout).bfloat16()
    plain = copy.deepcopy(module)
    mlp.install(module)
    for shape in ((9,), (2, 40), (3, 70)):
        x = torch.randn(*shape, 64).bfloat16()
        close(module(x), plain(x))
        (row, *_) = explain(module, x.shape[:-1].numel())
        assert (row.backend == "tiles") == (layout in layouts)


@pytest.mark.skipif(not cpu_kernels.has_tiles(), reason="needs a tile unit")
@pytest.mark.parametrize("pair", [BETWEEN, LOW_RANK], ids=["mixed between", "low rank"])
def test_the_tile_unit_sees_what_changes(pair, monkeypatch):
    monkeypatch.setattr(f"{__name__}.MODEL", 64)
    monkeypatch.setattr(f"{__name__}.HIDDEN", 192)
    module = gpt2(pair).bfloat16()
    mlp.install(module)
    x = torch.randn(40, 64).bfloat16()

    def kept():
        return lower.keep_mlp(module, mlp.record_of(module).parts)

    def right(module=module, x=x):
        found = module(x)
        close(found, type(module).forward(module, x))
        return found

    def taken():
        before = kept()
        right()
        return kept() is before

    before = right()
    assert taken()
    assert explain(module, 40)[0].backend == "tiles"
    changes = {
        "bias": lambda: module.c_fc.bias.add_(1),
        "last bias": lambda: module.c_proj.bias.mul_(2),
        "small": lambda: module.c_fc.groups[0].small.mul_(2),
        "large": lambda: module.c_proj.groups[0].large.weight.neg_(),
        "another parameter": lambda: setattr(
            module.c_fc.groups[0],
            "small",
            nn.Parameter(torch.randn_like(module.c_fc.groups[0].small)),
        ),
        "its memory": lambda: setattr(
            module.c_proj.groups[0].small, "data", torch.randn_like(module.c_proj.groups[0].small)
        ),
        "another layer": lambda: setattr(module, "c_fc", copy.deepcopy(module.c_fc)),
    }
    for change in changes.values():
        old = kept()
        change()
        assert kept() is not old
        right()
        assert taken()
    assert not torch.equal(right(), before)
    twin = copy.deepcopy(module)
    twin.c_fc.bias.zero_()
    right(twin)
    assert taken()
    for change in (module.float, module.train):  # what was made of the factors takes no memory then
        made = weakref.ref(kept().lowered)
        change()
        gc.collect()
        assert made() is None
        module.bfloat16().eval()
        right()
    seen = []
    handle = module.c_fc.groups[0].large.register_forward_hook(lambda *of: seen.append(of))
    right()
    assert seen
    handle.remove()
    right()


@pytest.mark.skipif(not cpu_kernels.has_tiles(), reason="needs a tile unit")
def test_w_that_is_kept_goes_through_the_tile_unit():
    module = gpt2(PAIRS["mixed between"]).bfloat16()
    mlp.install(module)
    x = torch.randn(40, MODEL).bfloat16()
    for layer in (module.c_fc, module.c_proj):
        layer.keeps_formed = True
    wanted = module(x)
    assert explain(module, 40)[0].backend == "tiles"
    assert module.c_fc.formed() is not None
    module.c_fc.groups[0].small.mul_(-1)
    found = module(x)
    close(found, type(module).forward(module, x))
    assert not torch.equal(found, wanted)
