"""One unit's rows as one Parquet file that says in its footer what it is."""

import base64
import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

_FOOTER, _METRICS = b"dubito", b"dubito.metrics"


@dataclass(frozen=True)
class UnitFile:
    """One finished unit: its file, and what the driver needs to know of its rows."""

    unit: int
    file: str
    """Relative to the folder of predictions."""
    rows: int
    size: int
    sha256: str
    statuses: dict[str, int]
    uncertainty_sum: float
    """Over the rows with status ok."""
    ids: np.ndarray = field(repr=False)
    """(rows,) uint64: the first 8 bytes of the blake2b of each image_id."""
    metrics: bytes = field(default=b"", repr=False)
    """State of the unit's metrics, where the job has truth."""
    scalars: bytes = field(default=b"", repr=False)
    """The rows' numbers as an Arrow stream, where they are wanted and there is no file."""

    def listed(self) -> dict[str, Any]:
        """As the manifest lists it."""
        return {
            "unit": self.unit,
            "file": self.file,
            "rows": self.rows,
            "size": self.size,
            "sha256": self.sha256,
        }


def id_hashes(ids: Iterable[str]) -> np.ndarray:
    """(n,) uint64, one for each id: 8 bytes an image are enough to see that none is there twice."""
    digests = (hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(b"".join(digests), "<u8")


def summarise(table: pa.Table) -> dict[str, Any]:
    """Counts by status, and the sum of ``uncertainty`` over the rows that have one."""
    statuses: dict[str, int] = {}
    for word in table["status"].to_pylist():
        statuses[word] = statuses.get(word, 0) + 1
    return {
        "statuses": statuses,
        "uncertainty_sum": float(np.nansum(np.asarray(table["uncertainty"].drop_null(), np.float64))),
    }


def write_unit(
    uri: str,
    folder: str,
    unit: int,
    table: pa.Table,
    *,
    digest: str,
    sources: Sequence[str],
    metrics: bytes = b"",
) -> UnitFile:
    """Publish one unit's rows as a Parquet file whose footer says what it is.

    The name carries random digits, so a retry never touches a file that a manifest may name already.

    Args:
        uri: The folder of predictions.
        folder: The attempt's name.
        unit: The unit's number in the plan.
        table: Its rows.
        digest: The plan's digest.
        sources: Input files that the rows came from.
        metrics: State of the unit's metrics.
    """
    summary = {
        **summarise(table),
        "plan": digest,
        "unit": unit,
        "rows": table.num_rows,
        "sources": list(sources),
    }
    footer = {_FOOTER: json.dumps(summary, sort_keys=True).encode()}
    if metrics:
        footer[_METRICS] = base64.b64encode(metrics)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(footer), sink, compression="zstd", compression_level=1)
    data = sink.getvalue().to_pybytes()
    name = f"{folder}/unit-{unit:06d}-{secrets.token_hex(4)}.parquet"
    storage.write_bytes(storage.join(uri, name), data)
    return _unit_file(name, data, summary, id_hashes(table["image_id"].to_pylist()), metrics)


def _unit_file(name: str, data: bytes, summary: dict[str, Any], ids: np.ndarray, metrics: bytes) -> UnitFile:
    return UnitFile(
        unit=summary["unit"],
        file=name,
        rows=summary["rows"],
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        statuses=summary["statuses"],
        uncertainty_sum=summary["uncertainty_sum"],
        ids=ids,
        metrics=metrics,
    )


def adoptable(uri: str, name: str, digest: str, expected: Mapping[int, int]) -> UnitFile | None:
    """The finished unit in file ``name``, or None if it is damaged, or of another plan.

    Args:
        uri: The folder of predictions.
        name: The file, relative to it.
        digest: The plan's digest.
        expected: Rows of each unit of the plan.
    """
    try:
        data = storage.read_bytes(storage.join(uri, name))
        file = pq.ParquetFile(pa.BufferReader(data))
        found = file.schema_arrow.metadata or {}
        summary = json.loads(found.get(_FOOTER, b"{}"))
        if summary.get("plan") != digest or expected.get(summary["unit"]) != file.metadata.num_rows:
            return None
        # All columns are decoded: a footer survives damage to the pages before it.
        ids = id_hashes(file.read()["image_id"].to_pylist())
        metrics = base64.b64decode(found.get(_METRICS, b""))
    except (OSError, ValueError, KeyError):  # pa.ArrowInvalid is a ValueError
        return None
    return _unit_file(name, data, summary, ids, metrics)
