"""Krony-PT's three initializations (arXiv 2412.12351) at any size, in the paper's order of factors.

The paper has a few sizes: MLPs only, one shape for all of them. Here the shape of the small factor
and the number of terms are those that come nearest to a budget, the smallest small factor first.
Pruning keeps every second (or fourth) row or column, so that a budget between two such sizes is met
by matrices of both, spread evenly.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

import krony
from krony.compare.evidence import Evidence
from krony.compression.plain import matrices
from krony.errors import KronyError
from krony.hf.families import find_targets
from krony.hf.plan import Plan, make_plan
from krony.words import Layout

SIDES = (1, 2, 3, 4, 6, 8)  # of a small factor
NEAR = 0.005  # of the matrices: near enough to a budget to look no further
ORDER: Layout = "large-outer"
PRUNED = ((2, 1), (2, 2))  # small factors of half and of a quarter


def van_loan(evidence: Evidence, share: float) -> PreTrainedModel:
    """Sums of Kronecker products, nearest to the weights (section III-E)."""
    return _made(evidence, sum_plan(evidence, share), "van-loan")


def scaled(evidence: Evidence, share: float) -> PreTrainedModel:
    """The same, rescaled to the norm of the weights (section III-F)."""
    return _made(evidence, sum_plan(evidence, share), "van-loan-scaled")


def prune(evidence: Evidence, share: float) -> PreTrainedModel:
    """One term each, by the pruning initialization (section III-G)."""
    return _made(evidence, prune_plan(evidence, share), "prune")


def _made(evidence: Evidence, plan: Plan, init: str) -> PreTrainedModel:
    return krony.compress(evidence.copy(), plan, init=init, seed=evidence.seed)


def mlp_share(evidence: Evidence, share: float) -> float:
    """What a budget of all matrices leaves of those in MLPs, the only ones that change.

    Raises:
        KronyError: nothing.
    """
    mlp = matrices(evidence.model, "mlp")
    left = 1 - evidence.removed(share) / mlp
    if left <= 0:
        raise KronyError(
            f"Krony-PT changes MLPs only: without any of them "
            f"{1 - mlp / evidence.matrices:.0%} of the blocks' matrices would stay, more than the "
            f"budget of {share:.0%}"
        )
    return left


def sum_plan(evidence: Evidence, share: float) -> Plan:
    """The same small factor and the same number of terms for all MLPs, nearest below the budget."""
    left = mlp_share(evidence, share)
    shapes = [t.shape for t in find_targets(evidence.model, "mlp")]
    whole = sum(m * n for m, n in shapes)
    best: tuple[float, int, int, int] | None = None
    for area, p, q in sorted((p * q, p, q) for p in SIDES for q in SIDES if p * q > 1):
        if any(m % p or n % q or m % q or n % p for m, n in shapes):
            continue
        one = sum(m * n // area + area for m, n in shapes)
        terms = min(int(left * whole / one), area - 1)
        gap = left - terms * one / whole
        if terms and (best is None or gap < best[0] - 1e-12):
            best = gap, p, q, terms
        if best is not None and best[0] * whole <= NEAR * evidence.matrices:
            break
    if best is None:
        raise KronyError(f"no sum of Kronecker products is as small as a budget of {share:.0%}")
    _, p, q, terms = best
    return make_plan(evidence.model, small=(p, q), terms=terms, layout=ORDER)


def prune_plan(evidence: Evidence, share: float) -> Plan:
    """Matrices of one size and of the next, spread evenly over the model."""
    left = mlp_share(evidence, share)
    half, quarter = (make_plan(evidence.model, small=s, layout=ORDER) for s in PRUNED)
    if left < quarter.parameters / quarter.dense_parameters:
        raise KronyError(
            f"pruning leaves a quarter of the MLPs, more than the {left:.0%} of a budget of "
            f"{share:.0%}"
        )
    dense = half.dense_parameters
    above = left >= half.parameters / dense
    small, large = (half.parameters, dense) if above else (quarter.parameters, half.parameters)
    part = (left * dense - small) / (large - small)  # of the matrices that are the larger ones
    chosen = []
    for i, (one, other) in enumerate(zip(half.matrices, quarter.matrices, strict=True)):
        is_large = int((i + 1) * part + 1e-9) > int(i * part + 1e-9)
        if not above:
            chosen.append(one if is_large else other)
        elif not is_large:
            chosen.append(one)
    return replace(half, matrices=tuple(chosen))
