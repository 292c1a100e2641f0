"""Blocks that the project's own networks share: convolution + norm + ReLU, initialisation, input check."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import InputError

Norm = Literal["batch", "group"]
Head = Literal["multiclass", "binary"]
"""One logit a class (softmax), or one for two classes: that of class 0 against class 1, so softmax over [z, 0]."""


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """Batch norm, or group norm with as many groups (at most 8) as divide ``channels``.

    Group norm (Wu & He 2018, https://arxiv.org/abs/1803.08494) does not mix images: use it where a worker's
    batch is small, or where the gradient must not depend on how rows are sharded.
    """
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(8, channels), channels)


def conv_block(inputs: int, outputs: int, norm: Norm, *, stride: int = 1) -> nn.Sequential:
    """3x3 convolution (no bias: the norm has one), norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, norm_layer(norm, outputs), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """``relu(x + f(x))`` with two 3x3 convolutions in f (He et al. 2015); (N, c, H, W) -> (N, c, H, W)."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.first = conv_block(channels, channels, norm)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = norm_layer(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) -> (N, c, H, W)."""
        return torch.relu(x + self.norm(self.second(self.first(x))))


def init_weights(module: nn.Module) -> None:
    """Kaiming-normal weights (fan out, ReLU) and zero biases of every convolution below."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def outputs_of(head: Head, num_classes: int) -> int:
    """Channels that a head gives; a binary one wants exactly two classes."""
    if head == "multiclass":
        return num_classes
    if num_classes != 2:
        raise InputError(
            f"model.head = binary wants exactly 2 classes (the background is one), found {num_classes}; "
            f"set model.head to multiclass"
        )
    return 1


def set_prior(bias: Tensor, prior: Sequence[float]) -> None:
    """Set a head's bias to log class frequencies, floored at one in ten thousand.

    Args:
        bias: (C,) of a softmax head over C classes, or (1,) of a binary one: the log odds of class 0.
        prior: A frequency for each class, at any scale.
    """
    num_classes = 2 if len(bias) == 1 else len(bias)
    if len(prior) != num_classes or min(prior) < 0 or not 0 < sum(prior) < math.inf:
        raise InputError(
            f"model.prior wants one frequency for each of the {num_classes} classes, not negative and not all 0, "
            f"found {list(prior)}"
        )
    logits = torch.tensor([value / sum(prior) for value in prior]).clamp(min=1e-4).log()
    with torch.no_grad():
        bias.copy_(logits[:1] - logits[1:] if len(bias) == 1 else logits)


def check_input(images: Tensor, stride: int) -> None:
    """Refuse a height or width that is no multiple of ``stride``, naming the size to pad to."""
    height, width = int(images.shape[-2]), int(images.shape[-1])
    if height % stride or width % stride:
        up = (math.ceil(height / stride) * stride, math.ceil(width / stride) * stride)
        raise InputError(
            f"the model wants image sides that are multiples of {stride}, found {height}x{width} "
            f"(height x width); set input.size to [{up[0]}, {up[1]}] or pad to it"
        )
