"""Own one-stage detector without anchors: each location predicts classes, four distances and a quality.

After FCOS (Tian et al. 2019, https://arxiv.org/abs/1904.01355): a small residual backbone, a feature pyramid
(Lin et al. 2017, https://arxiv.org/abs/1612.03144) where there are several levels, and one head shared by
them. Raw outputs per location; thresholds and non-maximum suppression belong to whoever uses them.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Settings
from pipeline.models.layers import Norm, Residual, check_input, conv_block, init_weights, norm_layer
from pipeline.models.outputs import DetectionOutput

PRIOR = 0.01
"""Class probability of a fresh network: focal loss needs a small one (Lin et al. 2017, 1708.02002, 4.1)."""
FIRST_DISTANCE = 2.0
"""Distance from location to box edge of a fresh network, in strides."""
_MAX_LOG_DISTANCE = 8.0


class AnchorFree(Settings):
    """Settings of the detector: ``build(num_classes)`` gives the network."""

    task: ClassVar[Literal["segmentation", "detection"]] = "detection"

    width: int = Field(default=32, ge=1, le=512)
    """Channels after the stride-2 stem; twice as many at each coarser level, up to 8 times ``width``."""
    depth: int = Field(default=1, ge=0, le=16)
    """Residual blocks at each level from stride 4 on."""
    strides: tuple[int, ...] = (8, 16, 32)
    """Levels that predict, ascending powers of two from 4 to 128, each twice the one before; one is enough
    where objects are of about one size."""
    head_width: int | None = Field(default=None, ge=1, le=1024)
    """Channels of pyramid and head; None = 4 times ``width``."""
    head_depth: int = Field(default=1, ge=0, le=8)
    """3x3 convolutions in each of the head's two towers (classes; box and quality)."""
    norm: Norm = "batch"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping a channel before the two towers."""

    @field_validator("strides")
    @classmethod
    def _doubling(cls, strides: tuple[int, ...]) -> tuple[int, ...]:
        first = strides[0] if strides else 0
        wanted = tuple(first * 2**level for level in range(len(strides)))
        if first not in (4, 8, 16, 32, 64, 128) or strides != wanted or strides[-1] > 128:
            raise ValueError("wanted powers of two from 4 to 128, each twice the last, as [8, 16, 32]")
        return strides

    def build(self, num_classes: int) -> nn.Module:
        """The network with random weights; forward (N, 3, H, W) -> DetectionOutput."""
        return AnchorFreeModule(self, num_classes)

    def outputs(self, num_classes: int) -> int:
        """Logits at a location: one a class."""
        return num_classes


class AnchorFreeModule(nn.Module):
    """Images (N, 3, H, W) -> DetectionOutput, in train and eval alike; H, W multiples of ``stride``."""

    def __init__(self, settings: AnchorFree, num_classes: int) -> None:
        super().__init__()
        width, norm = settings.width, settings.norm
        self.strides = settings.strides
        self.stride = settings.strides[-1]
        channels = [width * min(2**level, 8) for level in range(self.stride.bit_length() - 1)]
        self.stem = conv_block(3, channels[0], norm, stride=2)
        self.stages = nn.ModuleList(
            _stage(before, after, settings.depth, norm)
            for before, after in zip(channels[:-1], channels[1:], strict=True)
        )
        head_width = settings.head_width or 4 * width
        self.pyramid = _Pyramid(channels[-len(self.strides) :], head_width, norm)
        self.drop = nn.Dropout2d(settings.dropout)
        levels = len(self.strides)
        self.class_tower = _Tower(head_width, settings.head_depth, levels, norm)
        self.box_tower = _Tower(head_width, settings.head_depth, levels, norm)
        self.classes = nn.Conv2d(head_width, num_classes, 1)
        self.distances = nn.Conv2d(head_width, 4, 1)
        self.quality = nn.Conv2d(head_width, 1, 1)
        self.scales = nn.Parameter(torch.ones(levels))
        init_weights(self)
        for layer, bias in (
            (self.classes, -math.log((1 - PRIOR) / PRIOR)),
            (self.distances, math.log(FIRST_DISTANCE)),
            (self.quality, 0.0),
        ):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)  # pyright: ignore[reportArgumentType]

    def forward(self, images: Tensor) -> DetectionOutput:
        """(N, 3, H, W) -> DetectionOutput; the levels follow each other, row-major within each."""
        check_input(images, self.stride)
        x = self.stem(images)
        features: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        features = self.pyramid(features[-len(self.strides) :])
        return _join([self._level(level, feature) for level, feature in enumerate(features)])

    @property
    def backbone(self) -> list[nn.Module]:
        """The parts that see the image first, input first; the pyramid is not one of them."""
        return [self.stem, self.stages]

    def _level(self, level: int, feature: Tensor) -> DetectionOutput:
        """Outputs of one pyramid level (N, c, h, w)."""
        feature = self.drop(feature)
        about_class = self.class_tower(feature, level)
        about_box = self.box_tower(feature, level)
        stride = self.strides[level]
        centres = grid_centres(feature.shape[-2], feature.shape[-1], stride, feature.device)
        # Boxes in float32 whatever the autocast type: bfloat16 has 8 bits, which is pixels of error at 640.
        raw = _flatten(self.distances(about_box)).float() * self.scales[level].float()
        distances = raw.clamp(max=_MAX_LOG_DISTANCE).exp() * stride
        boxes = torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)
        return DetectionOutput(
            logits=_flatten(self.classes(about_class)),
            boxes=boxes,
            quality=_flatten(self.quality(about_box)).squeeze(-1),
            centres=centres,
            strides=torch.full_like(centres[:, 0], stride),
        )


class _Pyramid(nn.Module):
    """Lateral 1x1 convolutions, top-down sums, and a 3x3 convolution a level; one level: lateral only."""

    def __init__(self, channels: list[int], width: int, norm: Norm) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Identity() if len(channels) == 1 and inputs == width else nn.Conv2d(inputs, width, 1)
            for inputs in channels
        )
        smooth = len(channels) if len(channels) > 1 else 0
        self.smooth = nn.ModuleList(conv_block(width, width, norm) for _ in range(smooth))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Fine to coarse (N, c_i, h_i, w_i) -> fine to coarse (N, width, h_i, w_i)."""
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        if len(levels) == 1:
            return levels
        for level in range(len(levels) - 2, -1, -1):
            levels[level] = levels[level] + F.interpolate(levels[level + 1], scale_factor=2.0, mode="nearest")
        return [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]


class _Tower(nn.Module):
    """3x3 convolutions shared by all levels, each with a norm of its own for every level.

    Shared batch norm would be trained on each level's statistics and evaluated on their mixture.
    """

    def __init__(self, width: int, depth: int, levels: int, norm: Norm) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.ModuleList(norm_layer(norm, width) for _ in range(levels)) for _ in range(depth))

    def forward(self, x: Tensor, level: int) -> Tensor:
        for conv, norms in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norms[level](conv(x)))  # pyright: ignore[reportIndexIssue]
        return x


def grid_centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Centres x, y (height * width, 2) in input pixels of a grid's cells, row-major: (col + .5) * stride."""
    ys = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) * stride
    xs = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride
    return torch.stack([xs.expand(height, width), ys[:, None].expand(height, width)], dim=-1).reshape(-1, 2)


def _stage(inputs: int, outputs: int, depth: int, norm: Norm) -> nn.Sequential:
    blocks = [Residual(outputs, norm) for _ in range(depth)]
    return nn.Sequential(conv_block(inputs, outputs, norm, stride=2), *blocks)


def _flatten(x: Tensor) -> Tensor:
    """(N, c, h, w) -> (N, h * w, c)."""
    return x.flatten(2).transpose(1, 2)


def _join(levels: list[DetectionOutput]) -> DetectionOutput:
    if len(levels) == 1:
        return levels[0]
    return DetectionOutput(
        logits=torch.cat([level.logits for level in levels], dim=1),
        boxes=torch.cat([level.boxes for level in levels], dim=1),
        quality=torch.cat([level.quality for level in levels], dim=1),  # pyright: ignore[reportArgumentType]
        centres=torch.cat([level.centres for level in levels], dim=0),
        strides=torch.cat([level.strides for level in levels], dim=0),
    )
