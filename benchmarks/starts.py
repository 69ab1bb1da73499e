"""How a benchmark's model starts: plan and initialisation by name, at a share of its MLPs."""

from dataclasses import dataclass

from transformers import PreTrainedModel

import krony
from krony.compression.factorise import DATA
from krony.hf.families import Target, find_targets
from krony.hf.plan import matrix_plan

WEIGHTS_ONLY = krony.DataOptions(sequential=False, gradients=False)
SMALL = {0.5: (2, 1), 0.25: (2, 2)}  # the paper's kind of factors, by the share that they leave
ONE_TERM = "one term"
WHITENED, LOW_RANK, SUMS = "whitened SVD", "low rank", "balanced sum"
NARROW = "narrowed"  # fewer hidden units, matrices that are dense otherwise
BY_DATA = (ONE_TERM, WHITENED, LOW_RANK, SUMS, NARROW)


@dataclass(frozen=True)
class Start:
    """What `krony.compress` takes, beside calibration windows where `init` is "data"."""

    plan: krony.Plan
    init: str
    options: krony.DataOptions | None = None


def low_rank_plan(targets: list[Target], ranks: list[int]) -> krony.Plan:
    """The low-rank corner at the given ranks."""
    matrices = [
        matrix_plan(t, (krony.Factors((t.shape[0], 1), (1, t.shape[1]), rank),))
        for t, rank in zip(targets, ranks, strict=True)
    ]
    return krony.Plan(tuple(matrices))


def named(model: PreTrainedModel, name: str, share: float) -> Start:
    """A structure fitted to data by its name, or the paper's one term by an initialisation's.

    Args:
        model: the packaged one, for whose matrices the sums are counted.
        share: 0.5 or 0.25.
    """
    if name in (WHITENED, LOW_RANK):
        targets = find_targets(model, "mlp")
        ranks = [int(share * t.shape[0] * t.shape[1] / sum(t.shape)) for t in targets]
        options = WEIGHTS_ONLY if name == WHITENED else None
        return Start(low_rank_plan(targets, ranks), DATA, options)
    if name == NARROW:
        fewer = [t.narrowed(int(share * t.hidden)) for t in find_targets(model, "mlp")]
        return Start(krony.Plan(tuple(matrix_plan(t, ()) for t in fewer)), DATA)
    if name == SUMS:
        one = krony.Factors((64, 16), (16, 16)).parameters
        terms = int(share * 1024 * 256 / one)
        return Start(krony.make_plan(model, small=(16, 16), terms=terms), DATA)
    paper = krony.make_plan(model, small=SMALL[share])
    return Start(paper, DATA if name == ONE_TERM else name)
