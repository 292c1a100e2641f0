"""What is left of the images of a batch once members are joined: boxes, their doubt, and sums over the image."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.images.batch import Batch
from pipeline.images.unframe import unframe_boxes
from pipeline.uncertainty import calibration


@dataclass
class KeptBoxes:
    """What is left of one image after suppression, B boxes, the best score first."""

    boxes: Tensor
    """(B, 4) in the network's frame, clipped to the image."""
    labels: Tensor
    """(B,) int64."""
    scores: Tensor
    """(B,) before calibration of the pool."""
    probabilities: Tensor
    """(B, K + 1) class vectors, the last "none of these"."""
    entropy: Tensor
    """(B,) entropy of ``probabilities``, nats."""
    mutual_information: Tensor
    """(B,) nats: what members disagree about."""
    votes: Tensor
    """(B,) members that see it."""
    std: Tensor
    """(B, 4) pixels; NaN where one of several members alone sees it by clustering."""


@dataclass
class PooledImages:
    """The boxes of N images, and sums of their uncertainty over everything that was predicted."""

    members: int
    """Predictions in the pool, views and dropout passes among them."""
    kept: list[KeptBoxes]
    """The boxes of each image."""
    entropy_sum: Tensor
    """(N,) float64 nats, summed over the locations or boxes of each image."""
    mutual_information_sum: Tensor
    """(N,) float64 nats, summed over the locations or boxes of each image."""


@dataclass
class ImageBoxes:
    """One image of the pool, in its own pixels."""

    members: int
    """Predictions in the pool, views and dropout passes among them."""
    kept: KeptBoxes
    """The boxes in the network's frame, before calibration."""
    boxes: Tensor
    """(B, 4) in the image's own pixels."""
    scores: Tensor
    """(B,) calibrated."""
    std: Tensor
    """(B, 4) pixels of the image, calibrated; NaN: not known."""
    entropy_sum: Tensor
    """Scalar float64 nats, summed over the image."""
    mutual_information_sum: Tensor
    """Scalar float64 nats, summed over the image."""


@dataclass
class Fused(PooledImages):
    """The pool of M members."""

    parameters: dict[str, Any] | None = None
    """Parameters of the bundle's calibration: ``pool`` (score -> precision), ``spread``; None: not calibrated."""

    def plain(self) -> "Fused":
        """The same pool without calibration."""
        return dataclasses.replace(self, parameters=None)

    @cached_property
    def scores(self) -> list[Tensor]:
        """(B,) of each image, calibrated."""
        return [calibration.apply_isotonic(self._parameter("pool"), kept.scores) for kept in self.kept]

    @cached_property
    def std(self) -> list[Tensor]:
        """(B, 4) pixels of the frame, calibrated."""
        spread = self._parameter("spread")
        if spread is None:
            return [kept.std for kept in self.kept]
        return [calibration.apply_spread(spread, kept.std, sides(kept.boxes)) for kept in self.kept]

    def in_image_pixels(self, batch: Batch) -> list[ImageBoxes]:
        """The boxes of each image of ``batch``, in that image's own pixels."""
        images: list[ImageBoxes] = []
        for n, kept in enumerate(self.kept):
            row = slice(n, n + 1)
            boxes = unframe_boxes(kept.boxes[None], batch.matrices[row], batch.sizes[row])[0]
            # The edges' own scales: frame pixels per image pixel, along x and y.
            scale = batch.matrices[n].to(kept.boxes.device).diagonal()[[0, 1, 0, 1]].abs()
            sums = self.entropy_sum[n], self.mutual_information_sum[n]
            images.append(ImageBoxes(self.members, kept, boxes, self.scores[n], self.std[n] / scale, *sums))
        return images

    def _parameter(self, name: str) -> dict[str, Any] | None:
        return None if self.parameters is None else self.parameters.get(name)


def sides(boxes: Tensor) -> Tensor:
    """(B, 4) width, height, width, height of boxes: the size that belongs to each coordinate."""
    return (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)


def expected_error(precision: Tensor, predicted: Tensor) -> Tensor:
    """1 - F1 as it would be if each box were right with its own probability, a scalar float64.

    The expected number of right boxes is the sum of ``precision`` over the predicted ones; of objects, over all boxes.
    Nothing predicted and nothing expected: 0.

    Args:
        precision: (B,) in 0..1, of all boxes.
        predicted: (B,) bool: the boxes from the operating score on.
    """
    probability = precision.double()
    right, objects = probability[predicted].sum(), probability.sum()
    either = predicted.sum() + objects
    return torch.where(either > 0, 1 - 2 * right / either.clamp(min=1e-12), torch.zeros_like(right))


def unpack_boxes(column: pa.ChunkedArray) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Boxes (B, 4) float32, labels (B,) int64, crowd (B,) bool of each row; a null row has none."""
    lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    flat = lists.flatten()  # of this slice, without what lies behind nulls

    def field(name: str, kind: type) -> np.ndarray:
        return flat.field(name).to_numpy(zero_copy_only=False).astype(kind)

    boxes = np.stack([field(name, np.float32) for name in ("x1", "y1", "x2", "y2")], 1)
    crowd = flat.field("crowd").fill_null(False).to_numpy(zero_copy_only=False)
    ends, rows = np.cumsum(lengths)[:-1], len(lengths)
    columns = (boxes, field("label", np.int64), crowd)
    split = [np.split(column, ends)[:rows] for column in columns]
    return split[0], split[1], split[2]
