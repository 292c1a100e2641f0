"""What makes a network fast on the device at hand, without a change of its outputs beyond rounding."""

import contextlib
import logging
from typing import Any, Literal

import torch
from torch import nn

from pipeline.runtime.compiled import CompileFallback, compile_static

log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bf16"]
"""Type of convolutions and matrix products; losses, probabilities and sums stay float32. ``auto``: bf16 on a GPU
that has it, float32 elsewhere (on CPUs without AMX bf16 is several times slower)."""

Compile = Literal["auto"] | bool
"""Whether networks are compiled. ``auto``: on a GPU, where the run is long enough to earn the minute it takes."""
LONG_RUN_STEPS = 1000
"""Training steps from which compiling pays: at 0.1 s a step, a quarter saved is 25 s in a thousand."""


def pick_device(device: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def uses_bf16(device: torch.device, precision: Precision) -> bool:
    """Whether networks run under autocast to bfloat16."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[object]:
    """The context for forward passes; it does nothing in float32."""
    if not uses_bf16(device, precision):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def to_device_channels_last(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on the device, its weights channels last: convolutions are faster so on CPUs and GPUs alike."""
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module.to(device)


def wants_compile(device: torch.device, choice: Compile, steps: int) -> bool:
    """Whether a run of so many steps on this device is compiled."""
    if choice == "auto":
        return device.type == "cuda" and steps >= LONG_RUN_STEPS
    return choice


class Compiled:
    """A network's call, compiled for one input shape at a time; as it is, with one warning, once that has failed.

    It holds no weights: names in a state dict, and so checkpoints, are those of the module.
    """

    def __init__(self, module: nn.Module, backend: Any = "inductor") -> None:
        self._module = module
        self._compiled = compile_static(module, backend)
        self._fallback = CompileFallback("the network", log)

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self._module.training

    def __call__(self, *args: Any) -> Any:
        """The module's output."""
        return self._fallback.run(lambda: self._compiled(*args), lambda: self._module(*args))


def use_fused_kernels(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """One kernel for all weights on a GPU; call after a state was loaded, which brings its own device's choice."""
    fused = device.type == "cuda"
    for group in optimizer.param_groups:
        # Only optimisers that have the choice.
        if "fused" in group:
            group["fused"] = fused or None
        # Fused kernels want each parameter's step counter on the device of the parameter.
        for parameter in group["params"]:
            steps = optimizer.state.get(parameter, {}).get("step")
            if fused and isinstance(steps, torch.Tensor):
                optimizer.state[parameter]["step"] = steps.to(parameter.device, torch.float32)
