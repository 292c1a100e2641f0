"""The training loop on tensors: step, validate, judge; one loop for both tasks.

Knows no Ray: a list of batches drives it in a test. ``pipeline.training.ray_train`` runs it inside Ray Train workers.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import losses, models
from pipeline.augment import Augment
from pipeline.datasets.dataset import DatasetInfo
from pipeline.errors import InputError
from pipeline.images.batch import Batch
from pipeline.images.gpu_decode import DeviceDecoder
from pipeline.models import transfer
from pipeline.models.device import Compiled, autocast, to_device_channels_last, use_fused_kernels, wants_compile
from pipeline.runtime.progress import Progress
from pipeline.stream import batches as batches_module
from pipeline.stream import run_stream
from pipeline.stream.batches import Step
from pipeline.tasks.base import Task
from pipeline.training import checkpoint
from pipeline.training.loss_readback import PendingLosses
from pipeline.training.optimizer import Ema, add_penalties, build_optimizer, clip_gradients, set_lr
from pipeline.training.run_state import RunState, StepReport, StepSchedule
from pipeline.training.step_timer import StepTimer
from pipeline.training.train_config import Scale, TrainConfig


@dataclass
class Worker:
    """Everything one data-parallel process holds."""

    config: TrainConfig
    info: DatasetInfo
    task: Task
    module: nn.Module
    model: nn.Module
    """``module``, or DDP around it."""
    train_forward: Any
    """``model``, or its compiled call."""
    average: Ema | None
    """Exponential moving average of the weights, if asked for."""
    optimizer: torch.optim.Optimizer
    augment: Augment
    eval_augment: Augment
    device: torch.device
    decoder: DeviceDecoder | None = None
    """Decodes on the device; None: the task's CPU threads do."""
    rank: int = 0
    world: int = 1
    ledger: run_stream.Ledger = field(default_factory=run_stream.Ledger)

    @property
    def evaluated_module(self) -> nn.Module:
        """The bare module that is validated and bundled."""
        return self.module if self.average is None else self.average.module

    def forward_pass(self, model: Any, view: Batch) -> Any:
        """Raw outputs of a model for a batch, in the run's precision."""
        with autocast(self.device, self.config.train.precision):
            return self.task.forward(model, view)

    @property
    def scale(self) -> Scale:
        """What a step of this worker group is."""
        return self.config.train.scaled(self.world)


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
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # of streams and pinned memory that name none
    checkpoint.seed_all(config.seed, 0)
    module = config.model_for(info).build(config.num_outputs(info))
    transfer.load_pretrained(config.transfer, module)
    module = to_device_channels_last(module, device)
    task = config.build_task(info, threads, multiple=int(module.stride))  # type: ignore[arg-type]
    if config.train.sync_batch_norm:
        if device.type == "cpu":
            raise InputError("train.sync_batch_norm needs GPUs; set it to false, or use the model's norm: group")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    checkpoint.seed_all(config.seed, rank + 1)
    ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(module, device_ids=ids) if world > 1 else module
    fast = wants_compile(device, config.train.compile, config.num_steps(info))
    # A two-stage detector asks its tensors for numbers on the way: nothing to be gained by compiling it.
    whole = fast and not getattr(module, "takes_targets", False)
    worker = Worker(
        config=config, info=info, task=task, module=module, model=model,
        train_forward=Compiled(model) if whole else model,
        average=Ema(module, config.optim.ema) if config.optim.ema else None,
        optimizer=build_optimizer(config.optim, module, models.backbone_layers(module)),
        augment=Augment(config.augment, config.input, config.seed, config.passes(info), compile=fast),
        eval_augment=Augment(None, config.input, config.seed, compile=fast),
        device=device, decoder=_decoder(config, device, threads), rank=rank, world=world,
    )  # fmt: skip
    use_fused_kernels(worker.optimizer, device)
    return worker


def _decoder(config: TrainConfig, device: torch.device, threads: int) -> DeviceDecoder | None:
    """What ``stream.decode`` comes to on this device."""
    if config.stream.decode == "device" and device.type != "cuda":
        raise InputError(
            f"stream.decode: device wants a GPU in every worker, and this one has {device.type}; set it to host or auto"
        )
    wanted = device.type == "cuda" and config.stream.decode in ("auto", "device")
    return DeviceDecoder(device, threads) if wanted else None


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


def train_step(worker: Worker, views: list[Batch], lr: float) -> Tensor:
    """One optimiser step over accumulated augmented batches; returns this rank's share of the loss, detached."""
    counts = global_counts(worker.task, views, worker.world)
    worker.model.train()
    transfer.keep_frozen_eval(worker.config.transfer, worker.module)
    parts = []
    for i, view in enumerate(views):
        last = i == len(views) - 1
        wait = contextlib.nullcontext() if last or worker.world == 1 else worker.model.no_sync()  # type: ignore[operator]
        with wait:
            loss = losses.total(
                worker.task.loss(worker.forward_pass(worker.train_forward, view), view), counts, worker.world
            )
            loss.backward()
        parts.append(loss.detach())
    add_penalties(worker.config.optim, worker.module)
    if worker.config.optim.clip:
        clip_gradients(worker.config.optim, worker.module.parameters())
    set_lr(worker.optimizer, lr)
    worker.optimizer.step()
    worker.optimizer.zero_grad(set_to_none=True)
    if worker.average is not None:
        worker.average.update(worker.module)
    return torch.stack(parts).sum()


def share_buffers(worker: Worker) -> None:
    """Give every rank the buffers of rank 0, whose model is kept: running statistics differ by what each saw."""
    if worker.world > 1:
        for module in dict.fromkeys([worker.module, worker.evaluated_module]):
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


@torch.inference_mode()
def validate(worker: Worker, tables: Iterable[pa.Table]) -> dict[str, float]:
    """Loss over this rank's rows, summed over ranks once: ``val_loss`` and ``val_<term>``, and ``val_images``.

    Drops no row: ranks may hold different numbers of them, and the bare module knows no other rank.
    """
    module = worker.evaluated_module.eval()
    names: list[str] = []
    weights: list[float] = []
    sums = torch.zeros(0, 2, dtype=torch.float64)
    images = 0
    batches = batches_module.decode_batches(
        worker.task, tables, train=False, seed=worker.config.seed, decoder=worker.decoder
    )
    for table, view in batches_module.augmented_batches(batches, worker.eval_augment, worker.device):
        terms = worker.task.loss(worker.forward_pass(module, view), view)
        names = sorted(terms)
        weights = [float(terms[name][0]) for name in names]
        # Summed on the device: reading each batch's loss would hold up the next.
        rows = torch.stack([torch.stack([part.double() for part in terms[name][1:]]) for name in names])
        sums = sums + rows if len(sums) else rows
        images += table.num_rows
    columns = torch.tensor(weights, dtype=torch.float64)[:, None], sums.cpu()
    return _merge_validation(worker, names, torch.cat(columns, 1) if names else torch.zeros(0, 3), images)


def _merge_validation(worker: Worker, names: list[str], sums: Tensor, images: int) -> dict[str, float]:
    """Add up over ranks; a rank without a row adds zeros, its terms are named by the task."""
    names = names or sorted(worker.task.loss_terms)
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


def steps_of(worker: Worker, tables: Iterable[pa.Table], prefetch: int = 0) -> Generator[Step, None, None]:
    """Optimiser steps out of the stream's tables, decoded ``prefetch`` batches ahead of the model (0: in step)."""
    settings, seed = worker.config.train, worker.config.seed
    decoder = None if worker.config.stream.frames else worker.decoder

    def collated() -> Generator[batches_module.DecodedBatch, None, None]:
        return batches_module.decode_batches(worker.task, tables, train=True, seed=seed, decoder=decoder)

    batches = batches_module.prefetch(collated, prefetch) if prefetch else collated()
    return batches_module.group_into_steps(
        batches_module.augmented_batches(batches, worker.augment, worker.device),
        settings.batch_size,
        worker.scale.accumulate,
    )


def run_steps(
    worker: Worker,
    steps: Iterable[Step],
    journal: RunState,
    plan: StepSchedule,
    progress: Progress,
    look: Callable[[Worker, RunState], None],
    warned: Callable[[int], bool] = lambda step: False,
    keep: Callable[[Worker, RunState], None] = lambda worker, journal: None,
    heard: Callable[[StepReport], None] = lambda made: None,
) -> None:
    """Train until the steps end, or the validation loss stops falling.

    Args:
        worker: This process; its ledger grows only after the optimiser step that used the rows.
        steps: What ``steps_of`` yields.
        journal: Where the run stands; updated.
        plan: How long it is.
        progress: Told of every step.
        look: Validates, judges and saves; called on every rank at the same steps, all flags read before.
        warned: Given the number of each step: whether this machine, or another rank's, will soon be taken away. The
            same on every rank.
        keep: Saves without validating, all flags read before; called once, when a warning comes.
        heard: Told of every step: what it took.

    Raises:
        NonFiniteLossError: A loss is NaN or infinite; what it was computed of is in the error.
    """
    flags, settings, pace, kept = PendingLosses(), worker.config.train, StepTimer(worker.device), False
    for step in pace.timed(steps):
        if step.resumed_from != plan.resumed_from:
            raise RuntimeError(f"the stream goes on from '{step.resumed_from}', this worker from '{plan.resumed_from}'")
        lr = plan.lr(worker.config.optim, journal.step) * worker.scale.lr
        loss = train_step(worker, step.batches, lr)
        for positions in step.positions:
            worker.ledger.add(positions)
        journal.step += 1
        looks = plan.validates_at(journal.step)
        saves = not kept and warned(journal.step)
        arrived = [*flags.push(journal.step, loss, step.batches), *(flags.wait_all() if looks or saves else ())]
        own = sum(len(positions) for positions in step.positions)
        made = StepReport(journal.step, own, pace.finish_step(worker.scale.images), pace.take_wait_s(), lr, arrived)
        heard(made)
        due = [(at, value) for at, value in arrived if at % settings.log_every == 0]
        speed = pace.take_images_per_s() if due else 0.0
        for at, value in due:
            rate = plan.lr(worker.config.optim, at - 1) * worker.scale.lr
            journal.log_row(at, loss=value, lr=rate, step_s=made.seconds, images_s=speed)
        progress.advance(1)
        if looks:
            share_buffers(worker)
            look(worker, journal)
            if settings.patience and journal.stale >= settings.patience:
                break
        elif saves:
            share_buffers(worker)
            keep(worker, journal)
        kept = kept or saves
