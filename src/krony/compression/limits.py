"""What a plan may cost, in which currency, and the exact choice of least harm within it.

Three currencies: parameters (the size), multiply-adds a token (training, and reading a prompt), and
the time to decode a token, which is bound by the parameters read from memory but pays for
arithmetic. A budget is met in the currency it is given in. The objective asks for the same share in
one more: "decode" in time to decode, "throughput" in multiply-adds. Low rank costs its share in
each of them alike; a balanced sum of Kronecker products is far smaller than its arithmetic.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from krony.errors import KronyError
from krony.hf.families import Target
from krony.hf.plan import matrix_plan
from krony.maths.schemes import Factors

Objective = Literal["size", "decode", "throughput"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
Currency = Literal["parameters", "multiply-adds", "decode"]

# Multiply-adds that take the time of reading one parameter from memory. Measured on one core of an
# AVX2 server CPU in float32: 0.37 ns a parameter, 0.029 ns a multiply-add. Batch 1 on a GPU is
# of the same order in half precision (bytes halve, and so does the time of the arithmetic).
READ = 12


@dataclass(frozen=True)
class Candidate:
    """One way to store a matrix: groups of factors (none: dense), its costs and its harm.

    Attributes:
        reads: parameters that one token reads; None: all of them.
    """

    groups: tuple[Factors, ...]
    parameters: int
    multiply_adds: int
    harm: float
    reads: int | None = None

    def cost(self, currency: str) -> float:
        """In parameters, multiply-adds a token, or the time of that many reads a token."""
        if currency == "decode":
            reads = self.parameters if self.reads is None else self.reads
            return reads + self.multiply_adds / READ
        return self.multiply_adds if currency == "multiply-adds" else self.parameters


def candidate(target: Target, groups: tuple[Factors, ...], harm: float) -> Candidate:
    """The costs of these factors for that matrix; no groups: of the dense matrix."""
    plan = matrix_plan(target, groups)
    return Candidate(groups, plan.parameters, plan.multiply_adds, harm, plan.reads)


def limits(
    targets: Sequence[Target],
    total: int,
    *,
    share: float | None = None,
    parameters: int | None = None,
    flops: float | None = None,
    objective: str = "size",
) -> dict[Currency, float]:
    """The most that all targets together may cost, by currency.

    Args:
        total: parameters of the whole model.
        share: of the targets' parameters, between 0 and 1.
        parameters: of the whole model, instead of a share.
        flops: share of the targets' multiply-adds; alone, or beside a budget of parameters.
        objective: "size" adds nothing, "decode" and "throughput" the same share of their own.
    Raises:
        KronyError: no budget, two that say the same, or one that no choice of factors can meet.
    """
    if objective not in OBJECTIVES:
        raise KronyError(f"no objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    if share is not None and parameters is not None:
        raise KronyError("give a budget as a share or as the parameters of the model, not both")
    dense = [candidate(t, (), 0.0) for t in targets]
    whole = {c: sum(d.cost(c) for d in dense) for c in ("parameters", "multiply-adds", "decode")}
    found: dict[Currency, float] = {}
    if parameters is not None:
        kept = total - int(whole["parameters"])
        if not kept < parameters < total:
            raise KronyError(
                f"a model of {parameters:,} parameters can't be: with these targets it has "
                f"between {kept:,} and {total:,}"
            )
        found["parameters"] = parameters - kept
    elif share is not None:
        _check_share(share, "a budget", 1.0)
        found["parameters"] = int(share * whole["parameters"])
    if flops is not None:
        # Beside a budget of parameters it may be above 1: a bound on what sums may cost in time.
        _check_share(flops, "--flops", 1.0 if not found else 1e3)
        found["multiply-adds"] = int(flops * whole["multiply-adds"])
    if not found:
        raise KronyError("give a budget: a share, the parameters of the model, or --flops")
    currency, most = next(iter(found.items()))
    if objective == "throughput":
        if len(found) == 2:
            raise KronyError(
                "the objective throughput already holds the multiply-adds to the share of the "
                "budget; leave out --flops, or the objective"
            )
        found.setdefault("multiply-adds", most / whole[currency] * whole["multiply-adds"])
    elif objective == "decode":
        found["decode"] = most / whole[currency] * whole["decode"]
    for name in found:
        if not whole[name]:
            raise KronyError(f"the targets have no {name} to save; choose others with --target")
    return found


def _check_share(share: float, what: str, most: float) -> None:
    if not 0 < share < most:
        raise KronyError(f"{what} of {share} is no share; give a number between 0 and {most:,.0f}")


@contextmanager
def _silent_solver() -> Iterator[None]:
    """HiGHS prints debugging lines to file descriptor 1 whatever its options say, and standard
    output is for results. What else is written there meanwhile, by other threads, comes after."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)
            caught.seek(0)
            for line in caught:
                if not line.startswith(b"Highs"):
                    os.write(1, line)


def choose(
    candidates: Sequence[Sequence[Candidate]], most: dict[Currency, float]
) -> list[Candidate]:
    """One candidate of each list, their costs within every limit and their harm the least.

    Exact (HiGHS branch and bound, through scipy).

    Raises:
        KronyError: even the cheapest choice is over a limit.
    """
    for currency, limit in most.items():
        least = sum(min(c.cost(currency) for c in row) for row in candidates)
        if least > limit:
            raise KronyError(
                f"a budget of {limit:,.0f} ({currency}) can't be met: the smallest factors take "
                f"{least:,.0f}; give more"
            )
    candidates = [_undominated(row, list(most)) for row in candidates]
    flat = [candidate for row in candidates for candidate in row]
    rows = np.zeros((len(candidates), len(flat)))
    start = 0
    for i, row in enumerate(candidates):
        rows[i, start : start + len(row)] = 1
        start += len(row)
    # Scaled: HiGHS works with absolute tolerances of about 1e-6.
    harm = np.array([c.harm for c in flat])
    costs = np.array([[c.cost(name) / limit for c in flat] for name, limit in most.items()])
    with _silent_solver():
        solution = milp(
            harm / max(float(harm.max()), 1e-30) * 1e3,
            constraints=[
                LinearConstraint(costs, ub=1.0 - 1e-12),
                LinearConstraint(rows, lb=1, ub=1),
            ],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-4, "time_limit": 60},
        )
    if solution.x is None:
        raise KronyError(
            "no choice of factors meets all of the budget "
            f"({', '.join(f'{limit:,.0f} {name}' for name, limit in most.items())}); give more"
        )
    return [c for c, taken in zip(flat, solution.x, strict=True) if taken > 0.5]


def _undominated(row: Sequence[Candidate], currencies: list[Currency]) -> list[Candidate]:
    """Those than which no other is as good in everything and better, or earlier, in something."""
    figures = np.array([[c.harm, *(c.cost(name) for name in currencies)] for c in row])
    kept: list[int] = []
    for i in np.lexsort(figures.T[::-1]):  # by harm: only what was kept can dominate
        if not kept or not (figures[kept] <= figures[i]).all(1).any():
            kept.append(int(i))
    return [row[i] for i in sorted(kept)]
