"""Validation rows: each rank's share, in tables of one size."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from pipeline.datasets import image_fetch
from pipeline.datasets.dataset import DatasetInfo, row_groups
from pipeline.datasets.shard_reader import read_row_group


def rows_of_rank(info: DatasetInfo, split: str, rank: int, world: int, columns: list[str]) -> Iterator[pa.Table]:
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
            part = read_row_group(group, columns).slice(a - start, b - a)
            yield from image_fetch.require_images([part])
        start += group.rows


def same_size_batches(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of at most ``rows``, each of images of one size: no batch pads small to large."""
    for table in tables:
        sizes = np.stack([table["height"].to_numpy(), table["width"].to_numpy()], 1)
        for size in np.unique(sizes, axis=0):
            alike = table.take(pa.array(np.flatnonzero((sizes == size).all(1))))
            for at in range(0, alike.num_rows, rows):
                yield alike.slice(at, rows)
