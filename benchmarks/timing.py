"""The one loop that benchmarks are timed in: `krony.measure.bench`'s, as `krony bench` runs it.

Rivals take turns in one process, after a run of each that warms up; a ratio is the median of ratios
within a round. On a GPU the times are those of CUDA events, else of a monotonic clock.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from krony.measure.bench import in_turn
from krony.measure.roofline import timed


def rounds(
    jobs: Mapping[str, Callable[[], Any]],
    device: torch.device | str,
    seconds: float = 2.0,
    least: int = 3,
    most: int = 1_000_000,
) -> dict[str, list[float]]:
    """Seconds of each job by round: `least` rounds, then more for `seconds`, at most `most`."""
    where = torch.device(device)

    def clocked(job: Callable[[], Any]) -> Callable[[], float]:
        return lambda: timed(job, where)

    timers = {name: clocked(job) for name, job in jobs.items()}
    return in_turn(timers, seconds=seconds, least=least, most=most)


def against(taken: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Of each rival the speed against the reference, its spread over rounds, and milliseconds."""
    found = {}
    for name, times in taken.items():
        each = [other / own for other, own in zip(taken[reference], times, strict=True)]
        found[name] = {
            "ratio": round(statistics.median(each), 3),
            "least": round(min(each), 3),
            "most": round(max(each), 3),
            "milliseconds": round(statistics.median(times) * 1e3, 4),
        }
    return found


def device_here() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
