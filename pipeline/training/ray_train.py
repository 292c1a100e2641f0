"""Ray Train around the loop: the dataset factory, the worker function, checkpoints, ``fit``."""

import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.data
import ray.train
import ray.train.torch
import safetensors.torch
import torch

from pipeline import storage
from pipeline.datasets.dataset import open_dataset, row_groups
from pipeline.errors import InputError
from pipeline.models.device import use_fused_kernels
from pipeline.runtime import memory, prometheus, resources, tensorboard
from pipeline.runtime.progress import Progress, RayBoardSink, SilentSink
from pipeline.stream import epoch_order, run_stream, validation
from pipeline.stream.frame_cache import FrameRows, require_cache_room
from pipeline.training import checkpoint
from pipeline.training.loop import Worker, build_worker, run_steps, steps_of, validate
from pipeline.training.loss_readback import NonFiniteLossError
from pipeline.training.run_state import RunState, StepReport, StepSchedule
from pipeline.training.train_config import TrainConfig

COLLECTIVE_TIMEOUT_S = 300
WARNING_EVERY = 10
"""Steps from one question whether a machine will be taken away to the next: asking is a barrier of some milliseconds,
and clouds give half a minute's notice at least."""


@dataclass(frozen=True)
class MemberRun:
    """One training run as it is sent to its workers."""

    config: dict[str, Any]
    uri: str
    """The folder that Ray keeps its checkpoints in."""
    stage: str
    threads: int
    board: Any = None
    events: str = ""
    """The folder that TensorBoard reads; '' for none."""
    source: prometheus.MetricTags = prometheus.MetricTags()
    """Whose the metrics are."""

    def settings(self) -> TrainConfig:
        """The validated tree."""
        return TrainConfig.parse(self.config, "config")


def training_dataset(fit: MemberRun, world: int | None = None) -> ray.data.Dataset:
    """All that remains of the run, as of the checkpoint that the workers will get.

    ``world`` is the number of those workers; None: as many as the config asks for.
    """
    config = fit.settings()
    info = open_dataset(config.data)
    groups = row_groups(info, "train")
    order = epoch_order.EpochOrder.of(groups, config.seed, config.stream.window_mb * 2**20)
    start = checkpoint.latest(fit.uri)
    ledger = checkpoint.read_ledger(start) if start else run_stream.Ledger()
    end, _ = config.length(order.rows)
    return run_stream.dataset(
        order,
        epoch_order.plan_remaining_rows(ledger, end, config.train.scaled(world or config.train.workers).images),
        ledger,
        run_stream.training_columns(config.task, info),
        config.train.batch_size,
        start.rsplit("/", 1)[-1] if start else "",
        FrameRows(config.input, config.seed) if config.stream.frames else None,
        cached=config.stream.cache == "decoded",
    )


class _ForWorkers(ray.train.DataConfig):
    """Splits what remains of the run over the workers that there are.

    Ray calls a dataset's factory before it knows their number, and this once it does, at each start of the group.
    """

    def __init__(self, fit: MemberRun) -> None:
        super().__init__(["train"], ray.data.ExecutionOptions(preserve_order=True))
        self._fit = fit

    def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any) -> Any:
        """As Ray asks for it: an iterator of each dataset for each worker."""
        return super().configure({"train": training_dataset(self._fit, world_size)}, world_size, *args, **kwargs)


def _check(config: TrainConfig, gpu: bool) -> None:
    """Refuse what this cluster cannot do, before a worker starts."""
    settings = config.train
    workers = settings.min_workers or settings.workers
    name = "workers" if settings.min_workers is None else "min_workers"
    resources.require_cpus(workers, f"train.{name} = {workers}, with a CPU each,")
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


def _validate_and_checkpoint(
    worker: Worker, journal: RunState, fit: MemberRun, start: str, told: prometheus.MetricsRecorder
) -> None:
    """Validate on all ranks, then report a checkpoint that holds every rank's ledger."""
    columns = run_stream.training_columns(worker.config.task, worker.info)
    tables = validation.rows_of_rank(worker.info, "val", worker.rank, worker.world, columns)
    metrics = validate(worker, validation.same_size_batches(tables, worker.config.train.batch_size))
    journal.record_validation(metrics["val_loss"], worker.config.train.min_delta)
    journal.log_row(journal.step, **metrics)
    if worker.rank == 0:
        lines = "".join(json.dumps(row) + "\n" for row in journal.history)
        storage.write_bytes(storage.join(fit.uri, "metrics.jsonl"), lines.encode())
        if fit.events:
            tensorboard.publish(fit.events, journal.history, journal.step)
        told.set("dubito_loss", metrics["val_loss"], "val")
        told.count("dubito_checkpoints_total", 1, "saved")
    _report_checkpoint(worker, journal, metrics, start)


def _checkpoint_before_preemption(
    worker: Worker, journal: RunState, start: str, told: prometheus.MetricsRecorder
) -> None:
    """A checkpoint without a validation, since a machine is about to go: it can be resumed from, and is never best."""
    if worker.rank == 0:
        told.count("dubito_checkpoints_total", 1, "kept")
    _report_checkpoint(worker, journal, {"val_loss": sys.float_info.max}, start)


def _record_step(told: prometheus.MetricsRecorder, rank: int, made: StepReport, epochs: float) -> None:
    """What a step adds to the metrics: every rank's own images and waits, the rest of rank 0."""
    told.count("dubito_images_total", made.images, "ok")
    told.count("dubito_wait_seconds_total", made.waited_s)
    if rank == 0:
        told.count("dubito_steps_total")
        told.observe("dubito_step_seconds", made.seconds)
        told.set("dubito_learning_rate", made.lr)
        told.set("dubito_epochs", epochs)
        for _, loss in made.losses[-1:]:
            told.set("dubito_loss", loss, "train")


def _report_checkpoint(worker: Worker, journal: RunState, metrics: dict[str, float], start: str) -> None:
    """Write this rank's part aside; Ray uploads it while training goes on, and deletes older ones after that."""
    # What an attempt that died left in a folder must not mix with a later one's, whose ranks saw other rows.
    attempt = hashlib.sha256(f"{worker.world} from {start}".encode()).hexdigest()[:4]
    folder = tempfile.mkdtemp(prefix="dubito-checkpoint-")
    checkpoint.save(
        Path(folder),
        worker.rank,
        worker.ledger,
        model=worker.module,
        average=worker.average,
        optimizer=worker.optimizer,
        progress=asdict(journal),
    )
    ray.train.report(
        {**metrics, "step": journal.step, "augment": worker.augment.report()},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step-{journal.step:08d}-{attempt}",
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _preemption_ahead(step: int) -> bool:
    """Whether the machine of some rank will soon be taken away: all ranks ask at the same steps, and hear the same."""
    return step % WARNING_EVERY == 0 and ray.train.get_preemption_info() is not None


def save_batches(error: NonFiniteLossError, run_uri: str, rank: int) -> str:
    """What a step with a loss that is no number was given: images, labels and ids, as the model saw them; its URI."""
    folder = storage.join(run_uri, f"not-finite-step-{error.step:08d}")
    for number, batch in enumerate(error.batches):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        tensors = {name: value.cpu().contiguous() for name, value in fields.items() if isinstance(value, torch.Tensor)}
        content = safetensors.torch.save(tensors, {"image_ids": json.dumps(batch.image_ids)})
        storage.write_bytes(storage.join(folder, f"rank-{rank}-batch-{number}.safetensors"), content)
    return folder


def _restore(worker: Worker) -> tuple[RunState, str]:
    """Take over the checkpoint that Ray hands out, if any: (the journal, the checkpoint's name)."""
    start = ray.train.get_checkpoint()
    if start is None:
        return RunState(), ""
    with start.as_directory() as folder:
        progress = checkpoint.load(
            Path(folder), worker.rank, model=worker.module, average=worker.average, optimizer=worker.optimizer
        )
        worker.ledger = checkpoint.read_ledger(folder)
        use_fused_kernels(worker.optimizer, worker.device)
    return RunState(**progress), start.path.rstrip("/").rsplit("/", 1)[-1]


def _plan(worker: Worker, journal: RunState, rows: int, resumed_from: str) -> StepSchedule:
    """What this worker group still has to do of a run over ``rows`` images."""
    end, nominal_batch = worker.config.length(rows)
    rest, ratio = epoch_order.plan_remaining_rows(worker.ledger, end, worker.scale.images), worker.scale.ratio
    used = worker.ledger.count(0, rest.stop)
    return StepSchedule(
        journal.step + rest.steps, worker.config.validate_every(rows, nominal_batch), resumed_from,
        nominal=-(-end // nominal_batch), begin=journal.step, nominal_begin=used / nominal_batch, ratio=ratio,
    )  # fmt: skip


def train_worker(loop_config: dict[str, MemberRun]) -> None:
    """What every Ray Train worker executes."""
    fit = loop_config["fit"]
    torch.set_num_threads(fit.threads)
    memory.keep_freed_memory()
    config, context = fit.settings(), ray.train.get_context()
    info = open_dataset(config.data)
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    worker = build_worker(config, info, device, rank=rank, world=world, threads=fit.threads)
    journal, resumed_from = _restore(worker)
    rows = sum(group.rows for group in row_groups(info, "train"))
    plan = _plan(worker, journal, rows, resumed_from)
    if journal.step >= plan.steps or (config.train.patience and journal.stale >= config.train.patience):
        return
    if rank == 0 and fit.events:
        tensorboard.rewind(fit.events, journal.step)
    with prometheus.MetricsRecorder(fit.source) as told:
        if rank == 0 and resumed_from:
            told.count("dubito_checkpoints_total", 1, "restored")
        _train(fit, worker, journal, plan, rows, told)


def _train(
    fit: MemberRun, worker: Worker, journal: RunState, plan: StepSchedule, rows: int, told: prometheus.MetricsRecorder
) -> None:
    """All that is left of the run, over an epoch of ``rows`` images."""
    config, rank, resumed_from = worker.config, worker.rank, plan.resumed_from
    sink = RayBoardSink(fit.board) if fit.board is not None and rank == 0 else SilentSink()
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None, "fit passes the dataset named train"
    size = config.train.batch_size
    tables: Iterable[Any] = shard.iter_batches(batch_size=size, batch_format="pyarrow", prefetch_batches=1)
    progress = Progress(sink, fit.stage, plan.steps, journal.step, "steps")
    an_epoch = rows / config.length(rows)[1]
    try:
        run_steps(
            worker,
            steps_of(worker, tables, config.stream.prefetch),
            journal,
            plan,
            progress,
            lambda worker, journal: _validate_and_checkpoint(worker, journal, fit, resumed_from, told),
            _preemption_ahead,
            lambda worker, journal: _checkpoint_before_preemption(worker, journal, resumed_from, told),
            lambda made: _record_step(told, rank, made, plan.nominal_step(made.step) / an_epoch),
        )
    except NonFiniteLossError as error:
        told.count("dubito_nonfinite_total")
        where = save_batches(error, fit.uri, rank)
        raise RuntimeError(f"{error}; what the model was given is in '{where}'") from error


def train_member(run: MemberRun) -> dict[str, Any]:
    """Train one member; blocks until it is done.

    Returns:
        ``checkpoint`` (URI of the one with the lowest validation loss) and its ``metrics``.

    Raises:
        ray.train.TrainingFailedError: After ``train.max_failures`` restarts.
    """
    config = run.settings()
    filesystem, path = storage.arrow(run.uri)
    parent, name = path.rsplit("/", 1)
    storage.make_folder(run.uri)
    workers, least = config.train.workers, config.train.min_workers
    gpu = resources.claim_gpus(least or workers)
    _check(config, gpu)
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"fit": run},
        scaling_config=ray.train.ScalingConfig(num_workers=workers if least is None else (least, workers), use_gpu=gpu),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="val_loss", checkpoint_score_order="min"
            ),
        ),
        datasets={"train": lambda: ray.data.range(1)},  # its place is taken once the workers are counted
        dataset_config=_ForWorkers(run),
        torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
    )
    with prometheus.running(run.source):
        result = trainer.fit()
    best, metrics = min(result.best_checkpoints or [], key=lambda pair: pair[1]["val_loss"])
    return {"checkpoint": storage.join(run.uri, best.path.rstrip("/").rsplit("/", 1)[-1]), "metrics": metrics}
