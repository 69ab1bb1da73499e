"""What a training step costs, and what the device is best at."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from krony.healing.objective import Objective


def fastest_dtype(device: torch.device) -> str:
    """bfloat16 where a product in it is clearly faster on the device, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype, device=device)
        repeats = []
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            repeats.append(time.perf_counter() - start)
        seconds[dtype] = min(repeats)
    return "bfloat16" if seconds[torch.bfloat16] * 1.2 < seconds[torch.float32] else "float32"


def flops_per_token(model: PreTrainedModel, objective: Objective, window: int) -> float:
    """Floating-point operations of a training step a token, teacher included, as torch counts."""
    ids = torch.zeros(1, window, dtype=torch.long, device=model.device)
    training = model.training
    model.train()
    with FlopCounterMode(display=False) as counter:
        objective(model, ids)["loss"].backward()
    model.zero_grad()
    model.train(training)
    return float(counter.get_total_flops()) / window
