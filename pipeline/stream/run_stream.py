"""Shards -> the run's own order -> one Ray Dataset for all the rest of the run.

Ray evaluates a dataset factory once at each start of the worker group and re-executes that same Dataset if
it is iterated again, so an order that changes every epoch, or "only the rest" after a restart, cannot come
from Ray. Here one lazy Dataset covers the rest of the run. A *stream position* is ``epoch * rows + index``;
the order behind it is a pure function of (seed, epoch): row groups are permuted, and rows are shuffled
inside windows of neighbouring row groups bounded in bytes. It depends neither on workers nor on restarts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
import ray.data
from pydantic import Field, model_validator

from pipeline.config import Settings
from pipeline.datasets import image_fetch
from pipeline.datasets.dataset import DatasetInfo
from pipeline.datasets.shard_reader import read_row_group
from pipeline.schema import LABEL_COLUMNS
from pipeline.stream.epoch_order import EpochOrder, RemainingRows
from pipeline.stream.ledger import Ledger

if TYPE_CHECKING:  # tasks that ship bytes do without it, and without torch: 2 s less to start each
    from pipeline.stream.frame_cache import FrameCache, FrameRows

ROW_COLUMNS = ["image_id", "image", "height", "width"]


class StreamSettings(Settings):
    """How training rows are shuffled and fetched."""

    window_mb: int = 64
    """Rows are shuffled inside windows of this many megabytes of encoded images."""
    prefetch: int = Field(default=2, ge=1)
    """Batches fetched, decoded and framed ahead of the model."""
    decode: Literal["auto", "device", "host", "cluster"] = "auto"
    """Where images become pixels: on the worker's GPU (ordinary JPEGs; the rest on its CPU threads), on its CPU
    threads alone, or in Ray Data tasks on any node, from where frames of ``input.size`` travel instead of encoded
    images, which are some ten times smaller. ``auto``: ``device`` with a GPU, else ``host``."""
    cache: Literal["none", "decoded"] = "none"
    """``decoded``: tasks frame every image once, and the frames of the whole train split stay in the object store for
    all further epochs. Refused where they would not fit, and with ``input.fit: crop``, whose frames are random."""

    @property
    def frames(self) -> bool:
        """Whether frames travel to the workers, not encoded images."""
        return self.decode == "cluster" or self.cache == "decoded"

    @model_validator(mode="after")
    def _cache_needs_tasks(self) -> Self:
        if self.cache == "decoded" and self.decode in ("device", "host"):
            raise ValueError(
                f"stream.cache: decoded keeps what tasks of the cluster decode, and stream.decode is {self.decode}; "
                "set decode to auto or cluster, or cache to none"
            )
        return self


@dataclass(frozen=True)
class ExpandUnits:
    """Turns plan units into rows, inside Ray Data tasks."""

    order: EpochOrder
    columns: tuple[str, ...]
    first_unit: int
    stop: int
    ledger: bytes
    block_rows: int
    resumed_from: str
    framing: "FrameRows | None" = None
    """Frames rows in the task; None: encoded images travel."""
    cache: "FrameCache | None" = None
    """Has framed row groups; None: they are read from the shards, and framed, in every epoch."""

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        """Yield the rows of each unit in ``batch["id"]``, ``block_rows`` at a time."""
        ledger = Ledger.from_bytes(self.ledger)
        for unit in batch["id"]:
            yield from self._window(*divmod(int(unit) + self.first_unit, self.order.windows), ledger)

    def _window(self, epoch: int, window: int, ledger: Ledger) -> Iterator[pa.Table]:
        # Positions that optimiser steps have used, as of the checkpoint, are left out: nothing is trained on twice.
        groups, start = self.order.window(epoch, window)
        rows = sum(group.rows for group in groups)
        positions = np.arange(start, start + rows, dtype=np.int64)
        keep = np.flatnonzero((positions < self.stop) & ~ledger.contains(positions))
        if not len(keep):
            return
        if self.cache:
            tables = self.cache.read(groups)
        else:
            row_groups = [read_row_group(group, list(self.columns)) for group in groups]
            # One copy of the window, or every ``take`` below would join all of it anew.
            tables = [pa.concat_tables(row_groups).combine_chunks()]
        # Small blocks in the window's order: few images still reach all workers evenly.
        chosen = self.order.row_order(epoch, window, rows)[keep]
        blocks = self._blocks(tables, chosen, positions[keep], epoch)
        for block in image_fetch.require_images(blocks):
            # Cached rows are frames already.
            if self.framing and not self.cache:
                yield self.framing(block)
            else:
                yield block

    def _blocks(
        self, tables: list[pa.Table], chosen: np.ndarray, positions: np.ndarray, epoch: int
    ) -> Iterator[pa.Table]:
        """The chosen rows in blocks, each row with its position, its epoch and the checkpoint that it follows."""
        for at in range(0, len(chosen), self.block_rows):
            part = slice(at, at + self.block_rows)
            block = _gather(tables, chosen[part])
            count = block.num_rows
            yield (
                block.append_column("position", pa.array(positions[part]))
                .append_column("epoch", pa.array(np.full(count, epoch, np.int64)))
                .append_column("resumed_from", pa.array([self.resumed_from] * count, pa.string()))
            )


def _gather(parts: list[pa.Table], rows: np.ndarray) -> pa.Table:
    """Rows of the tables under one another, in the order asked for, without a copy of any other row."""
    starts = np.cumsum([0, *(part.num_rows for part in parts[:-1])])
    which = np.searchsorted(starts, rows, side="right") - 1
    pieces = [parts[k].take(pa.array(rows[which == k] - starts[k])) for k in np.unique(which)]
    if len(pieces) == 1:
        return pieces[0]
    back = np.empty(len(rows), np.int64)
    back[np.argsort(which, kind="stable")] = np.arange(len(rows))
    return pa.concat_tables(pieces).combine_chunks().take(pa.array(back))


def dataset(
    order: EpochOrder,
    rest: RemainingRows,
    ledger: Ledger,
    columns: list[str],
    block_rows: int,
    resumed_from: str,
    framing: "FrameRows | None" = None,
    cached: bool = False,
) -> ray.data.Dataset:
    """One lazy Ray Dataset of all the rows that remain, in the run's order.

    Args:
        order: The run's order.
        rest: What to stream.
        ledger: What to leave out.
        columns: Columns to read from the shards; ``position``, ``epoch`` and ``resumed_from`` are added.
        block_rows: Rows in a block, at most one local batch, so that small datasets reach all workers.
        resumed_from: Name of the checkpoint whose ledger this is; workers check that it is theirs.
        framing: Decodes and frames rows in the tasks; None: encoded images travel.
        cached: Whether what ``framing`` made stays in the object store while the Dataset lives.
    """
    first_unit = (rest.first // order.rows) * order.windows
    units = max(1, -(-rest.stop // order.rows) * order.windows - first_unit)
    cache = None
    if framing and cached:
        from pipeline.stream.frame_cache import FrameCache

        cache = FrameCache.start(framing, columns)
    stored = ledger.to_bytes()
    expand = ExpandUnits(order, tuple(columns), first_unit, rest.stop, stored, block_rows, resumed_from, framing, cache)
    plan = ray.data.range(units, override_num_blocks=units)
    function: Any = expand  # Ray types callables that yield, but not objects that are such
    out = plan.map_batches(function, batch_size=1, batch_format="numpy", zero_copy_batch=True)
    # Ray glues what a task yields to blocks of this size (128 MB by default: one block, one worker).
    row_bytes = sum(group.num_bytes for group in order.groups) // max(order.rows, 1)
    row_bytes += framing.row_bytes if framing else 0
    out.context.target_max_block_size = max(1, row_bytes * block_rows)
    out.context.execution_options.preserve_order = True
    return out


def training_columns(task: str, info: DatasetInfo) -> list[str]:
    """What is read of a training row: the encoded image, or where it is, and this task's labels."""
    return [*ROW_COLUMNS, *(image_fetch.REFERENCE_COLUMNS if info.referenced else ()), *LABEL_COLUMNS[task]]


def batch_arrays(table: pa.Table) -> dict[str, Any]:
    """The stream's own columns of a batch as numpy: ``position``, ``epoch`` (n,) and ``resumed_from``."""
    return {
        "position": table["position"].to_numpy(),
        "epoch": table["epoch"].to_numpy(),
        "resumed_from": table["resumed_from"][0].as_py(),
    }
