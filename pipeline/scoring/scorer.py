"""What runs in the actors of a scoring job: it holds all members, and turns a unit's images into its result."""

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
import torch

from pipeline import predictions
from pipeline.errors import InputError
from pipeline.models.bundle import Bundle
from pipeline.models.device import Compile, Precision
from pipeline.predictions import UnitFile
from pipeline.runtime import memory, prometheus
from pipeline.scoring import crash_guard
from pipeline.scoring.ensemble_metrics import EnsembleMetrics
from pipeline.scoring.predictor import Predictor, Purpose
from pipeline.scoring.unit_reader import read_stream, without_image, write_stream
from pipeline.scoring.unit_result import unit_fault_to_table, unit_result_to_table


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How units are scored, and what comes back of each beside its file; the same for all actors of a job."""

    measure: Purpose | None = None
    """What is counted against labels; None for predictions alone."""
    scalars: bool = False
    """Whether the rows' numbers come back; only where no files are written."""
    threads: int = 1
    """CPU threads of each call."""
    calls: int = 1
    """Units that an actor has in hand at a time."""
    batch: int | None = None
    """Images that go through the members at once; None = as many as memory allows."""
    precision: Precision = "auto"
    """Of the members' arithmetic."""
    compile: Compile = "auto"
    """Whether the members are compiled."""
    steps: int = 0
    """About how many batches an actor will see, of all members together; ``compile: auto`` decides by it."""
    metric_tags: prometheus.MetricTags = field(default_factory=lambda: prometheus.stage_tags("predict"))
    """Under which the actors report to Prometheus."""


@dataclass(frozen=True)
class UnitOutput:
    """Where the files of units are written."""

    uri: str
    """The folder of predictions."""
    folder: str
    """Name of the attempt, a folder in it."""
    digest: str
    """Digest of the plan, for the files' footers."""


class Scorer:
    """Runs in actors: one unit's images -> predictions, written here -> one small row.

    Wrong input travels to the driver in the row: Ray loses the type of what an actor raises.

    Args:
        bundle: Whose members predict.
        options: The job's.
        output: Where units are written; None to measure only.
        starts: The actor that counts starts of units.
    """

    def __init__(self, bundle: Bundle, options: ScoringOptions, output: UnitOutput | None, starts: Any) -> None:
        torch.set_num_threads(options.threads)
        memory.keep_freed_memory()
        self.options, self.output, self.starts = options, output, starts
        self.fault: str | None = None
        try:
            self.predictor = Predictor(
                bundle,
                threads=options.threads,
                batch=options.batch,
                precision=options.precision,
                compile=options.compile,
                steps=options.steps,
                calls=options.calls,
            )
        except InputError as error:
            self.fault = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """``batch`` is one row: a unit, as ``Reader`` gives it."""
        unit, fault = batch["unit"][0].as_py(), self.fault or batch["fault"][0].as_py()
        if fault is not None:
            return unit_fault_to_table(unit, fault)
        try:
            table = read_stream(batch["images"][0].as_buffer())
            result = self._score_unit(unit, table, json.loads(batch["files"][0].as_py()))
        except InputError as error:
            return unit_fault_to_table(unit, str(error))
        self.starts.unit_done.remote(unit)
        return unit_result_to_table(result)

    def _score_unit(self, unit: int, table: pa.Table, sources: list[str]) -> UnitFile:
        scored, metrics = self._predict_guarded(unit, table)
        state = b"" if metrics is None else metrics.to_bytes()
        # The promise of one row an image is checked at every unit, where it costs next to nothing.
        if not scored["image_id"].equals(table["image_id"]):
            raise RuntimeError(f"unit {unit}: rows were lost, doubled or moved while they were predicted")
        if self.output is not None:
            return predictions.write_unit(
                self.output.uri,
                self.output.folder,
                unit,
                scored,
                digest=self.output.digest,
                sources=sources,
                metrics=state,
            )
        scalars = pa.BufferOutputStream()
        if self.options.scalars:
            write_stream(scored.select([field.name for field in scored.schema if _is_scalar(field.type)]), scalars)
        return UnitFile(
            unit, "", len(scored), 0, "", **predictions.summarise(scored), metrics=state,
            scalars=scalars.getvalue().to_pybytes(),
        )  # fmt: skip

    def _predict_guarded(self, unit: int, table: pa.Table) -> tuple[pa.Table, EnsembleMetrics | None]:
        """As ``predict``; a unit whose process died before goes image by image, without those that it died of.

        Raises:
            InputError: The process died of the unit again and again.
        """
        count, fatal_rows = crash_guard.record_unit_start(self.starts, unit, self.options.metric_tags)
        if count > crash_guard.MAX_STARTS + 2 * len(fatal_rows):
            first, last = (table["image_id"][row].as_py() for row in (0, -1))
            raise InputError(
                f"the process that predicted the images from '{first}' to '{last}' ended {count - 1} times, "
                f"{crash_guard.MEMORY_HINT}"
            )
        if count < crash_guard.SINGLE_IMAGES_FROM:
            return self.predict(table)
        rows: list[pa.Table] = []
        total: EnsembleMetrics | None = None
        for row in range(table.num_rows):
            # Counted before it is touched, and waited for: nothing that this process says after its death is heard.
            ray.get(self.starts.image_started.remote(unit, row))
            image = table.slice(row, 1)
            if row in fatal_rows:
                image = without_image(image, crash_guard.SKIPPED_IMAGE)
            scored, metrics = self.predict(image)
            rows.append(scored)
            if total is not None and metrics is not None:
                total.merge(metrics)
            total = total or metrics
        return pa.concat_tables(rows), total

    def predict(self, table: pa.Table) -> tuple[pa.Table, EnsembleMetrics | None]:
        """Prediction rows of ``table``, and what was counted where the job measures."""
        if self.options.measure is None:
            return self.predictor(table), None
        return self.predictor.measure(table, self.options.measure)


def _is_scalar(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
