"""Reading shards: row groups checked against what was written, image_ids of a whole shard."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.errors import InputError, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class RowGroup:
    """A piece of a shard that is read at once."""

    file: str
    """URI of the shard."""
    index: int
    rows: int
    num_bytes: int
    """Of encoded images and masks, whether in the shard or only referred to."""


def read_row_group(group: RowGroup, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one group; ``columns`` are names of ``schema.DATASET``, None reads all.

    Pages are checked against their CRC, and what the footer alone says against the contract: a flipped bit is found.

    Raises:
        InputError: The shard is gone or damaged.
    """
    names = list(schema.DATASET.names) if columns is None else list(columns)
    return _read_twice(group.file, lambda: _read(group, names))


def read_ids(file: str) -> list[pa.ChunkedArray]:
    """The image_ids of a shard, row group by row group.

    Raises:
        InputError: As ``read_row_group``.
    """

    def read() -> list[pa.ChunkedArray]:
        with _opened(file) as parquet:
            whole = parquet.read(["image_id"])["image_id"]
            rows = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *rows])
        return [whole.slice(start, count) for start, count in zip(starts, rows, strict=False)]

    return _read_twice(file, read)


def groups_of(file: str) -> list[RowGroup]:
    """The row groups of a shard, by its own footer.

    Raises:
        InputError: As ``read_row_group``.
    """

    def read() -> list[RowGroup]:
        with _opened(file) as parquet:
            footers = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        return [RowGroup(file, index, footer.num_rows, footer.total_byte_size) for index, footer in enumerate(footers)]

    return _read_twice(file, read)


def _read_twice(file: str, read: Callable[[], T]) -> T:
    """With patience, and once more where bytes may have been damaged on the way."""
    tries = 1 if storage.scheme_of(file) == "file" else 2
    for last in (tries == 1, True):
        try:
            return storage.with_retries(file, read)
        except InputError:
            if last:
                raise
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _opened(file: str) -> Iterator[pq.ParquetFile]:
    """A shard; whatever is wrong with it, here or while it is read, is an InputError, and an OSError one of storage."""
    options: dict[str, Any] = {"pre_buffer": True, "page_checksum_verification": True}
    try:
        with storage.open_input(file) as source, pq.ParquetFile(source, **options) as parquet:
            yield parquet
    except (FileNotFoundError, ValueError, NotImplementedError) as error:
        raise _damaged(file, str(error)) from None
    except OSError as error:
        # Arrow says OSError of bytes that are no Parquet too; then neither system nor store has a say in it.
        if error.errno is None and storage.error_status(error) == "error" and "AWS Error" not in str(error):
            raise _damaged(file, str(error)) from None
        raise


def _read(group: RowGroup, names: list[str]) -> pa.Table:
    with _opened(group.file) as parquet:
        table = parquet.read_row_group(group.index, columns=names)
    if table.num_rows != group.rows or table.schema.types != [schema.DATASET.field(name).type for name in names]:
        raise _damaged(group.file, f"{table.num_rows} rows of {table.schema.names} where {group.rows} were written")
    return table


def _damaged(file: str, detail: str) -> InputError:
    text = one_line(detail)
    return InputError(f"shard '{file}' cannot be read, the dataset is damaged; ingest again: {text}")
