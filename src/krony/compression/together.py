"""Several processes on one compression: each takes a part of the windows, and sums are added up.

Moments are sums over tokens, so that one all-reduce a block makes them whole; what follows from
them every process finds alike. The process group is the launcher's (`accelerate launch`, torchrun).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from krony.errors import KronyError


def place() -> tuple[int, int]:
    """(number of this process, how many)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(windows: Tensor, batch: int) -> Tensor:
    """This process's windows: every so many-th batch.

    Raises:
        KronyError: fewer batches than processes.
    """
    rank, count = place()
    if count == 1:
        return windows
    batches = windows.split(batch)
    if len(batches) < count:
        raise KronyError(
            f"{len(windows)} calibration windows in batches of {batch} are too few for {count} "
            "processes; give more windows, or start fewer processes"
        )
    return torch.cat(batches[rank::count])


def add_up(tensor: Tensor) -> None:
    """The sum over all processes, in its place."""
    if place()[1] == 1:
        return
    # NCCL takes tensors on GPUs only; moments may lie on the CPU.
    moved = tensor.cuda() if dist.get_backend() == "nccl" else tensor.contiguous()
    dist.all_reduce(moved)
    if moved is not tensor:
        tensor.copy_(moved)


def total(count: int) -> int:
    """The sum of a number over all processes."""
    found = torch.tensor(count)
    add_up(found)
    return int(found)


def meet() -> None:
    """Wait for all processes."""
    if place()[1] > 1:
        dist.barrier()
