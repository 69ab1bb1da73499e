"""What a model takes: bytes on disk, and peak memory in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from krony.errors import KronyError
from krony.hf import checkpoints
from krony.measure.evaluate import context_length
from krony.measure.memory import peak_bytes, peak_resident_bytes
from krony.measure.runtimes import Runner

PROMPT, NEW = 128, 8


def disk_bytes(source: str | Path) -> int:
    """Bytes of the safetensors weights of a model that has been loaded before."""
    path = checkpoints.resolve(source)
    if not Path(path).is_dir():
        path = snapshot_download(path, local_files_only=True)
    return checkpoints.directory_bytes(path)


def peak_memory(source: str | Path, dtype: str | None, device: str, threads: int) -> int:
    """Bytes that loading a model, a prompt and a few tokens add to a fresh process.

    On a GPU the peak of what torch holds there; on a CPU how far the peak of the resident memory
    rises over that of the process before it loads anything.

    Args:
        dtype: a name of `checkpoints.DTYPES`; None keeps that of the checkpoint.
    Raises:
        KronyError: the process ended without a figure.
    """
    job = json.dumps([str(source), dtype, device, threads])
    command = [sys.executable, "-m", "krony.measure.footprint", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise KronyError(f"can't measure the memory of {source} in a process of its own: {reason}")
    return int(done.stdout.split()[-1])


def _here(source: str, dtype: str | None, device: str, threads: int) -> int:
    """The same, in this process."""
    torch.set_num_threads(threads)
    # What torch sets up at its first product is no part of the model.
    torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    before = 0 if torch.device(device).type == "cuda" else peak_resident_bytes()
    model = checkpoints.load_model(source, checkpoints.DTYPES[dtype] if dtype else None, device)
    prompt = min(PROMPT, context_length(model) - NEW)
    Runner(model).loop(torch.zeros(1, prompt, dtype=torch.long, device=device), NEW)
    return peak_bytes(model) - before


if __name__ == "__main__":
    print(_here(*json.loads(sys.argv[1])))
