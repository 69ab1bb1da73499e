"""The methods that `krony compare` knows, one line each. A new one is a file and a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from krony.compare import depth, lowrank, own, paper, pruning
from krony.compare.evidence import Evidence
from krony.errors import KronyError

Make = Callable[[Evidence, float], PreTrainedModel]


@dataclass(frozen=True)
class Method:
    """One way to make a model smaller.

    Attributes:
        make: gives the model with that share of the blocks' matrices; raises `KronyError` where the
            method can't.
        source: where it was published.
    """

    name: str
    make: Make
    title: str
    source: str
    ours: bool = False


def _slicegpt(evidence: Evidence, share: float) -> PreTrainedModel:
    raise KronyError(
        "SliceGPT is not built here: it rotates the hidden states of every block in its own way, "
        "with a matrix in every residual connection, which no class of transformers has"
    )


SVD = partial(partial, lowrank.low_rank)
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("krony", own.factored, "Krony", "this library", True),
        Method("krony-plain", own.ordinary, "Krony, plain", "this library", True),
        Method("svd-llm", SVD(scale=lowrank.whitening), "SVD-LLM", "arXiv 2403.07378"),
        Method("flap", pruning.flap, "FLAP", "arXiv 2312.11983"),
        Method("wanda-sp", pruning.wanda, "Wanda-sp", "arXiv 2306.11695 and 2312.11983"),
        Method("llm-pruner", pruning.taylor, "LLM-Pruner", "arXiv 2305.11627"),
        Method("minitron-width", pruning.minitron, "Minitron, width", "arXiv 2407.14679"),
        Method("minitron-depth", depth.by_loss, "Minitron, depth", "arXiv 2407.14679"),
        Method("shortgpt", depth.block_influence, "ShortGPT", "arXiv 2403.03853"),
        Method("every-other", depth.every_other, "Every other block", "arXiv 1910.01108"),
        Method("magnitude", pruning.magnitude, "Magnitude", "Han et al. 2015"),
        Method("asvd", SVD(scale=lowrank.activation), "ASVD", "arXiv 2312.05821"),
        Method("fwsvd", SVD(scale=lowrank.fisher), "FWSVD", "arXiv 2207.00112"),
        Method("svd", SVD(scale=lowrank.plain), "SVD", "Eckart and Young 1936"),
        Method("van-loan", paper.van_loan, "Krony-PT, Van Loan", "arXiv 2412.12351"),
        Method("van-loan-scaled", paper.scaled, "Krony-PT, scaled", "arXiv 2412.12351"),
        Method("prune", paper.prune, "Krony-PT, prune", "arXiv 2412.12351"),
        Method("slicegpt", _slicegpt, "SliceGPT", "arXiv 2401.15024"),
    )
}


def chosen(names: Sequence[str]) -> list[Method]:
    """The methods of these names, in the registry's order; "all" is every one.

    Raises:
        KronyError: a name that is none.
    """
    asked = {part.strip() for name in names for part in name.split(",") if part.strip()}
    if unknown := sorted(asked - {*METHODS, "all"}):
        raise KronyError(f"no method {unknown[0]!r}; there are all, {', '.join(METHODS)}")
    return [m for name, m in METHODS.items() if name in asked or "all" in asked]
