"""Rivals by low rank: the SVD of W S, where S says which inputs matter.

    plain SVD       S = 1
    FWSVD           S = diag √(Σ over outputs of the squared loss gradient): Hsu et al. 2022
    ASVD            S = diag (mean |x|)^½: Yuan et al. 2023, arXiv 2312.05821, at one share of every
                    matrix (its search for a share by matrix is left out)
    SVD-LLM         S Sᵀ = E[x xᵀ]: Wang et al. 2024, arXiv 2403.07378, the truncation by whitening

The best matrix of rank R in the norm ‖(W - Ŵ) S‖ is U Uᵀ W, U the R leading left singular vectors
of W S; they are the eigenvectors of the smaller of its two Gram matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.compare.evidence import Evidence
from krony.compression.calibrate import Moments
from krony.hf.families import Target, dense_weight
from krony.hf.modeling import KroneckerConfig, attach, build_layer, install
from krony.hf.plan import Plan, matrix_plan
from krony.maths import fit
from krony.maths.schemes import Factors
from krony.nn.layers import KroneckerLinear

FLOOR = 1e-6  # of the mean scale: what an input that is never there counts
Scale = Callable[[Evidence, Target], Tensor]


def weighted_svd(weight: Tensor, scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (m, R) and B (R, n), nearest to W (m, n) in the norm ‖(W - A B) S‖, float64.

    Args:
        scale: S, (n, n), or its diagonal, (n,).
    """
    weight = weight.double()
    m, n = weight.shape
    scaled = weight * scale if scale.dim() == 1 else weight @ scale
    if m <= n:
        left = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -rank:]
        return left, left.T @ weight
    right = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:]
    if scale.dim() == 1:
        return scaled @ right, right.T / scale
    back = torch.linalg.solve_triangular(scale.T, right, upper=True)  # S⁻ᵀ V
    return scaled @ right, back.T


def ranks(targets: list[Target], share: float) -> list[int]:
    """One share of every matrix, and what rounding leaves over to those that lost most by it."""
    exact = [share * t.shape[0] * t.shape[1] / sum(t.shape) for t in targets]
    found = [max(1, int(each)) for each in exact]
    most = int(share * sum(t.shape[0] * t.shape[1] for t in targets))
    left = most - sum(r * sum(t.shape) for r, t in zip(found, targets, strict=True))
    for i in sorted(range(len(targets)), key=lambda i: found[i] - exact[i]):
        if (cost := sum(targets[i].shape)) <= left and found[i] < min(targets[i].shape):
            found[i] += 1
            left -= cost
    return found


def low_rank_plan(targets: list[Target], ranks: list[int]) -> Plan:
    """Two matrices for each, of the given ranks."""
    matrices = [
        matrix_plan(t, (Factors((t.shape[0], 1), (1, t.shape[1]), rank),))
        for t, rank in zip(targets, ranks, strict=True)
    ]
    return Plan(tuple(matrices))


@torch.no_grad()
def low_rank(evidence: Evidence, share: float, scale: Scale) -> PreTrainedModel:
    """Every matrix of the blocks at one share of its parameters."""
    model, targets = evidence.copy(), evidence.targets
    evidence.removed(share)
    plan = low_rank_plan(targets, ranks(targets, share))
    for number, (target, matrix) in enumerate(zip(targets, plan.matrices, strict=True), 1):
        module = model.get_submodule(target.name)
        weight = dense_weight(module)
        a, b = weighted_svd(
            weight, scale(evidence, target).to(weight.device), matrix.groups[0].terms
        )
        layer = build_layer(matrix, weight.device, weight.dtype)
        assert isinstance(layer, KroneckerLinear)
        even = (a.norm(dim=0) / b.norm(dim=1).clamp(min=1e-300)).sqrt().clamp(min=1e-150)
        a, b = a / even, b * even[:, None]
        ones = torch.ones(len(b), dtype=b.dtype, device=b.device)
        layer.groups[0].set_factors(a.T[:, :, None], b[:, None, :], ones)  # type: ignore[operator]
        if layer.bias is not None:
            layer.bias.copy_(module.bias)  # type: ignore[arg-type]
        install(model, matrix, layer)
        if evidence.progress is not None:
            evidence.progress("Factoring", number, len(targets))
    attach(model, KroneckerConfig(plan.to_dict(), {"init": "svd", "seed": evidence.seed}))
    return model


def plain(evidence: Evidence, target: Target) -> Tensor:
    """Every input alike."""
    return torch.ones(target.shape[1], dtype=torch.float64)


def activation(evidence: Evidence, target: Target) -> Tensor:
    """ASVD's: the root of an input's mean absolute value."""
    return _floored(evidence.activity[target.name].double().mean(0).sqrt())


def fisher(evidence: Evidence, target: Target) -> Tensor:
    """FWSVD's: the root of the Fisher information of an input's weights."""
    return _floored(evidence.gradients[f"{target.name} fisher"].sqrt())


def whitening(evidence: Evidence, target: Target) -> Tensor:
    """SVD-LLM's: a lower triangular root of the second moment of the inputs."""
    entry = evidence.moments[target.name]
    assert isinstance(entry, Moments)
    found: Tensor = torch.linalg.cholesky(fit.ridged(entry.inputs.second, fit.INPUT_RIDGE))
    return found


def _floored(scale: Tensor) -> Tensor:
    return scale.clamp(min=FLOOR * max(float(scale.mean()), 1e-300))
