"""The batch that travels from collate through augmentation to the model."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_ON_HOST = frozenset({"epochs", "positions", "box_counts"})


@dataclass
class Batch:
    """N images in one frame, with whatever labels they have."""

    image_ids: list[str]
    images: Tensor
    """(N, 3, H, W): uint8 RGB canvases; float32 and normalised once augmented."""
    masks: Tensor | None
    """(N, H, W) uint8 class ids, VOID outside the image and where nothing is labelled."""
    boxes: Tensor | None
    """(N, B, 4) float32 in this frame, padded to the longest list (at least one row)."""
    labels: Tensor | None
    """(N, B) int64; -1 is padding or a dropped box."""
    crowd: Tensor | None
    """(N, B) bool: a region of many objects, which is neither right nor wrong to find."""
    matrices: Tensor
    """(N, 3, 3) float32: pixels of the upright source image -> pixels of this frame. Of a row that mosaic or
    mix-up made: where the row's own image went, that of ``image_ids``."""
    sizes: Tensor
    """(N, 2) int64: height and width of the source images."""
    epochs: Tensor
    """(N,) int64. Stays on the CPU, since the draw reads it there: reading it back would be a wait."""
    positions: Tensor
    """(N,) int64 place within the epoch's order. Stays on the CPU."""
    box_counts: Tensor | None = None
    """(N,) int64 boxes of each row before augmentation, noted when the batch leaves the CPU and kept there: how
    wide the lists of mixed rows may become must be known without asking the device."""

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.image_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy all tensors but ``epochs``, ``positions`` and ``box_counts`` to a device."""
        if self.box_counts is None and self.labels is not None and self.labels.device.type == "cpu":
            self = dataclasses.replace(self, box_counts=(self.labels >= 0).sum(1))
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Move the tensors that ``to`` copies into page-locked memory, so that the copy does not wait."""
        return self._map(lambda tensor: tensor.pin_memory() if tensor.is_cpu else tensor)

    def _map(self, change) -> Self:
        moved = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name not in _ON_HOST:
                moved[field.name] = change(value)
        return dataclasses.replace(self, **moved)
