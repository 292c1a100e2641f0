"""Augment: a batch of uint8 canvases in, normalised network input out, on whatever device the batch is."""

import dataclasses
import importlib.metadata
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import effects, mix
from pipeline.augment.batch import Batch
from pipeline.augment.colour import apply_colour, colour_matrix
from pipeline.augment.draw import draw, draw_mix
from pipeline.augment.geometry import Geometry, centre_crop, visible_boxes, warp
from pipeline.augment.settings import AugmentSettings, InputSettings
from pipeline.errors import InputError


class Augment:
    """The training augmentation, or with ``settings`` None the evaluation preset (normalise only)."""

    def __init__(
        self, settings: AugmentSettings | None, input: InputSettings, seed: int = 0, epochs: float | None = None
    ) -> None:
        """Load Kornia's classes for the ops that are on.

        Args:
            settings: What may happen; None: nothing, and the canvas keeps its size.
            input: Output size, and the normalisation.
            seed: Of the draw; parameters are a pure function of (seed, epoch, position), but for the rows that
                mosaic and mix-up join, which come from the batch at hand: they depend on its size, and so on
                the number of workers.
            epochs: Length of the run in passes over the training split: the last ``settings.mix_close`` of them
                see neither mosaic nor mix-up. None: never closed.
        """
        self.settings, self.input, self.seed = settings, input, seed
        self._last = np.inf if settings is None or epochs is None else epochs - settings.mix_close
        self._mixed: Counter[str] = Counter(mosaic=0, mixup=0)
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
            ``labels`` (-1 where too little of a box is left), ``crowd`` and ``matrices`` moved alike. A row that
            was mixed has the boxes of up to eight images, so the lists may be longer than they were.

        Raises:
            InputError: Mix-up is on and the batch has masks.
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
        moved = self._move(batch, values, mean, self._mixture(batch))
        images = self._colour(moved.images, values, mean, std)
        images = effects.blur(images, drawn["blur"], self.settings, self._effects)
        images = effects.noise(images, drawn["noise"], drawn["noise_key"], std)
        images = effects.erase(images, drawn["erase"])
        return dataclasses.replace(moved, images=images)

    def report(self) -> dict[str, Any]:
        """Evidence of what ran, and where: Kornia's version, calls of its classes by name, mixed rows, device."""
        calls = self._effects + (self._geometry.calls if self._geometry else Counter())
        device = None if self._device is None else str(self._device)
        version = importlib.metadata.version("kornia")
        return {"kornia": version, "ops": dict(calls), "mixed": dict(self._mixed), "device": device}

    def _mixture(self, batch: Batch) -> dict[str, np.ndarray] | None:
        """What ``draw_mix`` says of this batch; None: no row is mixed."""
        assert self.settings is not None
        if not self.settings.mixes:
            return None
        if self.settings.mixup and batch.masks is not None:
            raise InputError(
                f"augment.mixup: {self.settings.mixup} would blend masks, and class ids cannot be blended; "
                "set augment.mixup to 0 (augment.mosaic moves masks too)"
            )
        drawn = draw_mix(self.settings, self.seed, batch.epochs.numpy(), batch.positions.numpy(), self._last)
        found = {name: int(drawn[name].sum()) for name in self._mixed}
        self._mixed.update(found)
        return drawn if any(found.values()) else None

    def _move(
        self, batch: Batch, values: dict[str, Tensor], mean: Tensor, drawn: dict[str, np.ndarray] | None
    ) -> Batch:
        """Everything by one matrix; ``images`` become float32 on the 0..1 scale, less the mean colour."""
        assert self.settings is not None
        canvas, size = (batch.images.shape[-2], batch.images.shape[-1]), self.input.size
        if self._geometry is None:
            matrices = _cut_matrix(canvas, size, batch.images.device).expand(len(batch), 3, 3)
        else:
            matrices = self._geometry.matrices(values, canvas, size)
        mosaic = None if drawn is None else mix.Mosaic.of(batch, drawn, size)
        pairs = None if drawn is None else mix.Blend.of(batch, drawn)
        if mosaic is None or drawn is None:
            images, masks = self._plain(batch.images, batch.masks, matrices, mean)
            own = matrices
        else:
            images, masks = self._with_mosaics(batch, matrices, mean, mosaic, drawn["mosaic"])
            own = matrices.index_copy(0, mosaic.rows, mosaic.own(mosaic.matrices(matrices)))
        if pairs is not None:
            images = mix.blend(images, pairs)
        total = (own @ batch.matrices.to(own.dtype)).to(batch.matrices.dtype)
        boxes, labels, crowd = batch.boxes, batch.labels, batch.crowd
        if boxes is not None and labels is not None and crowd is not None:
            visible = self.settings.min_visible
            given = boxes, labels, crowd
            boxes, labels, crowd = visible_boxes(*given, matrices, canvas, size, visible)
            if drawn is not None:
                boxes, labels, crowd = mix.mix_labels(
                    given, (boxes, labels, crowd), mosaic, pairs, matrices, size, visible,
                    mix.most_boxes(_box_counts(batch), drawn),
                )  # fmt: skip
        return dataclasses.replace(
            batch, images=images, masks=masks, boxes=boxes, labels=labels, crowd=crowd, matrices=total, box_counts=None
        )

    def _plain(
        self, images: Tensor, masks: Tensor | None, matrices: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Rows that show one image each."""
        canvas, size = (images.shape[-2], images.shape[-1]), self.input.size
        if self._geometry is not None:
            return warp(images.float().mul_(1 / 255).sub_(mean[:, None, None]), masks, matrices, size)
        # Nothing moves: cut the centre out by whole pixels, exactly.
        x, y = centre_crop(canvas, size)
        rows, columns = slice(-y, size[0] - y), slice(-x, size[1] - x)
        images = images[..., rows, columns].float().mul_(1 / 255).sub_(mean[:, None, None])
        return images, None if masks is None else masks[:, rows, columns]

    def _with_mosaics(
        self, batch: Batch, matrices: Tensor, mean: Tensor, mosaic: mix.Mosaic, chosen: np.ndarray
    ) -> tuple[Tensor, Tensor | None]:
        """The ``chosen`` rows (N,) as mosaics, the others by the plain way: they owe nothing to their batch."""
        made, made_masks = mix.mosaic_images(batch.images, batch.masks, mean, mosaic, matrices, self.input.size)
        if chosen.all():
            return made, made_masks
        rest = torch.from_numpy(np.flatnonzero(~chosen)).to(made.device, non_blocking=True)
        masks = None if batch.masks is None else batch.masks[rest]
        images, masks = self._plain(batch.images[rest], masks, matrices[rest], mean)
        out = made.new_empty(len(batch), *made.shape[1:])
        out.index_copy_(0, mosaic.rows, made).index_copy_(0, rest, images)
        if masks is None or made_masks is None:
            return out, None
        out_masks = masks.new_empty(len(batch), *masks.shape[1:])
        return out, out_masks.index_copy_(0, mosaic.rows, made_masks).index_copy_(0, rest, masks)

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


def _cut_matrix(canvas: tuple[int, int], size: tuple[int, int], device: torch.device) -> Tensor:
    """(3, 3) canvas -> its centre of ``size``, by whole pixels."""
    if min(canvas[0] - size[0], canvas[1] - size[1]) < 0:
        raise ValueError(f"Augment wants canvases of at least {size}, found {canvas}: frame() makes them so")
    matrix = torch.eye(3, device=device)
    matrix[0, 2], matrix[1, 2] = centre_crop(canvas, size)
    return matrix


def _box_counts(batch: Batch) -> np.ndarray:
    """(N,) boxes of each row, without asking a device: at most what its list holds."""
    assert batch.labels is not None
    if batch.box_counts is not None:
        return batch.box_counts.numpy()
    if batch.labels.device.type == "cpu":
        return (batch.labels >= 0).sum(1).numpy()
    return np.full(len(batch), batch.labels.shape[1])


def _on_device(drawn: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The parameters that matrices are made of, by one copy; float64 wherever the device has it."""
    names = ["hflip", "vflip", "turns", "angle", "translate", "scale", "shear"]
    names += ["brightness", "contrast", "saturation", "hue"]
    columns = {name: drawn[name].reshape(len(drawn[name]), -1) for name in names}
    packed = mix.on_device(np.concatenate(list(columns.values()), 1, dtype=np.float64), device)
    parts = packed.split([column.shape[1] for column in columns.values()], 1)
    return {name: part if name == "translate" else part[:, 0] for name, part in zip(names, parts, strict=True)}
