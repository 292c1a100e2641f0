"""Optimiser, learning-rate schedule, clipping and averaged weights: functions of settings and step."""

import copy
import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Settings


class OptimSettings(Settings):
    """How weights are updated; steps are optimiser steps."""

    name: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD, beta1 of AdamW."""
    nesterov: bool = False
    beta2: float = Field(default=0.999, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    """Not applied to norms, biases and other vectors. AdamW's is decoupled (Loshchilov & Hutter 2019)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise to ``lr``; never more than half of all steps."""
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    """Where the cosine ends, as a fraction of ``lr``."""
    clip: float = Field(default=0.0, ge=0)
    """Largest norm of the whole gradient; 0 = no clipping."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the averaged weights, which are the ones validated and kept; 0 = off."""


def build(settings: OptimSettings, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of ``module``'s trainable parameters; vectors (norms, biases, scales) get no decay."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, settings.beta2))


def lr_at(settings: OptimSettings, step: int, steps: int) -> float:
    """Learning rate of step ``step`` (0 is the first) of ``steps``: pure, so resuming needs no state.

    Linear warm-up, ``lr * (step + 1) / warmup``; then constant, or half a cosine (Loshchilov & Hutter 2017,
    1608.03983) from ``lr`` down to ``lr * final_lr_fraction`` at the last step and after it.
    """
    warmup = min(settings.warmup_steps, max(steps, 0) // 2)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    progress = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
    low = settings.final_lr_fraction
    return settings.lr * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(settings: OptimSettings, parameters: Iterable[Tensor]) -> Tensor:
    """Scale gradients in place to a whole norm of at most ``clip``; returns the norm before, on the device.

    Clip the gradient summed over ranks and accumulation, once a step. With clip 0 only the norm is taken.
    """
    limit = settings.clip or math.inf
    return torch.nn.utils.clip_grad_norm_(parameters, limit)


class Ema:
    """Exponential moving average of a module's weights (Polyak & Juditsky 1992), in a frozen copy of it.

    The decay rises as ``(1 + n) / (10 + n)`` up to ``decay``, so that short runs are not held back by the
    random start. Integer buffers are copied; ``module`` must be the bare one, not its DDP wrapper.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards ``module``; call after each optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        source = module.state_dict()
        for name, average in self.module.state_dict().items():
            if average.is_floating_point():
                average.lerp_(source[name].to(average.dtype), 1 - decay)
            else:
                average.copy_(source[name])
