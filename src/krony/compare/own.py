"""Krony's own: factors and widths by budget, and ordinary, smaller models."""

from __future__ import annotations

from transformers import PreTrainedModel

from krony.compare.evidence import Evidence
from krony.compression.budget import make_budget_plan
from krony.compression.factorise import DATA, compress
from krony.compression.plain import slim
from krony.hf.provenance import note_harm
from krony.measure import info


def factored(evidence: Evidence, share: float) -> PreTrainedModel:
    """Hidden units, low rank and Kronecker sums of least predicted harm."""
    model, windows, seed = evidence.copy(), evidence.windows, evidence.seed
    found = make_budget_plan(
        model,
        windows,
        share=share,
        target="all",
        moments=evidence.moments,
        seed=seed,
        work=evidence.work,
        progress=evidence.progress,
    )
    compress(
        model,
        found.plan,
        init=DATA,
        seed=seed,
        calibration=windows,
        moments=found.moments,
        work=evidence.work,
        progress=evidence.progress,
    )
    note_harm(model, found.harm)
    return model


def ordinary(evidence: Evidence, share: float) -> PreTrainedModel:
    """One width for all MLPs, fewer heads, fewer blocks: what the architecture itself can say."""
    return slim(
        evidence.model,
        evidence.windows,
        parameters=info.parameters(evidence.model) - evidence.removed(share),
        seed=evidence.seed,
        progress=evidence.progress,
    )
