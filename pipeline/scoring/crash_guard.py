"""What becomes of units whose process died: of a kill, of want of memory, of an image that breaks a library.

Ray starts a dead actor again and gives it the same unit, for ever. So starts of units and of processes are counted:
what dies again and again is predicted image by image, an image that ended two processes is left out and said so, and
at last the job ends.
"""

import contextlib
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray

from pipeline.errors import InputError
from pipeline.predictions.unit_file import UnitFile
from pipeline.runtime import prometheus

CAREFUL_FROM = 3
"""Start of a unit from which on its images are predicted one by one: the first deaths may be anybody's fault."""
DEATHS_TO_SKIP = 2
"""Deaths with the same image in hand that make it the culprit: other units of that process die with it."""
MAX_STARTS = 8
"""Starts of a unit after which the job ends, and two more for every culprit in it."""
MEMORY_HINT = (
    "most likely for want of memory; give it more, run fewer actors, or lower the members' input.size or predict.tta"
)
_COUNTS = ("statuses", "decisions")
SKIPPED_IMAGE = "the process that predicted this image ended, twice: out of memory, or a library that it breaks"


class StartCounter:
    """Counts, in an actor of its own that outlives those that it counts."""

    def __init__(self) -> None:
        self._starts: Counter[int] = Counter()
        self._in_hand: dict[int, int] = {}
        self._deaths: dict[int, Counter[int]] = {}
        self._births = 0

    def process_started(self) -> int:
        """How many processes were started since a unit was last finished, this one included."""
        self._births += 1
        return self._births

    def unit_started(self, unit: int) -> tuple[int, list[int]]:
        """(how often the unit was started, this time included; its rows that ended a process ``GUILTY`` times)."""
        self._starts[unit] += 1
        row = self._in_hand.pop(unit, None)
        if row is not None:
            self._deaths.setdefault(unit, Counter())[row] += 1
        deaths = self._deaths.get(unit, Counter())
        return self._starts[unit], sorted(row for row, count in deaths.items() if count >= DEATHS_TO_SKIP)

    def image_started(self, unit: int, row: int) -> None:
        """That row is in hand now."""
        self._in_hand[unit] = row

    def unit_done(self, unit: int) -> None:
        """Forget the unit."""
        self._births = 0
        self._starts.pop(unit, None)  # this actor may be a new one
        self._in_hand.pop(unit, None)
        self._deaths.pop(unit, None)


@contextlib.contextmanager
def start_counter() -> Iterator[Any]:
    """The actor, while the block runs.

    It is ended by hand: Ray never gives up an actor whose handle was pickled by somebody else, as in ``packed``.
    """
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(StartCounter)
    starts = actor.remote()
    try:
        yield starts
    finally:
        if ray.is_initialized():
            ray.kill(starts)


def record_unit_start(starts: Any, unit: int, source: prometheus.MetricTags) -> tuple[int, list[int]]:
    """``Starts.begin``; what is begun again is counted for those who watch, too."""
    count, culprits = ray.get(starts.unit_started.remote(unit))
    if count > 1:
        told = prometheus.MetricsRecorder(source)
        told.count("dubito_restarts_total", 1, "unit")
        told.flush()
    return count, culprits


class GuardedActor:
    """What Ray starts as an actor: counted before anything large is imported, then what ``packed`` makes.

    Args:
        packed: Pickled by this job: (class, arguments).
        starts: The actor that counts.
        most: Processes that may be started between one finished unit and the next.
        source: Whose the metrics are: how long this process waits for units.
    """

    def __init__(self, packed: bytes, starts: Any, most: int, source: prometheus.MetricTags) -> None:
        births: Any = ray.get(starts.process_started.remote())
        self._inner: Any = None
        self._fault = f"processes that hold the members were started {births} times in vain, {MEMORY_HINT}"
        if births <= most:
            make, args = pickle.loads(packed)
            self._inner = make(*args)
        self._told, self._idle = prometheus.MetricsRecorder(source), prometheus.IdleTimer()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """``batch`` is one row: a unit."""
        if self._inner is None:
            return unit_result_to_table(UnitFile(batch["unit"][0].as_py(), "", 0, 0, "", {}, 0.0), self._fault)
        with self._idle:
            self._told.count("dubito_wait_seconds_total", self._idle.take_s())
            self._told.flush()
            return self._inner(batch)


def unit_result_to_table(item: UnitFile, fault: str) -> pa.Table:
    """What the driver hears of a unit; a fault instead of a result: Ray loses the type of what an actor raises."""
    values = {**item.listed(), "uncertainty_sum": item.uncertainty_sum, "fault": fault, "metrics": item.metrics}
    values |= {name: json.dumps(getattr(item, name)) for name in _COUNTS} | {"scalars": item.scalars}
    return pa.table({key: [value] for key, value in values.items()})


def unit_result_from_row(row: dict[str, Any]) -> UnitFile:
    """And back.

    Raises:
        InputError: With the fault.
    """
    fault = row.pop("fault")
    if fault:
        raise InputError(fault)
    return UnitFile(**{**row, **{name: json.loads(row[name]) for name in _COUNTS}})
