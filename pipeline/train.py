"""Ray Train around the loop: the dataset factory, the worker function, checkpoints, ``fit``."""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.data
import ray.train
import ray.train.torch
import torch

from pipeline import checkpoint, pools, storage, stream
from pipeline.datasets import open_dataset, row_groups
from pipeline.device import fuse
from pipeline.errors import InputError
from pipeline.framed import Framing, require_room
from pipeline.loop import Journal, Plan, Worker, build_worker, run_steps, steps_of, validate
from pipeline.recipe import TrainConfig
from pipeline.telemetry import BoardSink, NoSink, Progress

COLLECTIVE_TIMEOUT_S = 300


@dataclass(frozen=True)
class Fit:
    """One training run as it is sent to its workers. ``uri`` is the folder that Ray keeps its checkpoints in."""

    config: dict[str, Any]
    uri: str
    stage: str
    threads: int
    board: Any = None

    def settings(self) -> TrainConfig:
        """The validated tree."""
        return TrainConfig.parse(self.config, "config")


def training_dataset(fit: Fit) -> ray.data.Dataset:
    """The dataset factory: all that remains of the run, as of the checkpoint that the workers will get."""
    config = fit.settings()
    info = open_dataset(config.data)
    groups = row_groups(info, "train")
    order = stream.Order.of(groups, config.seed, config.stream.window_mb * 2**20)
    start = checkpoint.latest(fit.uri)
    ledger = checkpoint.read_ledger(start) if start else stream.Ledger()
    end, global_batch = config.length(order.rows)
    return stream.dataset(
        order,
        stream.plan_rest(ledger, end, global_batch),
        ledger,
        stream.training_columns(config.task),
        config.train.batch_size,
        start.rsplit("/", 1)[-1] if start else "",
        Framing(config.input, config.seed) if config.stream.frames else None,
        cached=config.stream.cache == "decoded",
    )


def _check_stream(config: TrainConfig, gpu: bool) -> None:
    """Refuse what this cluster cannot do, before a worker starts."""
    if config.stream.decode == "device" and not gpu:
        raise InputError(
            f"stream.decode: device wants a GPU for each of {config.train.workers} workers, the cluster has "
            f"{ray.cluster_resources().get('GPU', 0):.0f}; set it to host or auto"
        )
    if config.stream.cache == "decoded":
        rows = open_dataset(config.data).counts["train"]["images"]
        room = ray.cluster_resources().get("object_store_memory", 0)
        require_room(Framing(config.input, config.seed), rows, room)


def _look(worker: Worker, journal: Journal, run_uri: str) -> None:
    """Validate on all ranks, then report a checkpoint that holds every rank's ledger."""
    columns = stream.training_columns(worker.config.task)
    tables = stream.share(worker.info, "val", worker.rank, worker.world, columns)
    metrics = validate(worker, stream.slices(tables, worker.config.train.batch_size))
    journal.judge(metrics["val_loss"], worker.config.train.min_delta)
    journal.history.append({"step": journal.step, **metrics})
    if worker.rank == 0:
        lines = "".join(json.dumps(row) + "\n" for row in journal.history)
        storage.write_bytes(storage.join(run_uri, "metrics.jsonl"), lines.encode())
    with tempfile.TemporaryDirectory() as folder:
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
            checkpoint_dir_name=f"step-{journal.step:08d}",
        )


def _restore(worker: Worker) -> tuple[Journal, str]:
    """Take over the checkpoint that Ray hands out, if any: (the journal, the checkpoint's name)."""
    start = ray.train.get_checkpoint()
    if start is None:
        return Journal(), ""
    with start.as_directory() as folder:
        progress = checkpoint.load(
            Path(folder), worker.rank, model=worker.module, average=worker.average, optimizer=worker.optimizer
        )
        worker.ledger = checkpoint.read_ledger(folder)
        fuse(worker.optimizer, worker.device)
    return Journal(**progress), start.path.rstrip("/").rsplit("/", 1)[-1]


def train_worker(loop_config: dict[str, Fit]) -> None:
    """What every Ray Train worker executes."""
    fit = loop_config["fit"]
    torch.set_num_threads(fit.threads)
    pools.keep_memory()
    config, context = fit.settings(), ray.train.get_context()
    info = open_dataset(config.data)
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    worker = build_worker(config, info, device, rank=rank, world=world, threads=fit.threads)
    journal, resumed_from = _restore(worker)
    rows = sum(group.rows for group in row_groups(info, "train"))
    end, global_batch = config.length(rows)
    plan = Plan(-(-end // global_batch), config.validate_every(rows, global_batch), resumed_from)
    if journal.step >= plan.steps or (config.train.patience and journal.stale >= config.train.patience):
        return
    sink = BoardSink(fit.board) if fit.board is not None and rank == 0 else NoSink()
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None, "fit passes the dataset named train"
    size = config.train.batch_size
    tables: Iterable[Any] = shard.iter_batches(batch_size=size, batch_format="pyarrow", prefetch_batches=1)
    progress = Progress(sink, fit.stage, plan.steps, journal.step, "steps")
    run_steps(
        worker,
        steps_of(worker, tables, config.stream.prefetch),
        journal,
        plan,
        progress,
        lambda worker, journal: _look(worker, journal, fit.uri),
    )


def fit(run: Fit) -> dict[str, Any]:
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
    options = ray.data.ExecutionOptions(preserve_order=True)
    gpu = ray.cluster_resources().get("GPU", 0) >= config.train.workers
    _check_stream(config, gpu)
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"fit": run},
        scaling_config=ray.train.ScalingConfig(num_workers=config.train.workers, use_gpu=gpu),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="val_loss", checkpoint_score_order="min"
            ),
        ),
        datasets={"train": lambda: training_dataset(run)},
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"], execution_options=options),
        torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
    )
    result = trainer.fit()
    best, metrics = min(result.best_checkpoints or [], key=lambda pair: pair[1]["val_loss"])
    return {"checkpoint": storage.join(run.uri, best.path.rstrip("/").rsplit("/", 1)[-1]), "metrics": metrics}
