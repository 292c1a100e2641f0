"""Augment: a batch of uint8 canvases in, normalised network input out, on whatever device the batch is."""

import dataclasses
import importlib.metadata
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import effects
from pipeline.augment.batch import Batch
from pipeline.augment.colour import apply_colour, colour_matrix
from pipeline.augment.draw import draw
from pipeline.augment.geometry import Geometry, centre_crop, visible_boxes, warp
from pipeline.augment.settings import AugmentSettings, InputSettings


class Augment:
    """The training augmentation, or with ``settings`` None the evaluation preset (normalise only)."""

    def __init__(self, settings: AugmentSettings | None, input: InputSettings, seed: int = 0) -> None:
        """Load Kornia's classes for the ops that are on.

        Args:
            settings: What may happen; None: nothing, and the canvas keeps its size.
            input: Output size, and the normalisation.
            seed: Of the draw; parameters are a pure function of (seed, epoch, position).
        """
        self.settings, self.input, self.seed = settings, input, seed
        self._geometry = Geometry(settings) if settings is not None and settings.moves else None
        self._effects: Counter[str] = Counter()
        self._device: torch.device | None = None
        self._mean_std = torch.tensor([input.mean, input.std])

    def __call__(self, batch: Batch) -> Batch:
        """Augment and normalise a batch on its own device.

        Args:
            batch: ``images`` (N, 3, H, W) uint8 from ``frame``.

        Returns:
            A new Batch: ``images`` (N, 3, *size) float32 normalised; ``masks``, ``boxes`` (clipped),
            ``labels`` (-1 where too little of a box is left), ``crowd`` and ``matrices`` moved alike.
        """
        self._device = batch.images.device
        self._mean_std = self._mean_std.to(batch.images.device, non_blocking=True)
        mean, std = self._mean_std
        if self.settings is None or len(batch) == 0:
            images = batch.images.float()
            images = images.mul_(1 / 255).sub_(mean[:, None, None]).div_(std[:, None, None])
            return dataclasses.replace(batch, images=images)
        drawn = draw(self.settings, self.seed, batch.epochs.numpy(), batch.positions.numpy())
        values = _on_device(drawn, batch.images.device)
        moved = self._move(batch, values, mean)
        images = self._colour(moved.images, values, mean, std)
        images = effects.blur(images, drawn["blur"], self.settings, self._effects)
        images = effects.noise(images, drawn["noise"], drawn["noise_key"], std)
        images = effects.erase(images, drawn["erase"])
        return dataclasses.replace(moved, images=images)

    def report(self) -> dict[str, Any]:
        """Evidence of what ran, and where: Kornia's version, calls of its classes by name, device."""
        calls = self._effects + (self._geometry.calls if self._geometry else Counter())
        device = None if self._device is None else str(self._device)
        return {"kornia": importlib.metadata.version("kornia"), "ops": dict(calls), "device": device}

    def _move(self, batch: Batch, values: dict[str, Tensor], mean: Tensor) -> Batch:
        """Everything by one matrix; ``images`` become float32 on the 0..1 scale, less the mean colour."""
        assert self.settings is not None
        height, width = batch.images.shape[-2:]
        canvas, size = (height, width), self.input.size
        masks = batch.masks
        if self._geometry is None:
            # Nothing moves: cut the centre out by whole pixels, exactly.
            matrices, images, masks = _cut(batch, canvas, size)
            images = images.float().mul_(1 / 255).sub_(mean[:, None, None])
        else:
            matrices = self._geometry.matrices(values, canvas, size)
            images = batch.images.float().mul_(1 / 255).sub_(mean[:, None, None])
            images, masks = warp(images, masks, matrices, size)
        total = (matrices @ batch.matrices.to(matrices.dtype)).to(batch.matrices.dtype)
        boxes, labels, crowd = batch.boxes, batch.labels, batch.crowd
        if boxes is not None and labels is not None and crowd is not None:
            visible = self.settings.min_visible
            boxes, labels, crowd = visible_boxes(boxes, labels, crowd, matrices, canvas, size, visible)
        return dataclasses.replace(
            batch, images=images, masks=masks, boxes=boxes, labels=labels, crowd=crowd, matrices=total
        )

    def _colour(self, images: Tensor, values: dict[str, Tensor], mean: Tensor, std: Tensor) -> Tensor:
        """Colour and normalisation by one matrix, cut off at black and white."""
        assert self.settings is not None
        if not self.settings.colours:
            return images.div_(std[:, None, None])
        matrix, offset = colour_matrix(values)
        wide_mean, wide_std = mean.to(matrix.dtype), std.to(matrix.dtype)
        offset = (offset + matrix @ wide_mean - wide_mean) / wide_std
        out = apply_colour(images, matrix / wide_std[:, None], offset)
        for channel, (centre, spread) in enumerate(zip(self.input.mean, self.input.std, strict=True)):
            out[:, channel].clamp_(-centre / spread, (1 - centre) / spread)
        return out


def _cut(batch: Batch, canvas: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None]:
    x, y = centre_crop(canvas, size)
    if min(canvas[0] - size[0], canvas[1] - size[1]) < 0:
        raise ValueError(f"Augment wants canvases of at least {size}, found {canvas}: frame() makes them so")
    rows, columns = slice(-y, size[0] - y), slice(-x, size[1] - x)
    matrix = torch.eye(3, device=batch.images.device)
    matrix[0, 2], matrix[1, 2] = x, y
    masks = None if batch.masks is None else batch.masks[:, rows, columns]
    return matrix.expand(len(batch), 3, 3), batch.images[..., rows, columns], masks


def _on_device(drawn: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The parameters that matrices are made of, by one copy; float64 wherever the device has it."""
    names = ["hflip", "vflip", "turns", "angle", "translate", "scale", "shear"]
    names += ["brightness", "contrast", "saturation", "hue"]
    columns = {name: drawn[name].reshape(len(drawn[name]), -1) for name in names}
    packed = torch.from_numpy(np.concatenate(list(columns.values()), 1, dtype=np.float64))
    if device.type == "mps":
        packed = packed.float()
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split([column.shape[1] for column in columns.values()], 1)
    return {name: part if name == "translate" else part[:, 0] for name, part in zip(names, parts, strict=True)}
