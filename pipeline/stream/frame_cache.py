"""Frames made in Ray tasks on any node, and kept in the object store: what travels instead of encoded images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa
import ray

from pipeline.augment import crop_offsets
from pipeline.datasets import image_fetch
from pipeline.datasets.shard_reader import RowGroup, read_row_group
from pipeline.errors import InputError
from pipeline.images.decode import decode_many
from pipeline.images.host_frames import Paster
from pipeline.images.input_settings import InputSettings
from pipeline.images.layout import lay_out
from pipeline.tasks.collate import FAULT, FRAME, stored_sizes, usable_rows

CACHE_SHARE = 0.4
"""Of the object stores that frames may fill: Ray Data takes up to half for what is on its way, and something is left
for the workers' own objects."""


@dataclass(frozen=True)
class FrameRows:
    """Decodes and frames training rows as ``Task.collate`` would; sent with the tasks."""

    input: InputSettings
    seed: int
    """Of the windows that ``fit: crop`` takes."""

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return lay_out([], self.input, train=True).canvas

    @property
    def row_bytes(self) -> int:
        """Of one frame."""
        return self.canvas[0] * self.canvas[1] * 3

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows with ``FRAME`` (height x width x 3 bytes) and ``FAULT`` in the place of ``image``.

        ``FAULT`` is null, or says why the row has no frame: "reason: detail".
        """
        rows, offsets = table.num_rows, None
        if self.input.fit == "crop":
            offsets = crop_offsets(self.seed, *(table[name].to_numpy() for name in ("epoch", "position")))
        paster = Paster(rows, self.input, train=True, offsets=offsets)
        encoded = table["image"].to_pylist()
        decoded = usable_rows(decode_many(encoded, 1, paster.target_size, then=paster), stored_sizes(table))
        frames = paster.frames.reshape(rows, -1).numpy()
        faults: list[str | None] = [None] * table.num_rows
        for row, reason, detail in decoded.failures:
            faults[row], frames[row] = f"{reason}: {detail}", 0
        column = pa.Array.from_buffers(pa.binary(self.row_bytes), table.num_rows, [None, pa.py_buffer(frames)])
        table = table.drop_columns(["image"]).append_column(FRAME, column)
        return table.append_column(FAULT, pa.array(faults, pa.string()))


@dataclass(frozen=True)
class FrameCache:
    """Framed row groups in the object store: each is framed by one task, when it is first asked for."""

    keeper: Any
    """The actor that owns them: they live as long as it, and it as long as something refers to it."""

    @classmethod
    def start(cls, framing: FrameRows, columns: Sequence[str]) -> Self:
        """An empty cache of rows with these columns of the shards."""
        actor: Any = ray.remote(num_cpus=0)(_Keeper)
        return cls(actor.remote(framing, tuple(columns)))

    def read(self, groups: Sequence[RowGroup]) -> list[pa.Table]:
        """The framed rows of each group; without a copy where they lie on this node."""
        return ray.get(ray.get(self.keeper.refs.remote(list(groups))))


class _Keeper:
    """Holds the references. Tasks, not it, do the work: an object that is lost with its node is made again."""

    def __init__(self, framing: FrameRows, columns: tuple[str, ...]) -> None:
        self._framing, self._columns = framing, columns
        self._refs: dict[tuple[str, int], Any] = {}

    def refs(self, groups: list[RowGroup]) -> list[Any]:
        """A reference for each group."""
        task: Any = ray.remote(_framed_group)
        for group in groups:
            if (group.file, group.index) not in self._refs:
                self._refs[group.file, group.index] = task.remote(group, self._columns, self._framing)
        return [self._refs[group.file, group.index] for group in groups]

    def count(self) -> int:
        """Row groups that were asked for."""
        return len(self._refs)


def _framed_group(group: RowGroup, columns: tuple[str, ...], framing: FrameRows) -> pa.Table:
    (table,) = image_fetch.require_images([read_row_group(group, columns)])
    return framing(table)


def require_cache_room(framing: FrameRows, rows: int, store_bytes: float) -> None:
    """Refuse a cache that the object stores of the cluster could not hold.

    Args:
        framing: Of the frames.
        rows: How many.
        store_bytes: Of all object stores (Ray's resource ``object_store_memory``).

    Raises:
        InputError: The frames would take more than ``CACHE_SHARE`` of it.
    """
    needed_bytes, available_bytes = rows * framing.row_bytes, store_bytes * CACHE_SHARE
    if needed_bytes > available_bytes:
        height, width = framing.canvas
        raise InputError(
            f"stream.cache: decoded would keep {rows} frames of {height}x{width}, {needed_bytes / 1e9:.2f} GB; the "
            f"cluster's object stores have {store_bytes / 1e9:.2f} GB, of which frames may take {CACHE_SHARE:.0%} "
            f"({available_bytes / 1e9:.2f} GB); set stream.cache to none, lower input.size, or give Ray more "
            "object_store_memory"
        )
