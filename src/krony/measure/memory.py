"""Memory of a process: the most that it held, and freed memory that is not given back."""

import ctypes
import re
import sys
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from krony.errors import KronyError

# Of glibc's malloc.h: the size from which memory is asked of the system for one block alone, what
# may lie free at the end of the heap, and what is asked for beyond what is needed.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2


def keep_memory() -> bool:
    """From now on this process keeps freed memory for the next tensor; whether it can be told so.

    glibc gives blocks of over 32 MB back and asks for them again: a fresh page costs more than a
    sum over it, and the activations and logits of every step are such blocks. For commands that run
    the same sizes again and again; a program of others decides that for itself.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    most = 2**31 - 1
    kept = mallopt(_MMAP_THRESHOLD, most) and mallopt(_TRIM_THRESHOLD, most)
    return bool(kept and mallopt(_TOP_PAD, 2**26))


def parse_bytes(text: str | None, option: str = "--memory") -> int | None:
    """8,000,000,000 from "8GB" or "8G". Raises `KronyError`."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if found is None or not float(found[1]):
        raise KronyError(f"{option} {text!r} is no size of memory; write for example 8GB")
    return int(float(found[1]) * 1000 ** "_kmgt".index(found[2] or "_"))


def free_bytes(device: torch.device) -> int:
    """Memory that is still to be had, on a GPU or in this machine; within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        return min(free, most - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such limit, or another system
        return free


def peak_bytes(model: PreTrainedModel) -> int:
    """Peak memory of this process: on the GPU if the model is there, else resident."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory this process has held resident."""
    # Not getrusage on Linux: a process starts there with the peak of the one that started it.
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
