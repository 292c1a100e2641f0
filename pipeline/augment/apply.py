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
        self._last = np.inf if settings is None or epochs is None else epochs - settings.mix_close
        self._mixed: Counter[str] = Counter(mosaic=0, mixup=0)
        self._geometry = Geometry(settings) if settings is not None and settings.moves else None
        self._effects: Counter[str] = Counter()
        self._device: torch.device | None = None
        self._norm = torch.tensor([input.mean, input.std])
        self._run = BatchFunctions(compile)

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
        drawn = draw_parameters(self.settings, self.seed, batch.epochs.numpy(), batch.positions.numpy())
        mixed = self._mixture(batch)
        given = self._moves(drawn, canvas) | self._colours(drawn) | effects.device_arguments(self.settings, drawn, size)
        given |= {} if mixed is None else mix.device_arguments(mixed, canvas, size)
        sent = copy_to_device(given, self._device)
        out = self._move(batch, sent, mixed)
        images = effects.apply(out.images, given, sent, self.settings, self._norm[1], self._effects, self._run)
        return dataclasses.replace(out, images=images, box_counts=None)

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
        drawn = draw_mix_partners(self.settings, self.seed, batch.epochs.numpy(), batch.positions.numpy(), self._last)
        found = {name: int(drawn[name].sum()) for name in self._mixed}
        self._mixed.update(found)
        return drawn if any(found.values()) else None

    def _moves(self, drawn: dict[str, np.ndarray], canvas: tuple[int, int]) -> dict[str, np.ndarray]:
        """``matrices`` (N, 3, 3), canvas -> output, and ``theta`` (N, 2, 3) unless all are cut out by whole pixels."""
        size = self.input.size
        if self._geometry is None:
            return {"matrices": np.tile(_cut_matrix(canvas, size), (len(drawn["angle"]), 1, 1))}
        matrices = self._geometry.matrices(_as_tensors(drawn), canvas, size)
        theta = sampling_theta(invert_affine(matrices), canvas, size)
        return {"matrices": matrices.numpy(), "theta": theta.numpy()}

    def _colours(self, drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``colour`` (N, 3, 3) and ``offset`` (N, 3) of ``normalise``; nothing where colours stay."""
        assert self.settings is not None
        if not self.settings.colours:
            return {}
        matrix, offset = colour_matrix(_as_tensors(drawn))
        offset = offset + matrix @ torch.tensor(self.input.mean, dtype=matrix.dtype)
        return {"colour": (matrix / 255).numpy(), "offset": offset.numpy()}

    def _move(self, batch: Batch, sent: dict[str, Tensor], drawn: dict[str, np.ndarray] | None) -> Batch:
        """Images with their colours, masks, boxes and matrices; all but the effects."""
        canvas, size = (batch.images.shape[-2], batch.images.shape[-1]), self.input.size
        mosaic, pairs = (None, None) if drawn is None else (mix.Mosaic.of(batch, sent), mix.Blend.of(sent))
        colour, own = (sent.get("colour"), sent.get("offset")), sent["matrices"]
        if drawn is None:
            rows = batch.images, batch.masks, sent.get("theta"), *colour
            images, masks = self._run(render, *rows, norm=self._norm, size=size)
        else:
            images, masks = self._sampled(batch, sent, mosaic)
            images = images if pairs is None else mix.blend(images, pairs)
            images = self._run(normalise, images, *colour, norm=self._norm)
        if mosaic is not None:
            own = own.index_copy(0, mosaic.rows, mosaic.own(mosaic.matrices(own)))
        boxes, labels, crowd = batch.boxes, batch.labels, batch.crowd
        if boxes is not None and labels is not None and crowd is not None and self.settings is not None:
            visible, given = self.settings.min_visible, (boxes, labels, crowd)
            boxes, labels, crowd = visible_boxes(*given, sent["matrices"], canvas, size, visible)
            if drawn is not None:
                most = mix.most_boxes(_box_counts(batch), drawn)
                plain = boxes, labels, crowd
                boxes, labels, crowd = mix.mix_labels(
                    given, plain, mosaic, pairs, sent["matrices"], size, visible, most
                )  # fmt: skip
        matrices = (own @ batch.matrices.to(own.dtype)).to(batch.matrices.dtype)
        return dataclasses.replace(
            batch, images=images, masks=masks, boxes=boxes, labels=labels, crowd=crowd, matrices=matrices
        )

    def _sampled(self, batch: Batch, sent: dict[str, Tensor], mosaic: mix.Mosaic | None) -> Pair:
        """The ``mosaic`` rows as such, the others by the plain way, so that they owe nothing to their batch."""
        shared, theta = {"norm": self._norm, "size": self.input.size}, sent.get("theta")
        if mosaic is None:
            return self._run(sample, batch.images, batch.masks, theta, **shared)
        mean = self._norm[0] * 255
        made, made_masks = mix.mosaic_images(
            batch.images, batch.masks, mean, mosaic, sent["matrices"], self.input.size
        )  # fmt: skip
        rest = sent["plain_rows"].long()
        if not len(rest):
            return made, made_masks
        if not self._run.wants_whole_batch(batch.images):
            out, masks = made.new_empty(len(batch), *made.shape[1:]), None
            some = [None if each is None else each[rest] for each in (batch.images, batch.masks, theta)]
            images, plain_masks = self._run(sample, *some, **shared)
            out.index_copy_(0, rest, images)
            if made_masks is not None and plain_masks is not None:
                masks = made_masks.new_empty(len(batch), *made_masks.shape[1:]).index_copy_(0, rest, plain_masks)
        else:
            # All rows, wanted or not: a batch of another size each time would be compiled anew.
            out, masks = self._run(sample, batch.images, batch.masks, theta, **shared)
        out.index_copy_(0, mosaic.rows, made)
        if masks is not None and made_masks is not None:
            masks.index_copy_(0, mosaic.rows, made_masks)
        return out, masks


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
