"""Own one-stage detector without anchors: each location predicts classes, four distances and a quality.

After FCOS (Tian et al. 2019, https://arxiv.org/abs/1904.01355): a backbone (small and residual, of cross-stage
partial blocks, or timm's), a feature pyramid (Lin et al. 2017, https://arxiv.org/abs/1612.03144) or path
aggregation where there are several levels, and one decoupled head shared by them, with norms for each level.
Raw outputs per location; thresholds and non-maximum suppression belong to whoever uses them.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Settings
from pipeline.models.csp import Pan, conv_silu, csp_stage, timm_levels
from pipeline.models.layers import Norm, Residual, check_input, conv_block, init_weights, norm_layer
from pipeline.models.outputs import DetectionOutput

PRIOR = 0.01
"""Class probability of a fresh network: focal loss needs a small one (Lin et al. 2017, 1708.02002, 4.1)."""
FIRST_DISTANCE = 2.0
"""Distance from location to box edge of a fresh network, in strides."""
_MAX_LOG_DISTANCE = 8.0
Size = Literal["n", "s", "m"]
_MODERN: dict[str, Any] = {"block": "csp", "neck": "pan", "growth": 16, "head_depth": 2, "strides": (8, 16, 32)}
SIZES: dict[Size, dict[str, Any]] = {
    "n": {**_MODERN, "width": 16, "depth": 1},
    "s": {**_MODERN, "width": 32, "depth": 1},
    "m": {**_MODERN, "width": 48, "depth": 2, "growth": 12, "head_width": 160},
}
"""What ``size`` sets, where it is not set otherwise."""


class AnchorFree(Settings):
    """Settings of the detector: ``build(num_classes)`` gives the network."""

    task: ClassVar[Literal["segmentation", "detection"]] = "detection"
    losses: ClassVar[tuple[str, ...]] = ("aligned",)

    size: Size | None = None
    """A preset of the settings below, each of which may still be set otherwise: nano, small, medium, of 2.3, 9.2
    and 22 million parameters. None: a small network for few images and for a CPU, as these defaults say."""
    width: int = Field(default=32, ge=1, le=512)
    """Channels after the stride-2 stem; twice as many at each coarser level, up to ``growth`` times ``width``."""
    growth: int = Field(default=8, ge=1, le=64)
    """Most channels of a level, in widths."""
    depth: int = Field(default=1, ge=0, le=16)
    """Residual blocks at each level from stride 4 on; of ``csp``, twice as many at strides 8 and 16."""
    block: Literal["residual", "csp"] = "residual"
    """What the levels are made of: residual blocks with ReLU, or cross-stage partial ones with SiLU and spatial
    pyramid pooling at the coarsest level."""
    neck: Literal["fpn", "pan"] = "fpn"
    """How levels learn of each other: top-down sums, or top-down and bottom-up concatenation (path aggregation)."""
    backbone: str | None = None
    """A timm name, such as ``tf_efficientnet_lite0``, in place of the own backbone; its own norms; random weights,
    and others through ``transfer``."""
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

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        size = values.get("size") if isinstance(values, dict) else None
        return {**SIZES[size], **values} if isinstance(size, str) and size in SIZES else values

    @field_validator("strides")
    @classmethod
    def _doubling(cls, strides: tuple[int, ...]) -> tuple[int, ...]:
        first = strides[0] if strides else 0
        doubled = tuple(first * 2**level for level in range(len(strides)))
        if first not in (4, 8, 16, 32, 64, 128) or strides != doubled or strides[-1] > 128:
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
        levels = len(self.strides)
        channels = [width * min(2**level, settings.growth) for level in range(self.stride.bit_length() - 1)]
        widths = channels[-levels:]
        self.encoder: nn.Module | None = None
        if settings.backbone is None:
            self.stem, self.stages = _build_backbone(settings, channels)
            inputs = widths
        else:
            self.encoder, inputs = timm_levels(settings.backbone, self.strides)
        head_width = settings.head_width or 4 * width
        if settings.neck == "fpn":
            self.pyramid: nn.Module = _Pyramid(inputs, head_width, norm)
        else:
            self.pyramid = Pan(inputs, widths, head_width, settings.depth, norm)
        self.drop = nn.Dropout2d(settings.dropout)
        act = F.silu if settings.block == "csp" else torch.relu
        self.class_tower = _Tower(head_width, settings.head_depth, levels, norm, act)
        self.box_tower = _Tower(head_width, settings.head_depth, levels, norm, act)
        self.classes = nn.Conv2d(head_width, num_classes, 1)
        self.distances = nn.Conv2d(head_width, 4, 1)
        self.quality = nn.Conv2d(head_width, 1, 1)
        self.scales = nn.Parameter(torch.ones(levels))
        for part in self.children():
            if part is not self.encoder:
                init_weights(part)
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
        features = self.pyramid(self._features(images))
        return _join_levels([self._level(level, feature) for level, feature in enumerate(features)])

    @property
    def backbone(self) -> list[nn.Module]:
        """The parts that see the image first, input first; the pyramid is not one of them."""
        return [self.stem, self.stages] if self.encoder is None else [self.encoder]

    def _features(self, images: Tensor) -> list[Tensor]:
        """The backbone's levels (N, c_i, h_i, w_i), fine to coarse."""
        if self.encoder is not None:
            return self.encoder(images)
        x = self.stem(images)
        features: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[-len(self.strides) :]

    def _distances(self, feature: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, h * w, 4) float32 log distances in strides, whatever the autocast type.

        bfloat16 has 8 bits: a logarithm between 2 and 4 would be off by up to 0.8 %, and so the distance.
        """
        with torch.autocast(feature.device.type, enabled=False):
            layer = self.distances
            raw = F.conv2d(feature.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
        return _flatten(raw)

    def _level(self, level: int, feature: Tensor) -> DetectionOutput:
        """Outputs of one pyramid level (N, c, h, w)."""
        feature = self.drop(feature)
        class_features = self.class_tower(feature, level)
        box_features = self.box_tower(feature, level)
        stride = self.strides[level]
        centres = grid_centres(feature.shape[-2], feature.shape[-1], stride, feature.device)
        raw = self._distances(box_features) * self.scales[level].float()
        distances = raw.clamp(max=_MAX_LOG_DISTANCE).exp() * stride
        boxes = torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)
        return DetectionOutput(
            logits=_flatten(self.classes(class_features)),
            boxes=boxes,
            quality=_flatten(self.quality(box_features)).squeeze(-1),
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

    def __init__(
        self, width: int, depth: int, levels: int, norm: Norm, act: Callable[[Tensor], Tensor] = torch.relu
    ) -> None:
        super().__init__()
        self.act = act
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.ModuleList(norm_layer(norm, width) for _ in range(levels)) for _ in range(depth))

    def forward(self, x: Tensor, level: int) -> Tensor:
        for conv, norms in zip(self.convs, self.norms, strict=True):
            x = self.act(norms[level](conv(x)))  # pyright: ignore[reportIndexIssue]
        return x


def grid_centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Centres x, y (height * width, 2) in input pixels of a grid's cells, row-major: (col + .5) * stride."""
    ys = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) * stride
    xs = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride
    return torch.stack([xs.expand(height, width), ys[:, None].expand(height, width)], dim=-1).reshape(-1, 2)


def _build_backbone(settings: AnchorFree, channels: list[int]) -> tuple[nn.Module, nn.ModuleList]:
    """The stem to stride 2 and a stage for each further halving; ``channels`` by level from stride 2."""
    norm, depth, pairs = settings.norm, settings.depth, list(zip(channels[:-1], channels[1:], strict=True))
    if settings.block == "residual":
        return conv_block(3, channels[0], norm, stride=2), nn.ModuleList(_stage(*pair, depth, norm) for pair in pairs)
    last = len(pairs) - 1
    stages = (
        csp_stage(*pair, depth * (2 if level in (1, 2) else 1), norm, pool=level == last)
        for level, pair in enumerate(pairs)
    )
    return conv_silu(3, channels[0], norm, stride=2), nn.ModuleList(stages)


def _stage(inputs: int, outputs: int, depth: int, norm: Norm) -> nn.Sequential:
    blocks = [Residual(outputs, norm) for _ in range(depth)]
    return nn.Sequential(conv_block(inputs, outputs, norm, stride=2), *blocks)


def _flatten(x: Tensor) -> Tensor:
    """(N, c, h, w) -> (N, h * w, c)."""
    return x.flatten(2).transpose(1, 2)


def _join_levels(levels: list[DetectionOutput]) -> DetectionOutput:
    if len(levels) == 1:
        return levels[0]
    return DetectionOutput(
        logits=torch.cat([level.logits for level in levels], dim=1),
        boxes=torch.cat([level.boxes for level in levels], dim=1),
        quality=torch.cat([level.quality for level in levels], dim=1),  # pyright: ignore[reportArgumentType]
        centres=torch.cat([level.centres for level in levels], dim=0),
        strides=torch.cat([level.strides for level in levels], dim=0),
    )
