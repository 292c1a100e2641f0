"""The order of an epoch, a pure function of seed and epoch; and what of a run remains.

An epoch permutes the row groups, cuts them into windows of as many groups as fit into a bound of bytes, and permutes
the rows inside each window. So a task holds one window at a time, and any window of any epoch is found without the
others. The order knows neither the number of workers nor restarts. *Positions* count rows over all epochs: epoch
``e`` holds the positions from ``e * rows`` on.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np

from pipeline.datasets.shard_reader import RowGroup
from pipeline.stream.ledger import Ledger


@dataclass(frozen=True)
class EpochOrder:
    """The order of every epoch: which row stands at which stream position.

    ``groups_per_window`` is one number for the whole run, so that window ``w`` of any epoch is found without
    a walk over the others.
    """

    groups: tuple[RowGroup, ...]
    seed: int
    groups_per_window: int

    @classmethod
    def of(cls, groups: list[RowGroup], seed: int, window_bytes: int) -> Self:
        """Windows of as many of the largest row groups as fit into ``window_bytes``, at least one."""
        largest = max(group.num_bytes for group in groups)
        return cls(tuple(groups), seed, max(1, window_bytes // max(largest, 1)))

    @property
    def rows(self) -> int:
        """Rows in one epoch."""
        return sum(group.rows for group in self.groups)

    @property
    def windows(self) -> int:
        """Windows in one epoch."""
        return -(-len(self.groups) // self.groups_per_window)

    def window(self, epoch: int, window: int) -> tuple[list[RowGroup], int]:
        """(its row groups in order, the stream position of its first row)."""
        permuted, starts = _permuted(self, epoch)
        # The last window of an epoch may hold fewer groups.
        first = window * self.groups_per_window
        members = [self.groups[i] for i in permuted[first : first + self.groups_per_window]]
        return members, epoch * self.rows + int(starts[first])

    def row_order(self, epoch: int, window: int, rows: int) -> np.ndarray:
        """Permutation of a window's rows: position ``start + k`` holds row ``order[k]``."""
        return np.random.default_rng([self.seed, epoch, window, 1]).permutation(rows)


@lru_cache(maxsize=4)
def _permuted(order: EpochOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(row groups in the epoch's order, the row of the epoch with which each begins); kept, since every window asks."""
    permuted = np.random.default_rng([order.seed, epoch, 0]).permutation(len(order.groups))
    rows = np.array([order.groups[i].rows for i in permuted], np.int64)
    return permuted, np.concatenate([[0], np.cumsum(rows)])


@dataclass(frozen=True)
class RemainingRows:
    """What remains of a run: the positions in [first, stop) that the ledger lacks, a whole number of steps."""

    first: int
    stop: int
    steps: int


def plan_remaining_rows(ledger: Ledger, end: int, global_batch: int) -> RemainingRows:
    """Cut what remains of the run's ``end`` positions into whole global batches.

    What is missing to the last batch is taken from the positions behind ``end`` (padding), so that an equal
    split over the workers cuts nothing.
    """
    missing = end - ledger.count(0, end)
    steps = -(-missing // global_batch)
    padding = steps * global_batch - missing
    stop = end
    # A run that was padded before may have used positions behind ``end``: go on until enough of them are free.
    while padding > 0:
        stop += padding
        padding = steps * global_batch - missing - (stop - end - ledger.count(end, stop))
    return RemainingRows(ledger.first_free(), stop, steps)
