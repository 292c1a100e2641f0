"""Ray Train around the loop: what a worker executes, what it does at validations and steps, and ``train_member``."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray.data
import ray.train
import ray.train.torch
import torch

from pipeline import storage
from pipeline.datasets.dataset import open_dataset, row_groups
from pipeline.errors import InputError
from pipeline.runtime import memory, prometheus, resources, tensorboard
from pipeline.runtime.progress import Progress, RayBoardSink, SilentSink
from pipeline.stream import epoch_order, run_stream, validation
from pipeline.stream.frame_cache import FrameRows, require_cache_room
from pipeline.training.loop import run_steps, steps_of, validate
from pipeline.training.loss_readback import NonFiniteLossError
from pipeline.training.member_run import MemberRun
from pipeline.training.ray_checkpoint import report_checkpoint, restore, save_batches
from pipeline.training.ray_dataset import RemainingRowsConfig
from pipeline.training.run_state import RunState, StepReport, StepSchedule
from pipeline.training.train_config import TrainConfig
from pipeline.training.worker import Worker, build_worker

COLLECTIVE_TIMEOUT_S = 300
PREEMPTION_CHECK_STEPS = 10
"""Steps from one question whether a machine will be taken away to the next: asking is a barrier of some milliseconds,
and clouds give half a minute's notice at least."""


@dataclass(frozen=True)
class RayTrainHooks:
    """What a Ray Train worker does beside the steps: metrics, validation and checkpoints."""

    run: MemberRun
    schedule: StepSchedule
    recorder: prometheus.MetricsRecorder
    rank: int
    steps_per_epoch: float
    """Nominal steps in a pass over the train split."""

    def validate(self, worker: Worker, state: RunState) -> None:
        """Validate on all ranks, then report a checkpoint that holds every rank's ledger."""
        columns = run_stream.training_columns(worker.config.task, worker.info)
        tables = validation.rows_of_rank(worker.info, "val", worker.rank, worker.world_size, columns)
        metrics = validate(worker, validation.same_size_batches(tables, worker.config.train.batch_size))
        # The state before the checkpoint: it saves this validation, so that a resumed run does not repeat it.
        state.record_validation(metrics["val_loss"], worker.config.train.min_delta)
        state.log_row(state.step, **metrics)
        if self.rank == 0:
            lines = "".join(json.dumps(row) + "\n" for row in state.history)
            storage.write_bytes(storage.join(self.run.uri, "metrics.jsonl"), lines.encode())
            if self.run.tensorboard:
                tensorboard.publish(self.run.tensorboard, state.history, state.step)
            self.recorder.set("dubito_loss", metrics["val_loss"], "val")
            self.recorder.count("dubito_checkpoints_total", 1, "saved")
        report_checkpoint(worker, state, metrics, self.schedule.resumed_from)

    def preempted(self, step: int) -> bool:
        """Whether the machine of some rank will soon be taken away; Ray asks all ranks, and answers all the same."""
        return step % PREEMPTION_CHECK_STEPS == 0 and ray.train.get_preemption_info() is not None

    def save(self, worker: Worker, state: RunState) -> None:
        """Report a checkpoint without a validation: it can be resumed from, and is never the best one."""
        if self.rank == 0:
            self.recorder.count("dubito_checkpoints_total", 1, "kept")
        report_checkpoint(worker, state, {"val_loss": sys.float_info.max}, self.schedule.resumed_from)

    def on_step(self, report: StepReport) -> None:
        """Count a step in the metrics: every rank its own images and waits, rank 0 what all ranks share."""
        recorder = self.recorder
        recorder.count("dubito_images_total", report.images, "ok")
        recorder.count("dubito_wait_seconds_total", report.waited_s)
        if self.rank == 0:
            recorder.count("dubito_steps_total")
            recorder.observe("dubito_step_seconds", report.seconds)
            recorder.set("dubito_learning_rate", report.lr)
            recorder.set("dubito_epochs", self.schedule.nominal_step(report.step) / self.steps_per_epoch)
            for _, loss in report.losses[-1:]:
                recorder.set("dubito_loss", loss, "train")


def _require_resources(config: TrainConfig, gpu: bool) -> None:
    """Refuse what this cluster cannot do, before a worker starts.

    Raises:
        InputError: Too few CPUs, no room in the object store, or a decoder that wants GPUs.
    """
    settings = config.train
    # Ray would wait for ever, without a message, for CPUs that the cluster has not.
    workers = settings.min_workers or settings.workers
    name = "workers" if settings.min_workers is None else "min_workers"
    resources.require_cpus(workers, f"train.{name} = {workers}, with a CPU each,")
    # The batches that are on their way lie in the object store: encoded images, or frames.
    groups = row_groups(open_dataset(config.data), "train")
    row_bytes = sum(group.num_bytes for group in groups) / max(1, sum(group.rows for group in groups))
    if config.stream.frames:
        row_bytes = FrameRows(config.input, config.seed).row_bytes
    batches = workers * (config.stream.prefetch + 2)
    resources.require_object_store(
        batches * settings.batch_size * row_bytes, f"{batches} batches of {settings.batch_size}"
    )
    if config.stream.decode == "device" and not gpu:
        raise InputError(
            f"stream.decode: device wants a GPU for each of {config.train.workers} workers, the cluster has "
            f"{ray.cluster_resources().get('GPU', 0):.0f}; set it to host or auto"
        )
    if config.stream.cache == "decoded":
        rows = open_dataset(config.data).counts["train"]["images"]
        room = ray.cluster_resources().get("object_store_memory", 0)
        require_cache_room(FrameRows(config.input, config.seed), rows, room)


def _schedule(worker: Worker, state: RunState, rows: int, resumed_from: str) -> StepSchedule:
    """What this worker group still has to do of a run over a train split of ``rows`` images."""
    end, nominal_batch = worker.config.length(rows)
    remaining = epoch_order.plan_remaining_rows(worker.ledger, end, worker.scale.images)
    # Rows used, not steps done, say how far the run is: an earlier group's steps may have been of another size.
    rows_used = worker.ledger.count(0, remaining.stop)
    return StepSchedule(
        steps=state.step + remaining.steps,
        validate_every=worker.config.validate_every(rows, nominal_batch),
        resumed_from=resumed_from,
        nominal=-(-end // nominal_batch),
        begin=state.step,
        nominal_begin=rows_used / nominal_batch,
        ratio=worker.scale.ratio,
    )


def train_worker(loop_config: dict[str, MemberRun]) -> None:
    """What every Ray Train worker executes."""
    run = loop_config["run"]
    torch.set_num_threads(run.threads)
    memory.keep_freed_memory()
    config, context = run.settings(), ray.train.get_context()
    info = open_dataset(config.data)
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    worker = build_worker(config, info, device, rank=rank, world_size=world_size, threads=run.threads)
    # The schedule needs the restored ledger: it counts what remains.
    state, resumed_from = restore(worker)
    rows = sum(group.rows for group in row_groups(info, "train"))
    schedule = _schedule(worker, state, rows, resumed_from)
    # A run may die between its last checkpoint and its end: then nothing is left to do.
    if state.step >= schedule.steps or state.stops_early(config.train.patience):
        return
    # What the dead attempt published past the checkpoint will come again, so it is taken back.
    if rank == 0 and run.tensorboard:
        tensorboard.rewind(run.tensorboard, state.step)
    with prometheus.MetricsRecorder(run.tags) as recorder:
        if rank == 0 and resumed_from:
            recorder.count("dubito_checkpoints_total", 1, "restored")
        _train(run, worker, state, schedule, rows, recorder)


def _train(
    run: MemberRun,
    worker: Worker,
    state: RunState,
    schedule: StepSchedule,
    rows: int,
    recorder: prometheus.MetricsRecorder,
) -> None:
    """All that is left of the run, over an epoch of ``rows`` images."""
    config, rank = worker.config, worker.rank
    # Rank 0 alone shows progress: all ranks are at the same step.
    sink = RayBoardSink(run.board) if run.board is not None and rank == 0 else SilentSink()
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None, "train_member passes the dataset named train"
    tables: Iterable[Any] = shard.iter_batches(
        batch_size=config.train.batch_size, batch_format="pyarrow", prefetch_batches=1
    )
    steps = steps_of(worker, tables, config.stream.prefetch)
    progress = Progress(sink, run.stage, schedule.steps, state.step, "steps")
    hooks = RayTrainHooks(run, schedule, recorder, rank, steps_per_epoch=rows / config.length(rows)[1])
    try:
        run_steps(worker, steps, state, schedule, progress, hooks)
    except NonFiniteLossError as error:
        # The batches are saved before the worker dies: they are what the cause can be found in.
        recorder.count("dubito_nonfinite_total")
        folder = save_batches(error, run.uri, rank)
        raise RuntimeError(f"{error}; what the model was given is in '{folder}'") from error


def train_member(run: MemberRun) -> dict[str, Any]:
    """Train one member; blocks until it is done.

    Returns:
        ``checkpoint`` (URI of the one with the lowest validation loss) and its ``metrics``.

    Raises:
        InputError: The cluster cannot do what the config asks for.
        ray.train.TrainingFailedError: After ``train.max_failures`` restarts.
    """
    config = run.settings()
    filesystem, path = storage.arrow(run.uri)
    parent, name = path.rsplit("/", 1)
    storage.make_folder(run.uri)
    # Everything that can be refused is refused here, before Ray starts a worker.
    workers, min_workers = config.train.workers, config.train.min_workers
    gpu = resources.claim_gpus(min_workers or workers)
    _require_resources(config, gpu)
    num_workers = workers if min_workers is None else (min_workers, workers)
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"run": run},
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers, use_gpu=gpu),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            # Ray keeps the best and the newest one: one for the bundle, one to resume from.
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="val_loss", checkpoint_score_order="min"
            ),
        ),
        # RemainingRowsConfig replaces this dataset once the workers are counted.
        datasets={"train": lambda: ray.data.range(1)},
        dataset_config=RemainingRowsConfig(run),
        torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
    )
    with prometheus.running(run.tags):
        result = trainer.fit()
    best, metrics = min(result.best_checkpoints or [], key=lambda pair: pair[1]["val_loss"])
    return {"checkpoint": storage.join(run.uri, best.path.rstrip("/").rsplit("/", 1)[-1]), "metrics": metrics}
