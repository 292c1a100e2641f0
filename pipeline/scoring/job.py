"""One scoring job from plan to commit: what predict, evaluate and the demo all call.

The steps: plan units; take over those that earlier attempts finished; stream the rest through tasks that read and
actors that predict; check that every unit is there once; commit.

One Ray Data execution a job: a task reads a unit's encoded images, an actor that holds all members predicts
them, writes the unit's file and returns one small row about it. A unit travels as ONE row that holds an Arrow
stream: Ray may split and merge blocks as it likes, and ``batch_size=1`` (which it insists on for GPUs) is
one unit.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipeline import predictions, storage
from pipeline.errors import InputError
from pipeline.models.bundle import Bundle, open_bundle
from pipeline.models.device import Compile, Precision
from pipeline.predictions import Attempt, UnitFile
from pipeline.runtime import prometheus, ray_tasks
from pipeline.runtime.progress import Progress, ProgressSink, SilentSink
from pipeline.scoring import actor_pool, crash_guard, run_metrics
from pipeline.scoring.ensemble_metrics import EnsembleMetrics
from pipeline.scoring.plan import UNIT_ROWS, ScoringPlan, WorkUnit, plan_scoring
from pipeline.scoring.predictor import Purpose
from pipeline.scoring.scorer import Scorer, ScoringOptions, UnitOutput
from pipeline.scoring.unit_reader import Reader, read_stream
from pipeline.scoring.unit_result import unit_result_from_row
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
    unit_rows: int = UNIT_ROWS,
    reader_class: Callable[..., Reader] = Reader,
    scorer_class: Callable[..., Scorer] = Scorer,
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
        unit_rows: Most images of a unit; another number makes another plan, that continues no other one's runs.
        reader_class: What runs in the tasks that read: ``Reader``, or what watches it in tests and benchmarks.
        scorer_class: What runs in the actors: ``Scorer``, or what watches or replaces it in tests and benchmarks.

    Returns:
        ``rows, statuses, bundle_id, members, uncertainty_mean, data, split, seconds``; with ``out`` also
        ``out, already, attempt, adopted, scored`` (the last two in units); with ``measure`` also ``meters``
        (``EnsembleMetrics``) and, for metrics, ``metrics`` (of the pool, and ``members``: a list of the same); with
        ``scalars`` also ``scalars``, a table.

    Raises:
        InputError: Bad input, or an output that other inputs committed.
    """
    start_s = time.monotonic()
    opened = open_bundle(bundle) if isinstance(bundle, str) else bundle
    plan = plan_scoring(opened, data, split, measure=measure is not None, unit_rows=unit_rows)
    options = ScoringOptions(
        measure=measure, scalars=scalars and out is None, batch=batch, precision=precision, compile=compile
    )
    workers = _Workers(actors, threads, reader_class, scorer_class)
    summary = _score_plan(opened, plan, split, out, options, workers, sink or SilentSink())
    return {"seconds": time.monotonic() - start_s, **summary}


@dataclass(frozen=True)
class _Workers:
    """The processes that a caller asks for."""

    actors: int | None
    threads: int | None
    reader_class: Callable[..., Reader]
    scorer_class: Callable[..., Scorer]


def _score_plan(
    bundle: Bundle,
    plan: ScoringPlan,
    split: str | None,
    out: str | None,
    options: ScoringOptions,
    workers: _Workers,
    sink: ProgressSink,
) -> dict[str, Any]:
    # What was committed by the same inputs is the result; by other inputs, it is refused here.
    out = None if out is None else storage.absolute(out)
    if out is not None and (manifest := predictions.committed_manifest(out, plan.inputs)) is not None:
        return _committed_before(bundle, plan, split, out, manifest, options.measure is not None)
    # Anti-join: units that earlier attempts finished are adopted, the others are to be scored.
    attempt = None if out is None else _start_attempt(out, plan)
    adopted = attempt.adopted if attempt is not None else {}
    todo = [unit for unit in plan.units if unit.number not in adopted]
    progress = Progress(sink, "evaluate" if out is None else "predict", plan.rows, 0)
    progress.advance(sum(unit_file.rows for unit_file in adopted.values()))
    # Sized only now: how many actors are worth their start depends on how much is left.
    free_cpus = actor_pool.free_cpus(workers.actors or 1) if todo else 1
    pool = actor_pool.plan_actor_pool(len(todo), workers.actors, workers.threads, free_cpus)
    options = replace(
        options,
        threads=pool.threads,
        calls=pool.calls,
        steps=bundle.members * sum(unit.rows for unit in todo) // (pool.size * plan.unit_rows),
        metric_tags=prometheus.stage_tags(progress.stage),
    )
    make_scorer = partial(workers.scorer_class, bundle=bundle, options=options, output=_output_of(attempt))
    results = _score_units(plan, todo, workers.reader_class, make_scorer, options, pool, progress)
    scored = run_metrics.count_finished_units(results, options.metric_tags)
    finished = sorted([*adopted.values(), *scored], key=lambda unit_file: unit_file.unit)
    # Every unit once, with all its rows, whether or not anything is committed.
    predictions.check_complete(finished, plan.expected)
    summary = _summary(bundle, plan, split, finished, options)
    if attempt is None:
        return summary
    summary = _commit(bundle, plan, attempt, finished, summary)
    return {**summary, "adopted": len(adopted), "scored": len(todo)}


def _committed_before(
    bundle: Bundle, plan: ScoringPlan, split: str | None, out: str, manifest: dict[str, Any], measure: bool
) -> dict[str, Any]:
    """The summary of a job whose output the same inputs have committed already."""
    if measure and "metrics" not in manifest:
        raise InputError(f"'{out}' was committed without metrics; use dubito evaluate, or another output")
    kept = {key: manifest[key] for key in ("rows", "statuses", "uncertainty_mean", "attempt")}
    kept |= {"metrics": manifest["metrics"]} if measure else {}
    common = {"bundle_id": bundle.id, "members": bundle.members, "data": plan.inputs["data"], "split": split}
    return {**common, **kept, "out": out, "already": True, "adopted": 0, "scored": 0, "seconds": 0.0}


def _start_attempt(out: str, plan: ScoringPlan) -> Attempt:
    return predictions.start_attempt(
        out, inputs=plan.inputs, digest=plan.digest, groups=plan.unit_groups, mapper=ray_tasks.map_in_tasks
    )


def _output_of(attempt: Attempt | None) -> UnitOutput | None:
    """Where actors write; of the attempt, whose list of adopted files may be long, only what they need."""
    return None if attempt is None else UnitOutput(attempt.uri, attempt.name, attempt.digest)


def _score_units(
    plan: ScoringPlan,
    todo: Sequence[WorkUnit],
    reader_class: Callable[..., Reader],
    make_scorer: Callable[..., Scorer],
    options: ScoringOptions,
    pool: actor_pool.ActorPool,
    progress: Progress,
) -> Iterator[UnitFile]:
    """Score the units; yields each as it is finished, in no order."""
    if not todo:
        return
    reader = reader_class(plan.info.uri if plan.info is not None else "", plan.columns)
    with crash_guard.start_counter() as starts:
        actor_arguments = {
            # A reference, so that an actor is counted before it unpickles what imports torch.
            "make_scorer": ray.put(partial(make_scorer, starts=starts)),
            "starts": starts,
            "max_processes": crash_guard.MAX_STARTS * pool.size,
            "metric_tags": options.metric_tags,
        }
        yield from _stream(todo, reader, actor_arguments, pool, progress)


def _stream(
    todo: Sequence[WorkUnit],
    reader: Reader,
    actor_arguments: dict[str, Any],
    pool: actor_pool.ActorPool,
    progress: Progress,
) -> Iterator[UnitFile]:
    """Units through readers and actors; ``actor_arguments`` are those of ``GuardedActor``."""
    # One block a unit; a source of rows in memory spares the range operator and its task for each unit.
    blocks = [pa.table({"unit": [unit.number], "spec": [_spec(unit)]}) for unit in todo]
    dataset = (
        ray.data.from_arrow(blocks)
        .map_batches(reader, batch_size=1, batch_format="pyarrow", num_cpus=_READ_CPUS)
        .map_batches(
            crash_guard.GuardedActor,
            batch_size=1,
            batch_format="pyarrow",
            compute=pool.strategy,
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            fn_constructor_kwargs=actor_arguments,
        )
    )
    rows: Any = iter(dataset.iter_rows())
    try:
        for row in rows:
            result = unit_result_from_row(row)
            progress.advance(result.rows)
            yield result
    except Exception as error:
        # Whoever keeps the error would keep the actors, and their CPUs, through its frames.
        ray_tasks.drop_tracebacks(error)
        raise
    finally:
        if hasattr(rows, "close"):
            rows.close()  # or its threads ask Ray after the session has ended, upon which Ray ends this process
        # The execution holds its actors in cycles of references: they go now, not when the collector comes by.
        del dataset, rows
        gc.collect()


def _spec(unit: WorkUnit) -> str:
    return json.dumps({"rows": unit.rows, "source": unit.source, "files": unit.files})


def _summary(
    bundle: Bundle, plan: ScoringPlan, split: str | None, finished: Sequence[UnitFile], options: ScoringOptions
) -> dict[str, Any]:
    statuses = predictions.count_statuses(finished)
    num_ok = statuses.get("ok", 0)
    uncertainty_sum = sum(unit_file.uncertainty_sum for unit_file in finished)
    summary = {
        "rows": plan.rows,
        "statuses": statuses,
        "bundle_id": bundle.id,
        "members": bundle.members,
        "uncertainty_mean": uncertainty_sum / num_ok if num_ok else None,
        "data": plan.inputs["data"],
        "split": split,
    }
    if options.measure is not None:
        summary["meters"] = _merge_metrics(bundle, finished)
    if options.measure == "metrics":
        summary["metrics"] = summary["meters"].compute()
    if options.scalars:
        summary["scalars"] = pa.concat_tables(read_stream(pa.py_buffer(unit_file.scalars)) for unit_file in finished)
    return summary


def _merge_metrics(bundle: Bundle, finished: Sequence[UnitFile]) -> EnsembleMetrics:
    """What was counted over all units, whatever attempt they are from, added in the order of the plan."""
    task = task_for_bundle(bundle)
    metric, sample = task.metric(), task.new_calibration_sample()
    total, *rest = (EnsembleMetrics.from_bytes(unit_file.metrics, metric, sample) for unit_file in finished)
    for metrics in rest:
        total.merge(metrics)
    return total


def _commit(
    bundle: Bundle, plan: ScoringPlan, attempt: Attempt, finished: Sequence[UnitFile], summary: dict[str, Any]
) -> dict[str, Any]:
    extra = {key: summary[key] for key in ("bundle_id", "members", "uncertainty_mean", "metrics") if key in summary}
    manifest = predictions.commit_attempt(
        attempt, finished, expected=plan.expected, inputs=plan.inputs, extra={"task": bundle.task, **extra}
    )
    # Another driver with the same inputs may have committed first: then its manifest counts.
    number = manifest["attempt"]
    return {**summary, "out": attempt.uri, "attempt": number, "already": number != attempt.number}
