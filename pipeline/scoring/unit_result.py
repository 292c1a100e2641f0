"""What an actor sends to the driver of a unit: one small row, with a fault instead of a result where there is one."""

import json
from typing import Any

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.predictions.unit_file import UnitFile

_COUNTS = ("statuses", "decisions")
"""Fields that travel as JSON: Arrow would make structs with every key of them."""


def unit_result_to_table(result: UnitFile, fault: str = "") -> pa.Table:
    """One row. A fault travels in it as text, since Ray loses the type of what an actor raises."""
    values = {**result.listed(), "uncertainty_sum": result.uncertainty_sum, "fault": fault, "metrics": result.metrics}
    values |= {name: json.dumps(getattr(result, name)) for name in _COUNTS} | {"scalars": result.scalars}
    return pa.table({name: [value] for name, value in values.items()})


def unit_fault_to_table(unit: int, fault: str) -> pa.Table:
    """The row of a unit that could not be scored."""
    return unit_result_to_table(UnitFile(unit, "", 0, 0, "", {}, 0.0), fault)


def unit_result_from_row(row: dict[str, Any]) -> UnitFile:
    """The result in a row of ``unit_result_to_table``.

    Raises:
        InputError: With the fault, where the row has one.
    """
    fault = row.pop("fault")
    if fault:
        raise InputError(fault)
    return UnitFile(**{**row, **{name: json.loads(row[name]) for name in _COUNTS}})
