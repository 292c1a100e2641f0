"""How a network looks at an image when it predicts: whole or through windows, once or from several sides.

Test-time augmentation and Monte-Carlo dropout are further members of the same pool. Everything here is on
tensors in the network's frame, and turns answers back into that frame.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import Settings

WINDOWS_AT_ONCE = {"cpu": 4, "cuda": 32}
"""Windows that go through the network together, by kind of device."""


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
    def _sane(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in scales or len(set(scales)) != len(scales) or not all(0.25 <= scale <= 4 for scale in scales):
            raise ValueError("wanted different factors from 0.25 to 4, 1.0 among them, such as [1.0, 0.75, 1.25]")
        return scales


class InferenceSettings(Settings):
    """How members are asked."""

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
    """One way to look at a frame: mirrored, then turned, then resized."""

    flip: bool = False
    turns: int = 0
    """Quarter turns."""
    scale: float = 1.0

    def look(self, images: Tensor, multiple: int) -> Tensor:
        """(N, C, H, W) -> the view; its sides are multiples of ``multiple`` where those of ``images`` are."""
        if self.flip:
            images = images.flip(-1)
        if self.turns:
            images = images.rot90(self.turns, (-2, -1))
        if self.scale != 1.0:
            size = tuple(max(1, round(side * self.scale / multiple)) * multiple for side in images.shape[-2:])
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return images

    def back(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps (N, C, h, w) of the view -> (N, C, *size) of the frame."""
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


def views(settings: TtaSettings) -> list[View]:
    """The views of ``settings``, the plain one first."""
    turns = {(False, False): [0], (True, False): [0, 2], (False, True): [0, 1, 2, 3], (True, True): [0, 1, 2, 3]}
    flips = [False, True] if settings.flips else [False]
    scales = sorted(settings.scales, key=lambda scale: scale != 1.0)
    found = product(scales, flips, turns[settings.flips, settings.turns])
    # Up-down is left-right and a half turn; the four mirrored quarter turns are the other four symmetries.
    return [View(flip, turn, scale) for scale, flip, turn in found]


def uses_windows(settings: InferenceSettings, canvas: tuple[int, int], window: tuple[int, int]) -> bool:
    """Whether a frame of ``canvas`` is seen through windows."""
    if settings.windows == "never" or (canvas[0] <= window[0] and canvas[1] <= window[1]):
        return False
    return settings.windows == "always" or canvas[0] * canvas[1] > settings.whole_pixels


def through_windows(
    model: Callable[[Tensor], Tensor], images: Tensor, window: tuple[int, int], overlap: float = 0.5
) -> Tensor:
    """Logits (N, C, H, W) blended from overlapping windows, each weighted by a Gaussian around its centre.

    As nnU-Net does (Isensee et al. 2021, 10.1038/s41592-020-01008-z): sigma an eighth of the side, logits
    averaged. Memory is that of the result and of a few windows, whatever the image's size.

    Args:
        model: (n, 3, h, w) -> logits (n, C, h, w).
        images: (N, 3, H, W).
        window: h, w; cut to the image where that is smaller.
        overlap: Share of a window's side that the next one covers again.
    """
    height, width = min(window[0], images.shape[-2]), min(window[1], images.shape[-1])
    rows, columns = _places(images.shape[-2], height, overlap), _places(images.shape[-1], width, overlap)
    weight = gaussian((height, width)).to(images.device)
    places = [(n, row, column) for n in range(len(images)) for row in rows for column in columns]
    step = WINDOWS_AT_ONCE.get(images.device.type, WINDOWS_AT_ONCE["cpu"])
    total = images.new_zeros(0)
    mass = images.new_zeros(images.shape[-2:])
    for row, column in product(rows, columns):
        mass[row : row + height, column : column + width] += weight
    for start in range(0, len(places), step):
        chunk = places[start : start + step]
        crops = torch.stack([images[n, :, y : y + height, x : x + width] for n, y, x in chunk])
        said = model(crops.contiguous(memory_format=torch.channels_last)).float() * weight
        if not len(total):
            total = said.new_zeros(len(images), said.shape[1], *images.shape[-2:])
        for (n, y, x), each in zip(chunk, said, strict=True):
            total[n, :, y : y + height, x : x + width] += each
    return total.div_(mass)


def gaussian(size: tuple[int, int], sigma: float = 1 / 8) -> Tensor:
    """(h, w) weights, 1 at the centre; ``sigma`` in sides. Floored at 1e-3, so that no pixel's mass vanishes."""
    axes = [torch.exp(-((((torch.arange(side) + 0.5) / side - 0.5) / sigma) ** 2) / 2) for side in size]
    return (axes[0][:, None] * axes[1]).clamp(min=1e-3)


def _places(length: int, window: int, overlap: float) -> list[int]:
    """First pixels of windows that cover ``length``, spread evenly, at least ``overlap`` of each shared."""
    if length <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // step) + 1
    return [round(k * (length - window) / (count - 1)) for k in range(count)]


def each_pass(settings: InferenceSettings) -> Iterator[tuple[int, View]]:
    """(number, view) of everything that one member is asked, in a fixed order."""
    passes = max(1, settings.dropout_passes)
    for number, (view, _) in enumerate(product(views(settings.tta), range(passes))):
        yield number, view
