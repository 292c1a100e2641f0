"""What makes a network fast on the device at hand, without a change of what it says beyond rounding."""

import contextlib
from typing import Literal

import torch
from torch import nn

Precision = Literal["auto", "float32", "bf16"]
"""Of convolutions and matrix products; losses, probabilities and sums stay float32. ``auto``: bf16 on a GPU that has
it, float32 elsewhere (on CPUs without AMX bf16 is several times slower)."""


def pick_device(device: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def uses_bf16(device: torch.device, precision: Precision) -> bool:
    """Whether networks run under autocast to bfloat16."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[object]:
    """Around forward passes; does nothing in float32."""
    if not uses_bf16(device, precision):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on the device, its weights channels last: convolutions are faster so on CPUs and GPUs alike."""
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module.to(device)
