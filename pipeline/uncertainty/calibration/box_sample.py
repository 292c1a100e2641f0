"""A bounded, mergeable sample of boxes, on which the calibration of scores and spreads is fitted."""

from typing import NamedTuple, Self

import numpy as np
import torch

from pipeline.uncertainty.calibration.pixel_sample import uniform_hash

_NUM_COLUMNS = 15
"""Of ``BoxRows``: score, hit, overlap, and four each of std, error and size."""


class BoxRows(NamedTuple):
    """Columns of n boxes, float64."""

    score: np.ndarray
    """(n,) in 0..1."""
    hit: np.ndarray
    """(n,) 1: matched with a true box; 0: not."""
    overlap: np.ndarray
    """(n,) IoU with the true box; 0 of a box that is not matched."""
    std: np.ndarray
    """(n, 4) standard deviations of the edges, pixels; NaN: not known."""
    error: np.ndarray
    """(n, 4) pixels, predicted minus true edge; of no meaning where there was no hit."""
    size: np.ndarray
    """(n, 4) pixels: width, height, width, height of the predicted box."""


class BoxSample:
    """Uniform sample without replacement of the boxes of labelled images: the smallest of a hash of each box.

    The hash is of the image's name and the box's row, so the sample depends neither on order nor on sharding.

    Args:
        size: Boxes that are kept; 60 bytes each.
    """

    def __init__(self, size: int = 2**16) -> None:
        self.size = size
        self.images = 0
        self.boxes = 0
        self._key = np.zeros(0, np.float64)
        self._rows = np.zeros((0, _NUM_COLUMNS), np.float32)

    def update(
        self,
        image_id: str,
        scores: np.ndarray,
        hit: np.ndarray,
        overlap: np.ndarray,
        std: np.ndarray,
        error: np.ndarray,
        size: np.ndarray,
    ) -> None:
        """Take in the boxes of one image, once; none is fine. Boxes whose score is no number are left out.

        Args:
            image_id: Unique name.
            scores: (n,) in 0..1.
            hit: (n,) 0 or 1.
            overlap: (n,) IoU with the true box, or 0.
            std: (n, 4) pixels, NaN where not known.
            error: (n, 4) pixels.
            size: (n, 4) pixels, width or height: whichever the coordinate lies along.
        """
        columns = (scores[:, None], hit[:, None], overlap[:, None], std, error, size)
        rows = np.concatenate([np.asarray(column, np.float32) for column in columns], 1)
        key = uniform_hash(len(rows), image_id, torch.device("cpu")).numpy()
        usable = np.isfinite(rows[:, 0])
        # What was taken in is counted whole; what is kept is decided by the hash alone.
        self.images += 1
        self.boxes += int(usable.sum())
        self._add(key[usable], rows[usable])

    def _add(self, key: np.ndarray, rows: np.ndarray) -> None:
        """Keep the ``size`` smallest keys, in their order."""
        key = np.concatenate([self._key, key])
        order = np.argsort(key, kind="stable")[: self.size]
        self._key = key[order]
        self._rows = np.concatenate([self._rows, rows])[order]

    def merge(self, other: "BoxSample") -> None:
        """Add what ``other`` has taken in, of other images."""
        self.images += other.images
        self.boxes += other.boxes
        self._add(other._key, other._rows)

    def state(self) -> dict[str, np.ndarray]:
        """Everything kept, as arrays."""
        counts = np.array([self.size, self.images, self.boxes], np.int64)
        return {"counts": counts, "key": self._key, "rows": self._rows}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The inverse of ``state``."""
        size, images, boxes = state["counts"].tolist()
        sample = cls(size)
        sample.images = images
        sample.boxes = boxes
        sample._add(state["key"], state["rows"])
        return sample

    def rows(self) -> BoxRows:
        """The boxes that are kept, each standing for as many as any other."""
        rows = self._rows.astype(np.float64)
        return BoxRows(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:7], rows[:, 7:11], rows[:, 11:15])
