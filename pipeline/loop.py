"""The training loop on tensors: step, validate, judge; one loop for both tasks.

Knows no Ray: a list of batches drives it in a test. ``pipeline.train`` runs it inside Ray Train workers.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import checkpoint, losses, models, optim, stream
from pipeline.augment import Augment, Batch
from pipeline.datasets import DatasetInfo
from pipeline.errors import InputError
from pipeline.models import transfer
from pipeline.recipe import TrainConfig
from pipeline.tasks.base import Task
from pipeline.telemetry import Progress

FLAG_DELAY = 2
"""A step's loss is read this many steps later, when its copy has long arrived: the step waits for nothing."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the images of that step."""


@dataclass
class Worker:
    """Everything one data-parallel process holds."""

    config: TrainConfig
    info: DatasetInfo
    task: Task
    module: nn.Module
    model: nn.Module
    """``module``, or DDP around it."""
    average: optim.Ema | None
    """Exponential moving average of the weights, if asked for."""
    optimizer: torch.optim.Optimizer
    augment: Augment
    eval_augment: Augment
    device: torch.device
    rank: int = 0
    world: int = 1
    ledger: stream.Ledger = field(default_factory=stream.Ledger)

    @property
    def judged(self) -> nn.Module:
        """The bare module that is validated and bundled."""
        return self.module if self.average is None else self.average.module


def build_worker(
    config: TrainConfig,
    info: DatasetInfo,
    device: torch.device,
    *,
    rank: int = 0,
    world: int = 1,
    threads: int = 1,
) -> Worker:
    """Model, optimiser, task and augmentation of one process; the same weights on every rank."""
    checkpoint.seed_all(config.seed, 0)
    outputs = config.build_task(info, threads).num_outputs
    module = config.model_for(info).build(outputs)
    transfer.prepare(config.transfer, module)
    module.to(device)
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    task = config.build_task(info, threads, multiple=int(module.stride))  # type: ignore[arg-type]
    if config.train.sync_batch_norm:
        if device.type == "cpu":
            raise InputError("train.sync_batch_norm needs GPUs; set it to false, or use the model's norm: group")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    checkpoint.seed_all(config.seed, rank + 1)
    ids = [device.index] if device.type == "cuda" else None
    return Worker(
        config=config, info=info, task=task, module=module,
        model=DistributedDataParallel(module, device_ids=ids) if world > 1 else module,
        average=optim.Ema(module, config.optim.ema) if config.optim.ema else None,
        optimizer=optim.build(config.optim, module, models.layers_of(module)),
        augment=Augment(config.augment, config.input, config.seed, config.passes(info)),
        eval_augment=Augment(None, config.input, config.seed),
        device=device, rank=rank, world=world,
    )  # fmt: skip


def all_sum(values: Tensor, world: int) -> Tensor:
    """Sum over all ranks, in place."""
    if world > 1:
        dist.all_reduce(values)
    return values


def global_counts(task: Task, batches: list[Batch], world: int) -> dict[str, Tensor]:
    """What each loss term divides by: counts of the targets over ranks and accumulation, before any backward."""
    each = [task.counts(batch) for batch in batches]
    names = sorted(each[0])
    total = torch.stack([torch.stack([counts[name].double() for counts in each]).sum() for name in names])
    return dict(zip(names, all_sum(total, world).unbind(), strict=True))


def train_step(worker: Worker, batches: list[Batch], lr: float) -> Tensor:
    """One optimiser step over the accumulated ``batches``; returns this rank's share of the loss, detached."""
    views = [worker.augment(batch.to(worker.device)) for batch in batches]
    counts = global_counts(worker.task, views, worker.world)
    worker.model.train()
    transfer.hold(worker.config.transfer, worker.module)
    parts = []
    for i, view in enumerate(views):
        last = i == len(views) - 1
        wait = contextlib.nullcontext() if last or worker.world == 1 else worker.model.no_sync()  # type: ignore[operator]
        with wait:
            loss = losses.total(worker.task.loss(worker.task.ask(worker.model, view), view), counts, worker.world)
            loss.backward()
        parts.append(loss.detach())
    optim.add_penalties(worker.config.optim, worker.module)
    if worker.config.optim.clip:
        optim.clip_gradients(worker.config.optim, worker.module.parameters())
    optim.set_lr(worker.optimizer, lr)
    worker.optimizer.step()
    worker.optimizer.zero_grad(set_to_none=True)
    if worker.average is not None:
        worker.average.update(worker.module)
    return torch.stack(parts).sum()


class Flags:
    """Loss values on their way to the host, read ``FLAG_DELAY`` steps later with the ids of their images."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, list[str]]] = deque()

    def push(self, step: int, loss: Tensor, image_ids: list[str]) -> Iterator[tuple[int, float]]:
        """Send one value off; yields (step, loss) of those that are old enough."""
        pinned = loss.device.type == "cuda"
        host = torch.empty_like(loss, device="cpu", pin_memory=pinned).copy_(loss, non_blocking=pinned)
        self._waiting.append((step, host, image_ids))
        while len(self._waiting) > FLAG_DELAY:
            yield self._read()

    def flush(self) -> Iterator[tuple[int, float]]:
        """Wait for the device and read the rest: nothing is published past a flag not yet read."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        while self._waiting:
            yield self._read()

    def _read(self) -> tuple[int, float]:
        step, host, image_ids = self._waiting.popleft()
        value = float(host)
        if value != value or value in (float("inf"), float("-inf")):
            names = ", ".join(image_ids[:16])
            raise NonFiniteLossError(
                f"loss is {value} at step {step}; images of that step: {names}; try a lower optim.lr"
            )
        return step, value


def share_buffers(worker: Worker) -> None:
    """Give every rank the buffers of rank 0, whose model is kept: running statistics differ by what each saw."""
    if worker.world > 1:
        for module in dict.fromkeys([worker.module, worker.judged]):
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


@torch.inference_mode()
def validate(worker: Worker, tables: Iterable[pa.Table]) -> dict[str, float]:
    """Loss over this rank's rows, summed over ranks once: ``val_loss`` and ``val_<term>``, and ``val_images``.

    Drops no row: ranks may hold different numbers of them, and the bare module knows no other rank.
    """
    module = worker.judged.eval()
    names: list[str] = []
    sums = torch.zeros(0, 3, dtype=torch.float64)
    images = 0
    for table in tables:
        batch, failures = worker.task.collate(table, train=False, seed=worker.config.seed)
        _refuse(failures, table)
        view = worker.eval_augment(batch.to(worker.device))
        terms = worker.task.loss(worker.task.ask(module, view), view)
        names = sorted(terms)
        rows = torch.stack(
            [torch.stack([torch.as_tensor(terms[n][0], device=worker.device).double(), terms[n][1].double(),
                          terms[n][2].double()]) for n in names]
        ).cpu()  # fmt: skip
        sums = rows if not len(sums) else torch.cat([rows[:, :1], sums[:, 1:] + rows[:, 1:]], 1)
        images += table.num_rows
    return _merge_validation(worker, names, sums, images)


def _merge_validation(worker: Worker, names: list[str], sums: Tensor, images: int) -> dict[str, float]:
    """Add up over ranks; a rank without a row adds zeros, its terms are named by the task."""
    names = names or sorted(worker.task.terms)
    sums = sums if len(sums) else torch.zeros(len(names), 3, dtype=torch.float64)
    flat = torch.cat([sums[:, 1:].reshape(-1), torch.tensor([float(images)], dtype=torch.float64)])
    weights = sums[:, 0].clone()
    if worker.world > 1:
        flat, weights = flat.to(worker.device), weights.to(worker.device)
        dist.all_reduce(flat)
        dist.all_reduce(weights, op=dist.ReduceOp.MAX)
    each = (flat[:-1].reshape(-1, 2)[:, 0] / flat[:-1].reshape(-1, 2)[:, 1].clamp(min=1)).cpu()
    out = {f"val_{name}": float(value) for name, value in zip(names, each, strict=True)}
    return {"val_loss": float((weights.cpu() * each).sum()), **out, "val_images": int(flat[-1])}


def _refuse(failures: list[tuple[int, str, str]], table: pa.Table) -> None:
    if failures:
        row, reason, detail = failures[0]
        name = table["image_id"][row].as_py()
        raise InputError(f"image '{name}' of the dataset is {reason}: {detail}; check the shard, or ingest again")


@dataclass(frozen=True)
class Step:
    """The collated batches of one optimiser step, and where they stand in the stream."""

    batches: list[Batch]
    positions: list[Any]
    resumed_from: str


def steps_of(worker: Worker, tables: Iterable[pa.Table]) -> Iterator[Step]:
    """Group local batches into optimiser steps; a batch that is not full is a broken promise of the stream."""
    batches: list[Batch] = []
    positions: list[Any] = []
    for table in tables:
        if table.num_rows != worker.config.train.batch_size:
            raise RuntimeError(f"the stream ended within a batch: {table.num_rows} rows; rows were lost on the way")
        batch, failures = worker.task.collate(table, train=True, seed=worker.config.seed)
        _refuse(failures, table)
        arrays = stream.batch_arrays(table)
        batches.append(batch)
        positions.append(arrays["position"])
        if len(batches) == worker.config.train.accumulate:
            yield Step(batches, positions, arrays["resumed_from"])
            batches, positions = [], []
    if batches:
        raise RuntimeError(f"the stream ended within a step: {len(batches)} batches; rows were lost on the way")


@dataclass
class Journal:
    """What rank 0 knows of the run so far; saved in every checkpoint."""

    step: int = 0
    best: float = float("inf")
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def judge(self, val_loss: float, min_delta: float) -> None:
        """Count validations without an improvement by more than ``min_delta``."""
        if val_loss < self.best - min_delta:
            self.best, self.stale = val_loss, 0
        else:
            self.stale += 1


@dataclass(frozen=True)
class Plan:
    """How long this run is, and from which checkpoint it goes on ('' = from the start)."""

    steps: int
    validate_every: int
    resumed_from: str


def run_steps(
    worker: Worker,
    steps: Iterable[Step],
    journal: Journal,
    plan: Plan,
    progress: Progress,
    look: Callable[[Worker, Journal], None],
) -> None:
    """Train until the steps end, or the validation loss stops falling.

    Args:
        worker: This process; its ledger grows only after the optimiser step that used the rows.
        steps: What ``steps_of`` yields.
        journal: Where the run stands; updated.
        plan: How long it is.
        progress: Told of every step.
        look: Validates, judges and saves; called on every rank at the same steps, all flags read before.
    """
    flags, settings = Flags(), worker.config.train
    for step in steps:
        if step.resumed_from != plan.resumed_from:
            raise RuntimeError(f"the stream goes on from '{step.resumed_from}', this worker from '{plan.resumed_from}'")
        began = time.monotonic()
        lr = optim.lr_at(worker.config.optim, journal.step, plan.steps)
        loss = train_step(worker, step.batches, lr)
        for positions in step.positions:
            worker.ledger.add(positions)
        journal.step += 1
        ids = [name for batch in step.batches for name in batch.image_ids]
        looks = journal.step % plan.validate_every == 0 or journal.step == plan.steps
        arrived = [*flags.push(journal.step, loss, ids), *(flags.flush() if looks else ())]
        seconds = time.monotonic() - began
        for at, value in arrived:
            if at % settings.log_every == 0:
                rate = optim.lr_at(worker.config.optim, at - 1, plan.steps)
                journal.history.append({"step": at, "loss": value, "lr": rate, "step_s": seconds})
        progress.advance(1)
        if looks:
            share_buffers(worker)
            look(worker, journal)
            if settings.patience and journal.stale >= settings.patience:
                break
