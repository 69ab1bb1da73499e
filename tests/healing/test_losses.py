"""Healing losses against plain formulas, whole and in pieces."""

import math

import pytest
import torch
from torch import nn

from krony.errors import KronyError
from krony.healing import losses

N, D, V = 13, 6, 11


@pytest.fixture
def parts():
    student, teacher = nn.Linear(D, V).double(), nn.Linear(D + 2, V, bias=False).double()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    known = torch.randn(N, D + 2, dtype=torch.float64)
    return hidden, student, torch.randint(0, V, (N,)), known, teacher


def plain(hidden, head, labels, known, teacher, temperature=1.0):
    """Cross-entropy and KL(teacher ‖ student)·T², a prediction at a time, by definition."""
    ce = kl = torch.zeros((), dtype=torch.float64)
    for h, label, t in zip(hidden, labels, known, strict=True):
        z = head(h)
        ce = ce - (z[label] - torch.log(z.exp().sum()))
        p = (teacher(t) / temperature).exp()
        q = (z / temperature).exp()
        p, q = p / p.sum(), q / q.sum()
        kl = kl + (p * (p / q).log()).sum() * temperature**2
    return ce / len(hidden), kl / len(hidden)


@pytest.mark.parametrize("kind", ["ce", "kl", "ce+kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("held", [10_000, 5 * V, 1])
def test_next_token_is_the_plain_formula(parts, kind, temperature, held):
    hidden, head, labels, known, teacher = parts
    names = losses.parse(kind)
    taught = (known, teacher)
    found = losses.next_token(hidden, head, labels, V, names, taught, temperature, held)
    ce, kl = plain(*parts, temperature)
    wanted = sum({"ce": ce, "kl": kl}[name] for name in names)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(found, [hidden, *head.parameters()])
    expected = torch.autograd.grad(wanted, [hidden, *head.parameters()])
    for g, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_logits_are_never_held_whole(parts):
    hidden, _, labels, *_ = parts
    largest = 0

    def head(h):
        nonlocal largest
        largest = max(largest, h.shape[0] * V)
        return h @ torch.ones(D, V, dtype=h.dtype)

    losses.next_token(hidden, head, labels, V, logits=4 * V).backward()
    assert largest == 4 * V


def test_kl_to_itself_is_zero_and_never_negative(parts):
    hidden, head, _, known, teacher = parts
    assert losses.forward_kl(head(hidden), head(hidden)).item() == pytest.approx(0, abs=1e-6)
    assert losses.forward_kl(head(hidden), teacher(known)).item() > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_of_kl_is_that_of_its_definition(temperature):
    z, teacher = 3 * torch.randn(2, 4, 9, dtype=torch.float64)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses.forward_kl(z, teacher, temperature), z)


@pytest.mark.parametrize("in_cache", [1, 40, 10_000])
def test_pieces_in_cache_change_nothing(monkeypatch, in_cache):
    monkeypatch.setattr(losses, "IN_CACHE", in_cache)
    z, teacher = 3 * torch.randn(2, 7, V, dtype=torch.float64)
    labels, z = torch.randint(0, V, (7,)), z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses.cross_entropy(z, labels), z)
    assert torch.autograd.gradcheck(lambda z: losses.forward_kl(z, teacher, 2.0), z)
    wanted = nn.functional.cross_entropy(z, labels, reduction="sum")
    torch.testing.assert_close(losses.cross_entropy(z, labels), wanted)
    with torch.no_grad():
        torch.testing.assert_close(losses.cross_entropy(z, labels), wanted)


def test_feature_error_is_a_share_of_the_variance():
    wanted = [torch.randn(4, 5, 8) + 3, 10 * torch.randn(4, 5, 8)]
    assert losses.feature_error(wanted, wanted).item() == 0
    means = [w.flatten(0, 1).mean(0).expand_as(w) for w in wanted]
    assert losses.feature_error(means, wanted).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("text", ["", "mse", "ce+ce", "ce,kl"])
def test_bad_losses_are_named(text):
    with pytest.raises(KronyError, match=r"no loss .* give ce, kl, features"):
        losses.parse(text)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    loss = losses.cross_entropy(torch.zeros(3, V), torch.tensor([0, 4, 10]))
    assert loss.item() == pytest.approx(3 * math.log(V))
