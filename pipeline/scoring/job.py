"""Plan, anti-join, actor pool, commit: what predict, evaluate and the demo all call.

One Ray Data execution a job: a task reads a unit's encoded images, an actor that holds all members predicts
them, writes the unit's file and returns one small row about it. A unit travels as ONE row that holds an Arrow
stream: Ray may split and merge blocks as it likes, and ``batch_size=1`` (which it insists on for GPUs) is
one unit.
"""

import gc
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch

from pipeline import predictions, storage
from pipeline.errors import InputError
from pipeline.models.bundle import Bundle, open_bundle
from pipeline.models.device import Compile, Precision
from pipeline.predictions import Attempt, UnitFile
from pipeline.runtime import memory, prometheus, ray_tasks
from pipeline.runtime.progress import Progress, ProgressSink, SilentSink
from pipeline.scoring import actor_pool, crash_guard, run_metrics
from pipeline.scoring.ensemble_metrics import EnsembleMetrics
from pipeline.scoring.plan import UNIT_ROWS, ScoringPlan, WorkUnit, plan_scoring
from pipeline.scoring.predictor import Predictor, Purpose
from pipeline.scoring.unit_reader import Reader, read_stream, without_image, write_stream
from pipeline.tasks.build import task_for_bundle

_READ_CPUS = 0.5
"""A reading task mostly waits; and what differs from the actor's resources Ray does not fuse into the actor."""


def predict(
    bundle: str, data: str, out: str, split: str | None = None, sink: ProgressSink | None = None, **resources: Any
) -> dict[str, Any]:
    """Score a dataset or a folder of images and commit the predictions at ``out``; see ``score``."""
    return score(bundle, data, out=out, split=split, sink=sink, **resources)


def score(
    bundle: str | Bundle,
    data: str,
    *,
    out: str | None = None,
    split: str | None = None,
    measure: Purpose | None = None,
    scalars: bool = False,
    sink: ProgressSink | None = None,
    actors: int | None = None,
    threads: int | None = None,
    batch: int | None = None,
    precision: Precision = "auto",
    compile: Compile = "auto",
) -> dict[str, Any]:
    """Run every image of ``data`` through every member of ``bundle``, once.

    Ray must be running. An unfinished run with the same inputs is continued: only missing units are scored.

    Args:
        bundle: URI of a bundle, or one that is staged.
        data: URI of a dataset or of a folder of images.
        out: Where predictions are committed; None to measure only.
        split: Split of the dataset; None for all.
        measure: Compare with the dataset's labels: for ``metrics``, or to ``sample`` what a calibration is
            fitted on.
        scalars: Bring back each row's numbers, without its maps and boxes; wants ``out`` None.
        sink: Where progress goes.
        actors: Processes that hold the members; None = one a GPU, or what the CPUs allow.
        threads: CPU threads of each; None = its share.
        batch: Images that go through the members at once; None = as many as memory allows.
        precision: Of the members' arithmetic.
        compile: Whether the members are compiled.

    Returns:
        ``rows, statuses, bundle_id, members, uncertainty_mean, data, split, seconds``; with ``out`` also
        ``out, already, attempt, adopted, scored`` (the last two in units); with ``measure`` also ``meters``
        (the counts) and, for metrics, ``metrics`` (of the pool, and ``members``: a list of the same); with
        ``scalars`` also ``scalars``, a table.

    Raises:
        InputError: Bad input, or an output that other inputs committed.
    """
    began = time.monotonic()
    opened = open_bundle(bundle) if isinstance(bundle, str) else bundle
    plan = plan_scoring(opened, data, split, measure=measure is not None)
    out = None if out is None else storage.absolute(out)
    if out is not None and (found := predictions.committed_manifest(out, plan.inputs)) is not None:
        return _done_already(opened, plan, split, out, found, measure is not None)
    attempt = None
    if out is not None:
        mapper = ray_tasks.map_in_tasks
        attempt = predictions.start_attempt(
            out, inputs=plan.inputs, digest=plan.digest, pieces=plan.pieces, mapper=mapper
        )
    adopted = attempt.adopted if attempt is not None else {}
    progress = Progress(sink or SilentSink(), "evaluate" if out is None else "predict", plan.rows, 0)
    progress.advance(sum(item.rows for item in adopted.values()))
    todo = [unit for unit in plan.units if unit.number not in adopted]
    pool = actor_pool.plan_actor_pool(len(todo), actors, threads, actor_pool.free_cpus(actors or 1) if todo else 1)
    steps = opened.members * sum(unit.rows for unit in todo) // (pool.size * UNIT_ROWS)
    options = {"threads": pool.threads, "calls": pool.calls, "batch": batch, "precision": precision}
    options |= {"compile": compile, "steps": steps}
    wanted = _Wanted(measure, scalars and out is None, options, prometheus.stage_tags(progress.stage))
    made = run_metrics.count_finished_units(_run(opened, plan, todo, attempt, wanted, progress, pool), wanted.source)
    finished = sorted([*adopted.values(), *made], key=lambda item: item.unit)
    predictions.check_complete(finished, plan.expected)
    summary = _summary(opened, plan, split, finished, wanted)
    if attempt is not None:
        summary = _commit(opened, plan, attempt, finished, summary)
        summary |= {"adopted": len(adopted), "scored": len(todo)}
    return {**summary, "seconds": time.monotonic() - began}


def _done_already(
    bundle: Bundle, plan: ScoringPlan, split: str | None, out: str | None, manifest: dict[str, Any], measure: bool
) -> dict[str, Any]:
    if measure and "metrics" not in manifest:
        raise InputError(f"'{out}' was committed without metrics; use dubito evaluate, or another output")
    kept = {key: manifest[key] for key in ("rows", "statuses", "uncertainty_mean", "attempt")}
    kept |= {"metrics": manifest["metrics"]} if measure else {}
    common = {"bundle_id": bundle.id, "members": bundle.members, "data": plan.inputs["data"], "split": split}
    return {**common, **kept, "out": out, "already": True, "adopted": 0, "scored": 0, "seconds": 0.0}


def _summary(
    bundle: Bundle, plan: ScoringPlan, split: str | None, finished: Sequence[UnitFile], wanted: "_Wanted"
) -> dict[str, Any]:
    statuses = predictions.count_statuses(finished)
    ok, total = statuses.get("ok", 0), sum(item.uncertainty_sum for item in finished)
    summary = {
        "rows": plan.rows,
        "statuses": statuses,
        "bundle_id": bundle.id,
        "members": bundle.members,
        "uncertainty_mean": total / ok if ok else None,
        "data": plan.inputs["data"],
        "split": split,
    }
    if wanted.measure is not None:
        meters = summary["meters"] = _merged(bundle, finished)
        summary |= {"metrics": meters.compute()} if wanted.measure == "metrics" else {}
    if wanted.scalars:
        summary["scalars"] = pa.concat_tables(read_stream(pa.py_buffer(item.scalars)) for item in finished)
    return summary


def _commit(
    bundle: Bundle, plan: ScoringPlan, attempt: Attempt, finished: Sequence[UnitFile], summary: dict[str, Any]
) -> dict[str, Any]:
    extra = {key: summary[key] for key in ("bundle_id", "members", "uncertainty_mean", "metrics") if key in summary}
    manifest = predictions.commit_attempt(
        attempt, finished, expected=plan.expected, inputs=plan.inputs, extra={"task": bundle.task, **extra}
    )
    number = manifest["attempt"]
    return {**summary, "out": attempt.uri, "attempt": number, "already": number != attempt.number}


def _run(
    bundle: Bundle,
    plan: ScoringPlan,
    todo: Sequence[WorkUnit],
    attempt: Attempt | None,
    wanted: "_Wanted",
    progress: Progress,
    pool: actor_pool.ActorPool,
) -> Iterator[UnitFile]:
    """Score the units; yields each as it is finished, in no order."""
    if not todo:
        return
    out = (attempt.uri, attempt.name, attempt.digest) if attempt is not None else None
    with crash_guard.start_counter() as starts:
        packed = ray.cloudpickle.dumps((Scorer, (bundle, wanted, out, starts)))  # pyright: ignore[reportAttributeAccessIssue]
        args = (packed, starts, crash_guard.MAX_STARTS * pool.size, wanted.source)
        yield from _stream(plan, todo, args, progress, pool)


def _stream(
    plan: ScoringPlan, todo: Sequence[WorkUnit], args: tuple[Any, ...], progress: Progress, pool: actor_pool.ActorPool
) -> Iterator[UnitFile]:
    """Units through readers and actors; ``args`` are those of ``Guarded``."""
    # One block a unit; a source of rows in memory spares the range operator and its task for each unit.
    blocks = [pa.table({"unit": [unit.number], "spec": [_spec(unit)]}) for unit in todo]
    reader = Reader(plan.info.uri if plan.info is not None else "", plan.columns)
    rows = (
        ray.data.from_arrow(blocks)
        .map_batches(reader, batch_size=1, batch_format="pyarrow", num_cpus=_READ_CPUS)
        .map_batches(
            crash_guard.GuardedActor,
            batch_size=1,
            batch_format="pyarrow",
            compute=pool.strategy,
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            fn_constructor_args=args,
        )
    )
    found: Any = iter(rows.iter_rows())
    try:
        for row in found:
            item = crash_guard.unit_result_from_row(row)
            progress.advance(item.rows)
            yield item
    except Exception as error:
        ray_tasks.drop_tracebacks(error)
        raise
    finally:
        if hasattr(found, "close"):
            found.close()  # or its threads ask Ray after the session has ended, upon which Ray ends this process
        del rows, found
        gc.collect()


def _spec(unit: WorkUnit) -> str:
    return json.dumps({"rows": unit.rows, "source": unit.source, "files": unit.files})


@dataclass(frozen=True)
class _Wanted:
    """What units bring back beside their files, and how they are predicted."""

    measure: Purpose | None
    scalars: bool
    options: dict[str, Any]
    """Of ``Predictor``."""
    source: prometheus.MetricTags


class Scorer:
    """Runs in actors: one unit's images -> predictions, written here -> one small row.

    Wrong input travels to the driver in the row: Ray loses the type of what an actor raises.
    """

    def __init__(self, bundle: Bundle, wanted: _Wanted, out: tuple[str, str, str] | None, starts: Any) -> None:
        torch.set_num_threads(wanted.options["threads"])
        memory.keep_freed_memory()
        self.wanted, self.out, self.starts = wanted, out, starts
        self.fault: str | None = None
        try:
            self.predictor = Predictor(bundle, **wanted.options)
        except InputError as error:
            self.fault = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """``batch`` is one row: a unit."""
        unit, fault = batch["unit"][0].as_py(), self.fault or batch["fault"][0].as_py()
        nothing = UnitFile(unit, "", 0, 0, "", {}, 0.0)
        if fault is not None:
            return crash_guard.unit_result_to_table(nothing, fault)
        try:
            table = read_stream(batch["images"][0].as_buffer())
            found = self._score(unit, table, json.loads(batch["files"][0].as_py()))
            self.starts.unit_done.remote(unit)
            return crash_guard.unit_result_to_table(found, "")
        except InputError as error:
            return crash_guard.unit_result_to_table(nothing, str(error))

    def _ask(self, table: pa.Table) -> tuple[pa.Table, EnsembleMetrics | None]:
        if self.wanted.measure is None:
            return self.predictor(table), None
        return self.predictor.measure(table, self.wanted.measure)

    def _survive(self, unit: int, table: pa.Table) -> tuple[pa.Table, EnsembleMetrics | None]:
        """As ``_ask``; a unit whose process died before goes image by image, without those that it died of."""
        count, culprits = crash_guard.record_unit_start(self.starts, unit, self.wanted.source)
        if count > crash_guard.MAX_STARTS + 2 * len(culprits):
            first, last = (table["image_id"][row].as_py() for row in (0, -1))
            raise InputError(
                f"the process that predicted the images from '{first}' to '{last}' ended {count - 1} times, "
                f"{crash_guard.MEMORY_HINT}"
            )
        if count < crash_guard.CAREFUL_FROM:
            return self._ask(table)
        rows, meters = [], None
        for row in range(table.num_rows):
            ray.get(self.starts.image_started.remote(unit, row))
            one = table.slice(row, 1)
            scored, counted = self._ask(without_image(one, crash_guard.SKIPPED_IMAGE) if row in culprits else one)
            rows.append(scored)
            if meters is not None and counted is not None:
                meters.merge(counted)
            meters = meters or counted
        return pa.concat_tables(rows), meters

    def _score(self, unit: int, table: pa.Table, sources: list[str]) -> UnitFile:
        scored, meters = self._survive(unit, table)
        state = b"" if meters is None else meters.to_bytes()
        if not scored["image_id"].equals(table["image_id"]):
            raise RuntimeError(f"unit {unit}: rows were lost, doubled or moved while they were predicted")
        if self.out is not None:
            uri, folder, digest = self.out
            return predictions.write_unit(uri, folder, unit, scored, digest=digest, sources=sources, metrics=state)
        kept = pa.BufferOutputStream()
        if self.wanted.scalars:
            write_stream(scored.select([field.name for field in scored.schema if _is_scalar(field.type)]), kept)
        return UnitFile(
            unit, "", len(scored), 0, "", **predictions.summarise(scored), metrics=state,
            scalars=kept.getvalue().to_pybytes(),
        )  # fmt: skip


def _is_scalar(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _merged(bundle: Bundle, finished: Sequence[UnitFile]) -> EnsembleMetrics:
    """What was counted over all units, whatever attempt they are from, added in the order of the plan."""
    task = task_for_bundle(bundle)
    metric, sample = task.metric(), task.new_calibration_sample()
    total, *rest = (EnsembleMetrics.from_bytes(item.metrics, metric, sample) for item in finished)
    for each in rest:
        total.merge(each)
    return total
