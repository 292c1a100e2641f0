"""Augment: a batch of uint8 canvases in, normalised network input out, on whatever device the batch is."""

import dataclasses
import importlib.metadata
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import effects, mix
from pipeline.augment.colour import colour_matrix
from pipeline.augment.draw import draw_mix_partners, draw_parameters
from pipeline.augment.geometry import Geometry, centre_crop, visible_boxes
from pipeline.augment.pixels import BatchFunctions, Pair, copy_to_device, in_row_chunks, normalise, render, sample
from pipeline.augment.settings import AugmentSettings
from pipeline.errors import InputError
from pipeline.images.affine import invert_affine, sampling_theta
from pipeline.images.batch import Batch
from pipeline.images.input_settings import InputSettings


class Augment:
    """The training augmentation, or with ``settings`` None the evaluation preset (normalise only)."""

    def __init__(
        self,
        settings: AugmentSettings | None,
        input: InputSettings,
        seed: int = 0,
        epochs: float | None = None,
        compile: bool = True,
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
            compile: Whether to compile on a GPU, which takes some seconds at the first batch.
        """
        self.settings, self.input, self.seed = settings, input, seed
        self._mix_until = np.inf if settings is None or epochs is None else epochs - settings.mix_close
        self._mixed_rows: Counter[str] = Counter(mosaic=0, mixup=0)
        self._geometry = Geometry(settings) if settings is not None and settings.moves else None
        self._effects: Counter[str] = Counter()
        self._device: torch.device | None = None
        self._norm = torch.tensor([input.mean, input.std])
        self._functions = BatchFunctions(compile)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """Augment and normalise a batch on its own device; nothing of it waits for that device.

        Args:
            batch: ``images`` (N, 3, H, W) uint8 canvases, in any layout.

        Returns:
            A new Batch: ``images`` (N, 3, *size) float32 normalised; ``masks``, ``boxes`` (clipped),
            ``labels`` (-1 where too little of a box is left), ``crowd`` and ``matrices`` moved alike. A row that
            was mixed has the boxes of up to eight images, so the lists may be longer than they were.

        Raises:
            InputError: Mix-up is on and the batch has masks.
        """
        self._device = batch.images.device
        self._norm = self._norm.to(self._device, non_blocking=True)
        canvas, size = (batch.images.shape[-2], batch.images.shape[-1]), self.input.size
        if self.settings is None or len(batch) == 0:
            images, _ = in_row_chunks(render, batch.images, None, None, None, None, norm=self._norm, size=canvas)
            return dataclasses.replace(batch, images=images)
        # On the host: what happens to each row, as numbers. All of them travel in one copy.
        drawn = draw_parameters(self.settings, self.seed, batch.epochs.numpy(), batch.positions.numpy())
        mix_draw = self._draw_mix(batch)
        arguments = (
            self._geometry_arguments(drawn, canvas)
            | self._colour_arguments(drawn)
            | effects.device_arguments(self.settings, drawn, size)
        )
        arguments |= {} if mix_draw is None else mix.device_arguments(mix_draw, canvas, size)
        on_device = copy_to_device(arguments, self._device)
        # On the device: geometry and colour by one resampling, then what has no matrix.
        moved = self._move(batch, on_device, mix_draw)
        images = effects.apply(
            moved.images, arguments, on_device, self.settings, self._norm[1], self._effects, self._functions
        )
        return dataclasses.replace(moved, images=images, box_counts=None)

    def report(self) -> dict[str, Any]:
        """Evidence of what ran, and where: Kornia's version, calls of its classes by name, mixed rows, device."""
        calls = self._effects + (self._geometry.calls if self._geometry else Counter())
        device = None if self._device is None else str(self._device)
        version = importlib.metadata.version("kornia")
        return {"kornia": version, "ops": dict(calls), "mixed": dict(self._mixed_rows), "device": device}

    def _draw_mix(self, batch: Batch) -> dict[str, np.ndarray] | None:
        """What ``draw_mix_partners`` draws for this batch; None: no row is mixed."""
        assert self.settings is not None
        if not self.settings.mixes:
            return None
        if self.settings.mixup and batch.masks is not None:
            raise InputError(
                f"augment.mixup: {self.settings.mixup} would blend masks, and class ids cannot be blended; "
                "set augment.mixup to 0 (augment.mosaic moves masks too)"
            )
        drawn = draw_mix_partners(
            self.settings, self.seed, batch.epochs.numpy(), batch.positions.numpy(), self._mix_until
        )
        num_mixed = {name: int(drawn[name].sum()) for name in self._mixed_rows}
        self._mixed_rows.update(num_mixed)
        return drawn if any(num_mixed.values()) else None

    def _geometry_arguments(self, drawn: dict[str, np.ndarray], canvas: tuple[int, int]) -> dict[str, np.ndarray]:
        """``matrices`` (N, 3, 3), canvas -> output, and ``theta`` (N, 2, 3) unless all are cut out by whole pixels."""
        size = self.input.size
        if self._geometry is None:
            return {"matrices": np.tile(_cut_matrix(canvas, size), (len(drawn["angle"]), 1, 1))}
        matrices = self._geometry.matrices(_as_tensors(drawn), canvas, size)
        theta = sampling_theta(invert_affine(matrices), canvas, size)
        return {"matrices": matrices.numpy(), "theta": theta.numpy()}

    def _colour_arguments(self, drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``colour`` (N, 3, 3) and ``offset`` (N, 3) of ``normalise``; nothing where colours stay."""
        assert self.settings is not None
        if not self.settings.colours:
            return {}
        matrix, offset = colour_matrix(_as_tensors(drawn))
        offset = offset + matrix @ torch.tensor(self.input.mean, dtype=matrix.dtype)
        return {"colour": (matrix / 255).numpy(), "offset": offset.numpy()}

    def _move(self, batch: Batch, on_device: dict[str, Tensor], mix_draw: dict[str, np.ndarray] | None) -> Batch:
        """Images with their colours, masks, boxes and matrices; all but the effects."""
        canvas, size = (batch.images.shape[-2], batch.images.shape[-1]), self.input.size
        mosaic, blend = None, None
        if mix_draw is not None:
            mosaic = mix.Mosaic.from_arguments(batch, on_device)
            blend = mix.Blend.from_arguments(on_device)
        # Pixels: mixed batches are coloured after mixing, so that each row has one colour for all that it shows.
        colour, own_matrices = (on_device.get("colour"), on_device.get("offset")), on_device["matrices"]
        if mix_draw is None:
            rows = batch.images, batch.masks, on_device.get("theta"), *colour
            images, masks = self._functions(render, *rows, norm=self._norm, size=size)
        else:
            images, masks = self._sample_with_mosaics(batch, on_device, mosaic)
            images = images if blend is None else mix.blend_images(images, blend)
            images = self._functions(normalise, images, *colour, norm=self._norm)
        if mosaic is not None:
            own_matrices = own_matrices.index_copy(
                0, mosaic.rows, mosaic.own_matrices(mosaic.source_matrices(own_matrices))
            )
        # Labels: first as if no row were mixed, then those of mixed rows in their place.
        boxes, labels, crowd = batch.boxes, batch.labels, batch.crowd
        if boxes is not None and labels is not None and crowd is not None and self.settings is not None:
            min_visible, canvas_labels = self.settings.min_visible, (boxes, labels, crowd)
            boxes, labels, crowd = visible_boxes(*canvas_labels, on_device["matrices"], canvas, size, min_visible)
            if mix_draw is not None:
                max_boxes = mix.max_boxes_per_row(_box_counts(batch), mix_draw)
                unmixed = boxes, labels, crowd
                boxes, labels, crowd = mix.mix_labels(
                    canvas_labels, unmixed, mosaic, blend, on_device["matrices"], size, min_visible, max_boxes
                )  # fmt: skip
        # Canvas -> output after source -> canvas: the batch remembers the whole way.
        matrices = (own_matrices @ batch.matrices.to(own_matrices.dtype)).to(batch.matrices.dtype)
        return dataclasses.replace(
            batch, images=images, masks=masks, boxes=boxes, labels=labels, crowd=crowd, matrices=matrices
        )

    def _sample_with_mosaics(self, batch: Batch, on_device: dict[str, Tensor], mosaic: mix.Mosaic | None) -> Pair:
        """The ``mosaic`` rows as such, the others by the plain way, so that they owe nothing to their batch."""
        shared, theta = {"norm": self._norm, "size": self.input.size}, on_device.get("theta")
        if mosaic is None:
            return self._functions(sample, batch.images, batch.masks, theta, **shared)
        mean = self._norm[0] * 255
        mosaics, mosaic_masks = mix.mosaic_images(
            batch.images, batch.masks, mean, mosaic, on_device["matrices"], self.input.size
        )  # fmt: skip
        plain_rows = on_device["plain_rows"].long()
        if not len(plain_rows):
            return mosaics, mosaic_masks
        if not self._functions.wants_whole_batch(batch.images):
            images, masks = mosaics.new_empty(len(batch), *mosaics.shape[1:]), None
            plain_inputs = [None if rows is None else rows[plain_rows] for rows in (batch.images, batch.masks, theta)]
            plain_images, plain_masks = self._functions(sample, *plain_inputs, **shared)
            images.index_copy_(0, plain_rows, plain_images)
            if mosaic_masks is not None and plain_masks is not None:
                masks = mosaic_masks.new_empty(len(batch), *mosaic_masks.shape[1:]).index_copy_(
                    0, plain_rows, plain_masks
                )
        else:
            # All rows, wanted or not: a batch of another size each time would be compiled anew.
            images, masks = self._functions(sample, batch.images, batch.masks, theta, **shared)
        images.index_copy_(0, mosaic.rows, mosaics)
        if masks is not None and mosaic_masks is not None:
            masks.index_copy_(0, mosaic.rows, mosaic_masks)
        return images, masks


def _cut_matrix(canvas: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """(3, 3) canvas -> its centre of ``size``, by whole pixels."""
    if min(canvas[0] - size[0], canvas[1] - size[1]) < 0:
        raise ValueError(f"Augment wants canvases of at least {size}, found {canvas}; use lay_out with train=True")
    matrix = np.eye(3)
    matrix[:2, 2] = centre_crop(canvas, size)
    return matrix


def _box_counts(batch: Batch) -> np.ndarray:
    """(N,) boxes of each row, without asking a device: at most what its list holds."""
    assert batch.labels is not None
    if batch.box_counts is not None:
        return batch.box_counts.numpy()
    if batch.labels.device.type == "cpu":
        return (batch.labels >= 0).sum(1).numpy()
    return np.full(len(batch), batch.labels.shape[1])


def _as_tensors(drawn: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The draw as float64 tensors on the host."""
    return {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in drawn.items()}
