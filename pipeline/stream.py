"""Shards -> the run's own order -> one Ray Dataset for all the rest of the run; and the ledger of what was used.

Ray evaluates a dataset factory once at each start of the worker group and re-executes that same Dataset if
it is iterated again, so an order that changes every epoch, or "only the rest" after a restart, cannot come
from Ray. Here one lazy Dataset covers the rest of the run. A *stream position* is ``epoch * rows + index``;
the order behind it is a pure function of (seed, epoch): row groups are permuted, and rows are shuffled
inside windows of neighbouring row groups bounded in bytes. It depends neither on workers nor on restarts.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import pyarrow as pa
import ray.data

from pipeline.config import Settings
from pipeline.datasets import DatasetInfo, RowGroup, read_row_group, row_groups

LABEL_COLUMNS = {"segmentation": ["mask"], "detection": ["boxes"]}
ROW_COLUMNS = ["image_id", "image", "height", "width"]


class StreamSettings(Settings):
    """How training rows are shuffled and fetched."""

    window_mb: int = 64
    """Rows are shuffled inside windows of this many megabytes of encoded images."""
    prefetch: int = 2
    """Batches fetched, decoded and framed ahead of the model."""


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


@dataclass(frozen=True)
class Order:
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
        first = window * self.groups_per_window
        members = [self.groups[i] for i in permuted[first : first + self.groups_per_window]]
        return members, epoch * self.rows + int(starts[first])

    def row_order(self, epoch: int, window: int, rows: int) -> np.ndarray:
        """Permutation of a window's rows: position ``start + k`` holds row ``order[k]``."""
        return np.random.default_rng([self.seed, epoch, window, 1]).permutation(rows)


@lru_cache(maxsize=4)
def _permuted(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    permuted = np.random.default_rng([order.seed, epoch, 0]).permutation(len(order.groups))
    rows = np.array([order.groups[i].rows for i in permuted], np.int64)
    return permuted, np.concatenate([[0], np.cumsum(rows)])


@dataclass(frozen=True)
class Rest:
    """What remains of a run: the positions in [first, stop) that the ledger lacks, a whole number of steps."""

    first: int
    stop: int
    steps: int


def plan_rest(ledger: Ledger, end: int, global_batch: int) -> Rest:
    """Cut what remains of the run's ``end`` positions into whole global batches.

    What is missing to the last batch is taken from the positions behind ``end`` (padding), so that an equal
    split over the workers cuts nothing.
    """
    missing = end - ledger.count(0, end)
    steps = -(-missing // global_batch)
    wanted, stop = steps * global_batch - missing, end
    while wanted > 0:
        stop += wanted
        wanted = steps * global_batch - missing - (stop - end - ledger.count(end, stop))
    return Rest(ledger.first_free(), stop, steps)


@dataclass(frozen=True)
class Expand:
    """Turns plan units into rows, inside Ray Data tasks."""

    order: Order
    columns: tuple[str, ...]
    first_unit: int
    stop: int
    ledger: bytes
    block_rows: int
    resumed_from: str

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        """Yield the rows of each unit in ``batch["id"]``, ``block_rows`` at a time."""
        ledger = Ledger.from_bytes(self.ledger)
        for unit in batch["id"]:
            yield from self._window(*divmod(int(unit) + self.first_unit, self.order.windows), ledger)

    def _window(self, epoch: int, window: int, ledger: Ledger) -> Iterator[pa.Table]:
        groups, start = self.order.window(epoch, window)
        rows = sum(group.rows for group in groups)
        positions = np.arange(start, start + rows, dtype=np.int64)
        keep = np.flatnonzero((positions < self.stop) & ~ledger.contains(positions))
        if not len(keep):
            return
        table = pa.concat_tables([read_row_group(group, list(self.columns)) for group in groups])
        chosen = self.order.row_order(epoch, window, rows)[keep]
        for at in range(0, len(keep), self.block_rows):
            part = slice(at, at + self.block_rows)
            block = table.take(pa.array(chosen[part]))
            count = block.num_rows
            yield (
                block.append_column("position", pa.array(positions[keep[part]]))
                .append_column("epoch", pa.array(np.full(count, epoch, np.int64)))
                .append_column("resumed_from", pa.array([self.resumed_from] * count, pa.string()))
            )


def dataset(
    order: Order, rest: Rest, ledger: Ledger, columns: list[str], block_rows: int, resumed_from: str
) -> ray.data.Dataset:
    """One lazy Ray Dataset of all the rows that remain, in the run's order.

    Args:
        order: The run's order.
        rest: What to stream.
        ledger: What to leave out.
        columns: Columns to read from the shards; ``position``, ``epoch`` and ``resumed_from`` are added.
        block_rows: Rows in a block, at most one local batch, so that small datasets reach all workers.
        resumed_from: Name of the checkpoint whose ledger this is; workers check that it is theirs.
    """
    first_unit = (rest.first // order.rows) * order.windows
    units = max(1, -(-rest.stop // order.rows) * order.windows - first_unit)
    expand = Expand(order, tuple(columns), first_unit, rest.stop, ledger.to_bytes(), block_rows, resumed_from)
    plan = ray.data.range(units, override_num_blocks=units)
    function: Any = expand  # Ray types callables that yield, but not objects that are such
    out = plan.map_batches(function, batch_size=1, batch_format="numpy", zero_copy_batch=True)
    # Ray glues what a task yields to blocks of this size (128 MB by default: one block, one worker).
    row_bytes = sum(group.num_bytes for group in order.groups) // max(order.rows, 1)
    out.context.target_max_block_size = max(1, row_bytes * block_rows)
    out.context.execution_options.preserve_order = True
    return out


def training_columns(task: str) -> list[str]:
    """What a training row carries through the object store: the encoded image and this task's labels."""
    return [*ROW_COLUMNS, *LABEL_COLUMNS[task]]


def share(info: DatasetInfo, split: str, rank: int, world: int, columns: list[str]) -> Iterator[pa.Table]:
    """This rank's rows of a split, one row group at a time: every row at exactly one rank, none dropped.

    Validation reads its shards directly: a Ray Data execution costs a start, and an equal split loses rows.
    """
    groups = row_groups(info, split)
    total = sum(group.rows for group in groups)
    low, high = rank * total // world, (rank + 1) * total // world
    start = 0
    for group in groups:
        a, b = max(low, start), min(high, start + group.rows)
        if a < b:
            yield read_row_group(group, columns).slice(a - start, b - a)
        start += group.rows


def slices(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of at most ``rows``, each of images of one size: no batch pads small to large."""
    for table in tables:
        sizes = np.stack([table["height"].to_numpy(), table["width"].to_numpy()], 1)
        for size in np.unique(sizes, axis=0):
            alike = table.take(pa.array(np.flatnonzero((sizes == size).all(1))))
            for at in range(0, alike.num_rows, rows):
                yield alike.slice(at, rows)


def batch_arrays(table: pa.Table) -> dict[str, Any]:
    """The stream's own columns of a batch as numpy: ``position``, ``epoch`` (n,) and ``resumed_from``."""
    return {
        "position": table["position"].to_numpy(),
        "epoch": table["epoch"].to_numpy(),
        "resumed_from": table["resumed_from"][0].as_py(),
    }
