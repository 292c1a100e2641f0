"""Parquet lists of files that a small JSON names: what keeps a manifest small when its files are many."""

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.predictions.unit_file import UnitFile
from pipeline.storage.checksum import read_verified

FOLDER = "_lists"
"""Beside the attempts; tools that glob for rows, and readers of whole folders, pass by names with an underscore."""
LIST_FILES = 4096
"""Files of one list."""
SCHEMA = pa.schema(
    [
        ("unit", pa.int64()),
        ("file", pa.string()),
        ("rows", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("statuses", pa.string()),
        ("uncertainty_sum", pa.float64()),
    ]
)
"""Columns of a list; ``statuses`` is JSON."""


def write_lists(uri: str, name: str, units: Sequence[UnitFile]) -> list[dict[str, Any]]:
    """Write lists of these files, in the order of the plan; ``{file, files, rows, size, sha256}`` of each list.

    Args:
        uri: The folder of predictions.
        name: What the lists are called; random digits are added, so no list is ever overwritten.
        units: Files, of distinct units.
    """
    ordered, entries = sorted(units, key=lambda item: item.unit), []
    for start in range(0, len(ordered), LIST_FILES):
        unit_files = ordered[start : start + LIST_FILES]
        rows = [
            {**item.listed(), "statuses": json.dumps(item.statuses), "uncertainty_sum": item.uncertainty_sum}
            for item in unit_files
        ]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        file = f"{FOLDER}/{name}-{start // LIST_FILES:05d}-{secrets.token_hex(4)}.parquet"
        storage.write_bytes(storage.join(uri, file), data)
        entries.append({
            "file": file, "files": len(unit_files), "rows": sum(item.rows for item in unit_files), "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        })  # fmt: skip
    return entries


def read_list(uri: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of one list: ``unit, file, rows, size, sha256, statuses, uncertainty_sum``.

    Raises:
        InputError: It is missing, or not what the manifest says.
    """
    table = pq.read_table(pa.BufferReader(read_named(uri, entry)), schema=SCHEMA)
    return table.to_pylist()


def iter_files(uri: str, manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every file of a committed manifest, in the order of the plan; one list is held at a time.

    Raises:
        InputError: As ``read_list``.
    """
    for entry in manifest["lists"]:
        yield from read_list(uri, entry)


def read_named(uri: str, entry: Mapping[str, Any]) -> bytes:
    """A file's bytes, if they are those that ``entry`` (``file, sha256``) was written for.

    Raises:
        InputError: They are not, or it could not be read.
    """
    return read_verified(storage.join(uri, entry["file"]), entry["sha256"], "predict again to another folder")
