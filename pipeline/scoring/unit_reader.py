"""Reading a unit's encoded images, in tasks: without torch, whose import costs a task more than its reading."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.datasets import image_fetch
from pipeline.datasets.shard_reader import RowGroup, read_row_group
from pipeline.errors import InputError

_FETCHED = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("sha256", pa.string()),
        ("image", pa.binary()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Reader:
    """Runs in tasks: one planned unit -> the same row with its images, as an Arrow stream."""

    data: str
    """URI of the dataset."""
    columns: tuple[str, ...]
    """Read from a dataset."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """``batch`` is one row: a unit."""
        spec = json.loads(batch["spec"][0].as_py())
        sink, fault = pa.BufferOutputStream(), None
        try:
            write_stream(read_unit(spec["source"], spec["rows"], self.data, self.columns), sink)
        except InputError as error:
            fault = str(error)
        stream = sink.getvalue()
        ends = pa.py_buffer(np.array([0, stream.size], np.int64))
        images = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, stream])
        files, faults = [json.dumps(spec["files"])], pa.array([fault], pa.string())
        return pa.table({"unit": batch["unit"], "files": files, "images": images, "fault": faults})


def without_image(table: pa.Table, error: str) -> pa.Table:
    """The same rows, which could not be predicted for that reason."""
    rows = table.num_rows
    new = {
        "image": pa.nulls(rows, pa.binary()),
        "status": pa.array(["error"] * rows, pa.string()),
        "error": pa.array([error] * rows, pa.string()),
    }
    for name, column in new.items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, column)
    return table


def write_stream(table: pa.Table, sink: pa.BufferOutputStream) -> None:
    """A table as an Arrow stream."""
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


def read_stream(data: pa.Buffer) -> pa.Table:
    """The table in an Arrow stream, without a copy."""
    with pa.ipc.open_stream(data) as stream:
        return stream.read_all()


def read_unit(source: dict[str, Any], rows: int, data: str, columns: Sequence[str]) -> pa.Table:
    """The rows of one unit, with their encoded bytes.

    Args:
        source: As planned by ``units``.
        rows: As planned.
        data: URI of the dataset, for a unit of one.
        columns: Columns to read from a dataset.

    Raises:
        InputError: The shard is gone, damaged, or another one than planned.
    """
    if "paths" in source:
        return _fetch_page(source)
    group = RowGroup(storage.join(data, source["file"]), source["group"], source["group_rows"], 0)
    table = read_row_group(group, list(columns)).slice(source["start"], rows)
    if table.num_rows != rows:
        raise InputError(f"'{group.file}' has changed since the job began: {table.num_rows} rows where {rows} were")
    return image_fetch.with_images(table) if table["image"].null_count else table


def _fetch_page(source: dict[str, Any]) -> pa.Table:
    uris = [storage.join(source["root"], path) for path in source["paths"]]
    fetched = image_fetch.fetch_images(uris, source["sizes"])
    columns = {
        "image_id": source["paths"],
        "uri": uris,
        "sha256": [None if item.data is None else hashlib.sha256(item.data).hexdigest() for item in fetched],
        "image": [item.data for item in fetched],
        "status": [item.status for item in fetched],
        "error": [item.error for item in fetched],
    }
    return pa.Table.from_pydict(columns, schema=_FETCHED)
