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
    """(B,)."""
    scores: Tensor
    """(B,)."""
    probabilities: Tensor
    """(B, K + 1)."""
    entropy: Tensor
    """(B,) of ``probabilities``, nats."""
    mutual_information: Tensor
    """(B,) nats."""
    votes: Tensor
    """(B,) members that see it."""
    std: Tensor
    """(B, 4) pixels; NaN where one of several members alone sees it by clustering."""


@dataclass
class PooledImages:
    """The boxes of N images, and sums over everything that members said, (N,) float64."""

    members: int
    found: list[KeptBoxes]
    entropy_sum: Tensor
    mutual_information_sum: Tensor


@dataclass
class ImageBoxes:
    """One image of the pool, in its own pixels."""

    members: int
    found: KeptBoxes
    """As it came out, in the network's frame."""
    boxes: Tensor
    """(B, 4)."""
    scores: Tensor
    """(B,) calibrated."""
    std: Tensor
    """(B, 4) calibrated; NaN: not known."""
    entropy_sum: Tensor
    mutual_information_sum: Tensor


@dataclass
class Fused(PooledImages):
    """The pool of M members."""

    parameters: dict[str, Any] | None = None
    """Of the bundle's calibration: ``pool`` (score -> precision), ``spread``; None: all as it is."""

    def plain(self) -> "Fused":
        """The same without calibration."""
        return dataclasses.replace(self, parameters=None)

    @cached_property
    def scores(self) -> list[Tensor]:
        """(B,) of each image, calibrated."""
        return [calibration.apply_isotonic(self._part("pool"), each.scores) for each in self.found]

    @cached_property
    def std(self) -> list[Tensor]:
        """(B, 4) pixels of the frame, calibrated."""
        spread = self._part("spread")
        if spread is None:
            return [each.std for each in self.found]
        return [calibration.apply_spread(spread, each.std, sides(each.boxes)) for each in self.found]

    def own(self, batch: Batch) -> list[ImageBoxes]:
        """Each image in its own pixels."""
        out: list[ImageBoxes] = []
        for n, found in enumerate(self.found):
            one = slice(n, n + 1)
            boxes = unframe_boxes(found.boxes[None], batch.matrices[one], batch.sizes[one])[0]
            # The edges' own scales: frame pixels per image pixel, along x and y.
            scale = batch.matrices[n].to(found.boxes.device).diagonal()[[0, 1, 0, 1]].abs()
            sums = self.entropy_sum[n], self.mutual_information_sum[n]
            out.append(ImageBoxes(self.members, found, boxes, self.scores[n], self.std[n] / scale, *sums))
        return out

    def _part(self, name: str) -> dict[str, Any] | None:
        return None if self.parameters is None else self.parameters.get(name)


def sides(boxes: Tensor) -> Tensor:
    """(B, 4) width, height, width, height of boxes: the size that belongs to each coordinate."""
    return (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)


def expected_error(precision: Tensor, said: Tensor) -> Tensor:
    """1 - F1 as it would be if each box were right with its own probability, a scalar float64.

    Right among the said: their sum; missed: the sum of the rest. Nothing said and nothing expected: 0.

    Args:
        precision: (B,) in 0..1, of all boxes.
        said: (B,) bool.
    """
    chance = precision.double()
    right, all_true = chance[said].sum(), chance.sum()
    either = said.sum() + all_true
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
