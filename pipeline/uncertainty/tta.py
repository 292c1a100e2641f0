"""The passes of a network over one image when it predicts: views of test-time augmentation, and dropout.

Test-time augmentation and Monte-Carlo dropout are further members of the same pool. Views are of tensors in the
network's frame, and their outputs are turned back into that frame.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import Settings


class TtaSettings(Settings):
    """Test-time augmentation: all combinations of what is on; the plain view is always among them."""

    flips: bool = False
    """Mirrored left-right, up-down, and both: 4 views."""
    turns: bool = False
    """Quarter turns: 4 views; with ``flips`` the 8 symmetries of the square."""
    scales: tuple[float, ...] = Field(default=(1.0,))
    """Sizes relative to the frame."""

    @field_validator("scales")
    @classmethod
    def _require_sane_scales(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in scales or len(set(scales)) != len(scales) or not all(0.25 <= scale <= 4 for scale in scales):
            raise ValueError("wanted different factors from 0.25 to 4, 1.0 among them, such as [1.0, 0.75, 1.25]")
        return scales


class InferenceSettings(Settings):
    """Which passes every member makes over an image, and when an image is cut into windows."""

    tta: TtaSettings = Field(default_factory=TtaSettings)
    dropout_passes: int = Field(default=0, ge=0, le=100)
    """Monte-Carlo dropout (Gal & Ghahramani 2016, 1506.02142): so many passes of each view with dropout on; 0:
    one pass with dropout off. Batch norm keeps its running statistics either way."""
    windows: Literal["large", "always", "never"] = "large"
    """When images of ``fit: crop`` are seen through overlapping windows of ``input.size`` rather than whole:
    those of more than ``whole_pixels``, all that exceed one window, or none."""
    whole_pixels: int = Field(default=2**22, ge=1)
    """Pixels of the largest image that is seen whole."""
    window_overlap: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Share of a window's side that the next one covers again."""


@dataclass(frozen=True)
class View:
    """One view of a frame: mirrored left-right, then turned counter-clockwise, then resized."""

    flip: bool = False
    turns: int = 0
    """Quarter turns."""
    scale: float = 1.0

    def apply(self, images: Tensor, multiple: int) -> Tensor:
        """(N, C, H, W) -> the view; its sides are multiples of ``multiple`` where those of ``images`` are."""
        if self.flip:
            images = images.flip(-1)
        if self.turns:
            images = images.rot90(self.turns, (-2, -1))
        if self.scale != 1.0:
            size = tuple(max(1, round(side * self.scale / multiple)) * multiple for side in images.shape[-2:])
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return images

    def invert(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps (N, C, h, w) of the view -> (N, C, *size) of the frame."""
        # The steps of ``apply`` backwards: resize, turn back, mirror.
        turned = size[::-1] if self.turns % 2 else size
        if tuple(maps.shape[-2:]) != tuple(turned):
            maps = F.interpolate(maps, turned, mode="bilinear", antialias=True, align_corners=False)
        if self.turns:
            maps = maps.rot90(-self.turns, (-2, -1))
        return maps.flip(-1) if self.flip else maps

    def matrix(self, size: tuple[int, int], seen: tuple[int, int]) -> Tensor:
        """3x3 float64: pixels of a frame of ``size`` (H, W) -> pixels of the view, ``seen`` (h, w) large."""
        matrix = torch.eye(3, dtype=torch.float64)
        height, width = size
        if self.flip:
            matrix = torch.tensor([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
        for _ in range(self.turns % 4):
            # What was at column x is at row width - x: counter-clockwise, as rot90 turns.
            matrix = torch.tensor([[0, 1.0, 0], [-1, 0, width], [0, 0, 1]], dtype=torch.float64) @ matrix
            height, width = width, height
        return torch.diag(torch.tensor([seen[1] / width, seen[0] / height, 1.0], dtype=torch.float64)) @ matrix


def tta_views(settings: TtaSettings) -> list[View]:
    """The views of ``settings``, the plain one first."""
    turns = {(False, False): [0], (True, False): [0, 2], (False, True): [0, 1, 2, 3], (True, True): [0, 1, 2, 3]}
    flips = [False, True] if settings.flips else [False]
    scales = sorted(settings.scales, key=lambda scale: scale != 1.0)
    combinations = product(scales, flips, turns[settings.flips, settings.turns])
    # Up-down is left-right and a half turn; the four mirrored quarter turns are the other four symmetries.
    return [View(flip, turn, scale) for scale, flip, turn in combinations]


def inference_passes(settings: InferenceSettings) -> Iterator[tuple[int, View]]:
    """(number, view) of all passes that one member makes, in a fixed order."""
    passes = max(1, settings.dropout_passes)
    for number, (view, _) in enumerate(product(tta_views(settings.tta), range(passes))):
        yield number, view
