"""Optimiser, learning-rate schedule, clipping and averaged weights: functions of settings and step."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Settings


class OptimSettings(Settings):
    """How weights are updated; steps are optimiser steps."""

    name: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    backbone_lr: float = Field(default=1.0, gt=0)
    """Factor of the backbone's learning rate; below 1 where it starts from trained weights."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor for each further layer down the backbone, whose last layer has ``backbone_lr``
    (Howard & Ruder 2018, 1801.06146; Bao et al. 2022, 2106.08254)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD, beta1 of AdamW."""
    nesterov: bool = False
    beta2: float = Field(default=0.999, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    """Not applied to norms, biases and other vectors. AdamW's is decoupled (Loshchilov & Hutter 2019)."""
    l1: float = Field(default=0.0, ge=0)
    """Adds ``l1 * sum |w|`` to the loss, over all but norms, biases and other vectors."""
    l2: float = Field(default=0.0, ge=0)
    """Adds ``l2 / 2 * sum w^2`` likewise. With SGD the same as as much ``weight_decay``; AdamW scales this
    gradient like any other, its ``weight_decay`` not."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise to ``lr``; never more than half of all steps."""
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    """Where the cosine ends, as a fraction of ``lr``."""
    clip: float = Field(default=0.0, ge=0)
    """Largest norm of the whole gradient; 0 = no clipping."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the averaged weights, which are the ones validated and kept; 0 = off."""


def build_optimizer(
    settings: OptimSettings, module: nn.Module, layers: Sequence[Sequence[str]] = ()
) -> torch.optim.Optimizer:
    """The optimiser of ``module``'s trainable parameters; vectors (norms, biases, scales) get no decay.

    Args:
        settings: How.
        module: The bare network, already frozen where it is to be.
        layers: Names of the backbone's parameters, input first (``pipeline.models.backbone_layers``); wanted where
            ``backbone_lr`` or ``layer_decay`` is not 1. Layers without a trainable parameter do not count.

    Returns:
        An optimiser whose groups carry ``scale``, their factor of the learning rate (see ``set_lr``).
    """
    if (settings.backbone_lr, settings.layer_decay) != (1.0, 1.0) and not layers:
        raise ValueError("backbone_lr and layer_decay want the names of the backbone's layers")
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    scales = _scales(settings, [[name for name in layer if name in trainable] for layer in layers])
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for matrices in (True, False):
        for name, parameter in trainable.items():
            if (parameter.ndim > 1) == matrices:
                groups.setdefault((matrices, scales.get(name, 1.0)), []).append(parameter)
    built = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if matrices else 0.0,
            "scale": scale,
            "lr": settings.lr * scale,
        }
        for (matrices, scale), parameters in groups.items()
    ]
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return torch.optim.SGD(built, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)
    return torch.optim.AdamW(built, lr=settings.lr, betas=(settings.momentum, settings.beta2))


def _scales(settings: OptimSettings, layers: list[list[str]]) -> dict[str, float]:
    """Factor of the learning rate by parameter name, for the backbone alone; empty layers are left out."""
    down = [layer for layer in layers if layer][::-1]
    return {
        name: settings.backbone_lr * settings.layer_decay**depth for depth, layer in enumerate(down) for name in layer
    }


def lr_at(settings: OptimSettings, step: float, steps: float) -> float:
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
    """Set the learning rate of every parameter group: ``lr`` times the group's ``scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


@torch.no_grad()
def add_penalties(settings: OptimSettings, module: nn.Module) -> None:
    """Add the gradient of ``l1 * sum |w| + l2 / 2 * sum w^2`` over the weights that learn: ``l1 sign(w) + l2 w``.

    Call once an optimiser step, when the gradient is whole (summed over ranks and accumulation): a penalty on
    each batch would count as often as there are batches. Vectors (norms, biases) and what is frozen are exempt.
    Nothing waits for the device.
    """
    if not settings.l1 and not settings.l2:
        return
    learning = [p for p in module.parameters() if p.requires_grad and p.ndim > 1 and p.grad is not None]
    gradients = [p.grad for p in learning if p.grad is not None]
    weights = [p.detach() for p in learning]
    # One kernel for many tensors, as torch's own optimisers do it.
    foreach: Any = torch
    if settings.l1 and weights:
        foreach._foreach_add_(gradients, foreach._foreach_sign(weights), alpha=settings.l1)
    if settings.l2 and weights:
        foreach._foreach_add_(gradients, weights, alpha=settings.l2)


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
