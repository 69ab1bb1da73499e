"""Every method that benchmarks compare: its plan and initialisation at a share of the matrices.

One place for baselines, ours and others', each as good as it is published: whoever adds one here
has it in every benchmark that compares methods.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import krony
from krony.compare.depth import drop_blocks
from krony.compare.lowrank import low_rank_plan
from krony.compression import calibrate
from krony.compression.budget import make_budget_plan
from krony.compression.calibrate import Inputs, Moments
from krony.compression.factorise import DATA
from krony.compression.structures import balanced_shapes, sized
from krony.hf.families import Target, find_targets
from krony.hf.plan import Plan, matrix_plan
from krony.maths import schemes
from krony.measure import info

# Structures that are fitted to data, at one share of every matrix.
WHITENED, LOW_RANK, SUMS, NARROW = "whitened SVD", "low rank", "balanced sum", "narrowed"
STRUCTURES = (WHITENED, LOW_RANK, SUMS, NARROW)
ONE_TERM = "one term"  # the paper's shape, fitted to data
BUDGET, DROPPED, DENSE = "budget", "layers dropped", "dense"
OURS = (BUDGET, *STRUCTURES, DROPPED)  # at a size, in no shape of the paper's
WEIGHTS_ONLY = krony.DataOptions(sequential=False, gradients=False)
SMALL = {0.5: (2, 1), 0.25: (2, 2)}  # the paper's kind of factors, by the share that they leave


@dataclass(frozen=True)
class Start:
    """What `krony.compress` takes, beside calibration windows where `init` is "data"."""

    plan: Plan
    init: str
    options: krony.DataOptions | None = None


def named(
    model: PreTrainedModel, name: str, share: float, moments: dict[str, Moments] | None = None
) -> Start:
    """A structure fitted to data in all MLPs, or the paper's one term by an initialisation's name.

    The paper's is in its own order of factors; fitted to data, in that of less harm where there are
    moments to tell.

    Args:
        share: of the parameters; 0.5 or 0.25 for the paper's.
    """
    if name in STRUCTURES:
        options = WEIGHTS_ONLY if name == WHITENED else None
        return Start(structured(find_targets(model, "mlp"), name, share), DATA, options)
    paper = krony.make_plan(model, small=SMALL[share], layout="large-outer")
    if name == ONE_TERM and moments is not None:
        paper = krony.choose_layouts(model, paper, moments)
    return Start(paper, DATA if name == ONE_TERM else name)


def structured(targets: list[Target], method: str, share: float) -> Plan:
    """One structure at the same share of every matrix; one of `STRUCTURES`."""
    if method == NARROW:
        fewer = [t.narrowed(round(share * t.hidden)) for t in targets]
        return Plan(tuple(matrix_plan(t, ()) for t in fewer))
    if method == WHITENED:  # as published: both halves in full
        ranks = [max(1, int(share * t.shape[0] * t.shape[1] / sum(t.shape))) for t in targets]
        return low_rank_plan(targets, ranks)

    def factors(target: Target) -> krony.Factors:
        m, n = target.shape
        return sized(*(balanced_shapes((m, n)) if method == SUMS else ((m, 1), (1, n))), share)

    return Plan(tuple(matrix_plan(t, (factors(t),)) for t in targets))


# Sizes of a study: the paper's models, in MLPs, and shares of all matrices of the blocks.
SIZES = {
    **{name: schemes.SCHEMES[name] for name in ("96M", "81M", "80M-2", "92M-4")},
    "81M-768": replace(schemes.SCHEMES["81M"], shape=(768, 768)),
}
SHARES = ("0.8", "0.625", "0.5")


@dataclass(frozen=True)
class Cell:
    """A size and a method: an initialisation of the paper's shape of that size, or one of OURS."""

    size: str
    method: str

    @property
    def name(self) -> str:
        """As `--cells` takes it."""
        return f"{self.size} {self.method}".strip()


PAPERS = ("van-loan-scaled", DATA, "van-loan", "prune")
# What answers the question comes first: one run may not last for all of them.
CELLS = [
    Cell("", DENSE),
    *(Cell(size, BUDGET) for size in SHARES),
    *(Cell(size, m) for size in SHARES for m in (WHITENED, DROPPED, LOW_RANK, SUMS)),
    *(Cell(size, m) for size in ("81M", "96M") for m in ("van-loan-scaled", BUDGET, LOW_RANK)),
    *(Cell(size, m) for size in ("81M", "96M") for m in ("prune", DROPPED)),
    *(Cell(size, m) for size in ("81M", "96M") for m in (NARROW, WHITENED, SUMS)),
    *(Cell(size, m) for size in ("81M", "96M") for m in (DATA, "van-loan")),
    *(Cell("81M-768", m) for m in PAPERS),
    *(Cell(s, m) for m in PAPERS if m != "prune" for s in ("92M-4", "80M-2")),
    *(Cell(size, "random") for size in SIZES),
]


class Methods:
    """Makes the model of any cell.

    Args:
        base: the dense model, which stays as it is.
        windows: token ids to calibrate on, (windows, window).
        cache: file for the moments, which one run finds for all that follow.
        target: what moments are found of: "mlp" does for the paper's sizes.
    """

    def __init__(
        self, base: PreTrainedModel, windows: Tensor, cache: Path, seed: int, target: str = "all"
    ) -> None:
        self.base, self.windows, self.cache, self.seed = base, windows, cache, seed
        self.measured = find_targets(base, target)  # whose moments are found

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Of all matrices that any cell changes."""
        if self.cache.exists():
            return read_moments(self.cache, self.base.device)
        names = [t.name for t in self.measured]
        found = calibrate.calibrate(self.base, self.windows, names, seed=self.seed)
        write_moments(self.cache, found)
        return found

    def targets(self, size: str) -> list[Target]:
        """Which matrices a size is a share of: the paper's of MLPs, the others of whole blocks."""
        return find_targets(self.base, "mlp" if size in SIZES else "all")

    def paper_plan(self, size: str) -> Plan:
        """The paper's shape of that size, by its small factor: in other models the same shares."""
        scheme = SIZES[size]
        gpt2 = (schemes.GPT2_HIDDEN, schemes.GPT2_MODEL)
        small = schemes.divide(gpt2, scheme.shape)
        return krony.make_plan(
            self.base,
            small=small,
            terms=scheme.terms,
            scalars=scheme.scalars,
            layout="large-outer",  # as the paper has them
        )

    def share(self, size: str) -> float:
        """Of the parameters of `targets`, that stay."""
        if size not in SIZES:
            return float(size)
        paper = self.paper_plan(size)
        return paper.parameters / paper.dense_parameters

    def prepare(self, cell: Cell) -> None:
        """Find, or read, what cells share, so that their own time can be measured without it."""
        if cell.method in (*OURS, DATA) and cell.method != DROPPED:
            _ = self.moments

    def compressed(self, cell: Cell) -> PreTrainedModel:
        """The model, compressed as the cell says."""
        model = copy.deepcopy(self.base)
        if cell.method == DENSE:
            return model
        targets, share = self.targets(cell.size), self.share(cell.size)
        if cell.method == DROPPED:
            dense = sum(t.shape[0] * t.shape[1] for t in targets)
            most = info.parameters(model) - dense + int(share * dense)
            return drop_blocks(model, most, self.windows[:8].to(model.device))
        if cell.method not in (*OURS, DATA):
            plan = self.paper_plan(cell.size)
            return krony.compress(model, plan, init=cell.method, seed=self.seed)
        if cell.method == DATA:
            plan = krony.choose_layouts(model, self.paper_plan(cell.size), self.moments)
        elif cell.method == BUDGET:
            target = "mlp" if cell.size in SIZES else "all"
            plan = make_budget_plan(
                model, self.windows, share=share, target=target, moments=self.moments
            ).plan
        else:
            plan = structured(targets, cell.method, share)
        return krony.compress(
            model,
            plan,
            init=DATA,
            seed=self.seed,
            calibration=self.windows,
            moments={m.name: self.moments[m.name] for m in plan.matrices},
            options=WEIGHTS_ONLY if cell.method == WHITENED else None,
        )


def write_moments(path: Path, moments: dict[str, Moments]) -> None:
    """One safetensors file."""
    tensors: dict[str, Tensor] = {}
    for name, entry in moments.items():
        assert entry.gradient_square is not None
        tokens = torch.tensor([entry.inputs.tokens, entry.tokens])
        parts = (entry.inputs.total, entry.inputs.square, entry.gradient_square, tokens)
        tensors |= {f"{name}:{i}": part.cpu().clone() for i, part in enumerate(parts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.rename(path)


def read_moments(path: Path, device: torch.device) -> dict[str, Moments]:
    """The inverse of `write_moments`."""
    tensors = load_file(path, device=str(device))
    found = {}
    for name in dict.fromkeys(key.rpartition(":")[0] for key in tensors):
        total, square, gradient, tokens = (tensors[f"{name}:{i}"] for i in range(4))
        inputs = Inputs(total, square, int(tokens[0]))
        found[name] = Moments(inputs, gradient, int(tokens[1]))
    return found
