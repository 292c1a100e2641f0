"""Prediction rows while they are being filled."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import one_line
from pipeline.models.bundle import Bundle
from pipeline.schema import PREDICTIONS

_CARRIED = ("image_id", "uri", "sha256")


class PredictionRows:
    """The output rows while they are being filled, in the order of the input.

    Args:
        table: The input rows.
        bundle: What predicts them; its threshold decides.
        members: Members of the pool, views and dropout passes among them.
    """

    def __init__(self, table: pa.Table, bundle: Bundle, members: int) -> None:
        count = table.num_rows
        self.schema, self.threshold, self.ok = PREDICTIONS[bundle.task], bundle.manifest["threshold"], 0
        self.columns: dict[str, list[Any]] = {name: [None] * count for name in self.schema.names}
        for name in (*_CARRIED, "height", "width", "status", "error"):
            if name in table.column_names:
                self.columns[name] = table[name].to_pylist()
        self.columns["bundle_id"] = [bundle.id] * count
        self.columns["members"] = [members] * count
        self.missing = [not value.is_valid for value in table["image"]]
        for row in self.usable_rows():
            self.columns["status"][row] = None
        for row, absent in enumerate(self.missing):
            if absent and self.columns["status"][row] in (None, "ok"):
                self.fail(row, "missing", "no image bytes")

    def usable_rows(self) -> list[int]:
        """Rows that have bytes and have not failed."""
        status = self.columns["status"]
        return [row for row, absent in enumerate(self.missing) if not absent and status[row] in (None, "ok")]

    def fail(self, row: int, status: str, detail: str) -> None:
        """Nothing is predicted for this row."""
        self.columns["status"][row] = status
        self.columns["error"][row] = one_line(detail)

    def fill(self, rows: Sequence[int], columns: dict[str, list[Any]], sizes: list[list[int]]) -> None:
        """The predictions of ``rows``."""
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                self.columns[name][row] = value
        for row, (height, width) in zip(rows, sizes, strict=True):
            self.columns["height"][row], self.columns["width"][row] = height, width
            self.columns["status"][row], self.columns["error"][row] = "ok", None
            if self.threshold is not None:
                self.columns["decision"][row] = self._decide(self.columns["uncertainty"][row])
        self.ok += len(rows)

    def _decide(self, uncertainty: float) -> str:
        """A threshold of null accepts nothing; doubt that is no number is doubt."""
        limit = self.threshold["value"]
        return "accept" if limit is not None and np.float32(uncertainty) <= np.float32(limit) else "review"

    def to_table(self) -> pa.Table:
        """The finished rows; every one has a status."""
        assert None not in self.columns["status"]
        return pa.Table.from_pydict(self.columns, schema=self.schema)
