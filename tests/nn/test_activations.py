"""Activations in one kernel against the chains of transformers."""

import pytest
import torch
from torch import nn
from transformers import activations

from krony.nn.activations import TanhGELU, fuse, restore

CHAINS = {"gelu_new": activations.NewGELUActivation, "gelu_fast": activations.FastGELUActivation}


@pytest.mark.parametrize("kind", CHAINS.values(), ids=CHAINS)
def test_values_and_gradients_are_equal_but_for_rounding(kind):
    model = nn.Sequential(nn.Linear(8, 64), kind(), nn.Linear(64, 8)).double()
    x = 3 * torch.randn(50, 8, dtype=torch.float64)
    wanted = model(x)
    gradients = torch.autograd.grad(wanted.square().sum(), list(model.parameters()))
    fuse(model)
    assert not isinstance(model[1], kind)
    found = model(x)
    # The constant of gelu_fast has ten digits.
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    again = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    torch.testing.assert_close(again, gradients, rtol=1e-7, atol=1e-7)
    restore(model)
    assert type(model[1]) is kind
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_those_of_torch(dtype):
    """Ours on a CPU with a C compiler, also where the gradient comes expanded or transposed."""
    module, x = TanhGELU(nn.GELU), (3 * torch.randn(7, 33)).to(dtype)
    for of in (lambda y: y.sum(), lambda y: (y.T @ y).float().square().sum()):
        found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
        of(module(found)).backward()
        of(nn.functional.gelu(wanted, approximate="tanh")).backward()
        eps = torch.finfo(dtype).eps
        size = wanted.grad.abs().max().item()
        torch.testing.assert_close(found.grad, wanted.grad, rtol=8 * eps, atol=8 * eps * size)
    if dtype == torch.float32:
        twice = []
        for function in (module, lambda x: nn.functional.gelu(x, approximate="tanh")):
            once = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(function(once).sum(), once, create_graph=True)
            twice += torch.autograd.grad(slope.sum(), once)
        torch.testing.assert_close(*twice)


def test_other_activations_stay():
    kinds = [activations.QuickGELUActivation, activations.SiLUActivation, nn.GELU, nn.ReLU]
    model = nn.Sequential(*(kind() for kind in kinds))
    fuse(model)
    restore(model)
    assert [type(module) for module in model] == kinds
