"""What optimiser steps have used of the stream: a set of positions."""

import io
from typing import Self

import numpy as np


class Ledger:
    """The set of stream positions that optimiser steps have used, as sorted disjoint intervals.

    A set: union in any order, adding twice changes nothing. Positions at or past the run's end are padding.
    """

    def __init__(self, intervals: np.ndarray | None = None) -> None:
        empty = np.empty((0, 2), np.int64)
        self.intervals = empty if intervals is None else _normalise(intervals)
        self._fresh: list[np.ndarray] = []

    def add(self, positions: np.ndarray) -> None:
        """Mark positions (n,) int64 as used."""
        self._fresh.append(np.asarray(positions, np.int64))
        if len(self._fresh) >= 256:
            self._settle()

    def _settle(self) -> None:
        if self._fresh:
            fresh = np.concatenate(self._fresh)
            self._fresh = []
            self.intervals = _normalise(np.concatenate([self.intervals, np.stack([fresh, fresh + 1], 1)]))

    def contains(self, positions: np.ndarray) -> np.ndarray:
        """Boolean (n,): which positions were used."""
        self._settle()
        if not len(self.intervals):
            return np.zeros(len(positions), bool)
        at = np.searchsorted(self.intervals[:, 0], positions, side="right") - 1
        return (at >= 0) & (positions < self.intervals[np.maximum(at, 0), 1])

    def count(self, start: int, stop: int) -> int:
        """Number of used positions in [start, stop)."""
        self._settle()
        clipped = np.clip(self.intervals, start, stop)
        return int((clipped[:, 1] - clipped[:, 0]).sum())

    def first_free(self) -> int:
        """The smallest position that was not used."""
        self._settle()
        return int(self.intervals[0, 1]) if len(self.intervals) and self.intervals[0, 0] == 0 else 0

    def union(self, other: "Ledger") -> Self:
        """Both ledgers in one."""
        self._settle()
        other._settle()
        return type(self)(np.concatenate([self.intervals, other.intervals]))

    def to_bytes(self) -> bytes:
        """As stored in a checkpoint: an int64 array (n, 2) in numpy's own format."""
        self._settle()
        out = io.BytesIO()
        np.save(out, self.intervals, allow_pickle=False)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Undo ``to_bytes``."""
        return cls(np.load(io.BytesIO(data), allow_pickle=False))


def _normalise(intervals: np.ndarray) -> np.ndarray:
    """Sort, and merge what touches or overlaps."""
    kept = intervals[intervals[:, 1] > intervals[:, 0]]
    kept = kept[np.argsort(kept[:, 0], kind="stable")]
    if len(kept) < 2:
        return kept
    reach = np.maximum.accumulate(kept[:, 1])
    opens = np.concatenate([[True], kept[1:, 0] > reach[:-1]])
    ends = np.append(np.flatnonzero(opens)[1:] - 1, len(kept) - 1)
    return np.stack([kept[opens, 0], reach[ends]], 1)
