"""One unit's rows as one Parquet file that says in its footer what it is."""

import base64
import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

_FOOTER, _METRICS = b"dubito", b"dubito.metrics"
_NAME = re.compile(r"attempt-\d+/unit-(\d+)-[0-9a-f]+\.parquet")


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
    metrics: bytes = field(default=b"", repr=False)
    """State of the unit's metrics, where the job has truth."""
    scalars: bytes = field(default=b"", repr=False)
    """The rows' numbers as an Arrow stream, where they are wanted and there is no file."""
    decisions: dict[str, int] = field(default_factory=dict)
    """Rows by decision; without a review threshold there is none."""

    def listed(self) -> dict[str, Any]:
        """As the manifest lists it."""
        return {
            "unit": self.unit,
            "file": self.file,
            "rows": self.rows,
            "size": self.size,
            "sha256": self.sha256,
        }


def unit_number(name: str) -> int:
    """The unit that a file is of, by its name; -1 for none."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else -1


def summarise(table: pa.Table) -> dict[str, Any]:
    """Counts by status and by decision, and the sum of ``uncertainty`` over the rows that have one."""
    return {
        "statuses": dict(Counter(table["status"].to_pylist())),
        "decisions": dict(Counter(table["decision"].drop_null().to_pylist())),
        "uncertainty_sum": float(np.nansum(np.asarray(table["uncertainty"].drop_null(), np.float64))),
    }


def count_statuses(units: Iterable[UnitFile]) -> dict[str, int]:
    """Rows by status over all units."""
    statuses: dict[str, int] = {}
    for unit_file in units:
        for status, count in unit_file.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    return statuses


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
    return _unit_file(name, data, summary, metrics)


def _unit_file(name: str, data: bytes, summary: dict[str, Any], metrics: bytes) -> UnitFile:
    return UnitFile(
        unit=summary["unit"],
        file=name,
        rows=summary["rows"],
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        statuses=summary["statuses"],
        uncertainty_sum=summary["uncertainty_sum"],
        decisions=summary.get("decisions", {}),
        metrics=metrics,
    )


def adoptable(uri: str, name: str, digest: str, ids: pa.ChunkedArray) -> UnitFile | None:
    """The finished unit in file ``name``, or None if it is damaged, or of another plan.

    Args:
        uri: The folder of predictions.
        name: The file, relative to it.
        digest: The plan's digest.
        ids: image_ids of the unit's rows, as planned.
    """
    try:
        data = storage.read_bytes(storage.join(uri, name))
        file = pq.ParquetFile(pa.BufferReader(data))
        footer = file.schema_arrow.metadata or {}
        summary = json.loads(footer.get(_FOOTER, b"{}"))
        if summary.get("plan") != digest or summary.get("unit") != unit_number(name):
            return None
        # All columns are decoded: a footer survives damage to the pages before it.
        if not file.read()["image_id"].equals(ids):
            return None
        metrics = base64.b64decode(footer.get(_METRICS, b""))
    except (OSError, ValueError, KeyError):  # pa.ArrowInvalid is a ValueError
        return None
    return _unit_file(name, data, summary, metrics)
