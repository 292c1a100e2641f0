"""What becomes of units whose process died: of a kill, of want of memory, of an image that breaks a library.

Ray starts a dead actor again and gives it the same unit, for ever. So starts of units and of processes are counted:
a unit that died several times is predicted image by image, an image that was in hand at two deaths is left out with
an error in its row, and at last the job ends.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray

from pipeline.runtime import prometheus
from pipeline.scoring.unit_result import unit_fault_to_table

SINGLE_IMAGES_FROM = 3
"""Start of a unit from which on its images are predicted one by one: the first deaths may have had any cause."""
DEATHS_TO_SKIP = 2
"""Deaths with an image in hand after which it is skipped; one may be chance: a process dies with all its units."""
MAX_STARTS = 8
"""Starts of a unit after which the job ends; every image that is skipped in it allows two more."""
MEMORY_HINT = (
    "most likely for want of memory; give it more, run fewer actors, or lower the members' input.size or predict.tta"
)
SKIPPED_IMAGE = "the process that predicted this image ended, twice: out of memory, or a library that it breaks"


class StartCounter:
    """Counts, in an actor of its own that outlives those that it counts."""

    def __init__(self) -> None:
        self._unit_starts: Counter[int] = Counter()
        self._row_in_hand: dict[int, int] = {}
        """Unit -> row that is predicted alone at the moment."""
        self._deaths_by_row: dict[int, Counter[int]] = {}
        """Unit -> deaths with each of its rows in hand."""
        self._process_starts = 0

    def process_started(self) -> int:
        """How many processes were started since a unit was last finished, this one included."""
        self._process_starts += 1
        return self._process_starts

    def unit_started(self, unit: int) -> tuple[int, list[int]]:
        """(how often the unit was started, this time included; its rows with ``DEATHS_TO_SKIP`` deaths or more)."""
        self._unit_starts[unit] += 1
        # A row that is still in hand was never finished: the process ended with it.
        row = self._row_in_hand.pop(unit, None)
        if row is not None:
            self._deaths_by_row.setdefault(unit, Counter())[row] += 1
        deaths = self._deaths_by_row.get(unit, Counter())
        return self._unit_starts[unit], sorted(row for row, count in deaths.items() if count >= DEATHS_TO_SKIP)

    def image_started(self, unit: int, row: int) -> None:
        """That row of the unit is predicted from now on."""
        self._row_in_hand[unit] = row

    def unit_done(self, unit: int) -> None:
        """Forget the unit, and the processes that were started before it was finished."""
        self._process_starts = 0
        self._unit_starts.pop(unit, None)  # absent where this actor itself was started again meanwhile
        self._row_in_hand.pop(unit, None)
        self._deaths_by_row.pop(unit, None)


@contextlib.contextmanager
def start_counter() -> Iterator[Any]:
    """A ``StartCounter`` as a Ray actor, while the block runs.

    It is ended by hand: Ray never gives up an actor whose handle lies in an object, as ``GuardedActor``'s do.
    """
    actor_class: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(StartCounter)
    starts = actor_class.remote()
    try:
        yield starts
    finally:
        if ray.is_initialized():
            ray.kill(starts)


def record_unit_start(starts: Any, unit: int, metric_tags: prometheus.MetricTags) -> tuple[int, list[int]]:
    """``StartCounter.unit_started`` of the actor ``starts``; a repeated start is counted for Prometheus too."""
    count, fatal_rows = ray.get(starts.unit_started.remote(unit))
    if count > 1:
        recorder = prometheus.MetricsRecorder(metric_tags)
        recorder.count("dubito_restarts_total", 1, "unit")
        recorder.flush()
    return count, fatal_rows


class GuardedActor:
    """What Ray starts as an actor: counted before anything large is imported, then whatever scores units.

    Args:
        make_scorer: Reference to a callable without arguments that gives the scorer, in Ray's object store. Fetched
            only after this process was counted: with it come torch and the members, of which the process may die.
        starts: The actor that counts.
        max_processes: Processes that may be started between one finished unit and the next.
        metric_tags: Under which this process reports how long it waited for units.
    """

    def __init__(
        self, make_scorer: ray.ObjectRef, starts: Any, max_processes: int, metric_tags: prometheus.MetricTags
    ) -> None:
        process_starts: Any = ray.get(starts.process_started.remote())
        self._fault = f"processes that hold the members were started {process_starts} times in vain, {MEMORY_HINT}"
        self._scorer: Any = None
        if process_starts <= max_processes:
            make: Any = ray.get(make_scorer)
            self._scorer = make()
        self._recorder = prometheus.MetricsRecorder(metric_tags)
        self._idle = prometheus.IdleTimer()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """``batch`` is one row: a unit."""
        if self._scorer is None:
            return unit_fault_to_table(batch["unit"][0].as_py(), self._fault)
        with self._idle:
            self._recorder.count("dubito_wait_seconds_total", self._idle.take_s())
            self._recorder.flush()
            return self._scorer(batch)
