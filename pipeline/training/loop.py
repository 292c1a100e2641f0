"""The training loop on tensors: step, validate, checkpoint; one loop for both tasks.

Knows no Ray: a list of batches drives it in a test. ``pipeline.training.ray_train`` runs it inside Ray Train workers.
"""

import contextlib
from collections.abc import Generator, Iterable
from typing import Protocol

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import losses
from pipeline.images.batch import Batch
from pipeline.models import transfer
from pipeline.runtime.progress import Progress
from pipeline.stream.batches import DecodedBatch, Step, augmented_batches, decode_batches, group_into_steps, prefetch
from pipeline.tasks.base import Task
from pipeline.training.loss_readback import PendingLosses
from pipeline.training.optimizer import add_penalties, clip_gradients, set_lr
from pipeline.training.run_state import RunState, StepReport, StepSchedule
from pipeline.training.step_timer import StepTimer
from pipeline.training.worker import Worker


class TrainHooks(Protocol):
    """What the loop leaves to its caller: where checkpoints go, who hears of steps, when a machine will be taken away.

    ``validate``, ``preempted`` and ``save`` are called on every rank after the same steps, so they may communicate.
    """

    def validate(self, worker: Worker, state: RunState) -> None:
        """Validate, record the result in ``state`` and save a checkpoint; the losses of all steps are read before."""
        ...

    def preempted(self, step: int) -> bool:
        """Whether a machine of any rank will soon be taken away; the same answer on every rank."""
        ...

    def save(self, worker: Worker, state: RunState) -> None:
        """Save a checkpoint without validating; called once a start, after the first ``preempted`` that is True."""
        ...

    def on_step(self, report: StepReport) -> None:
        """Hear of an optimiser step that has been done; called after each."""
        ...


def all_sum(values: Tensor, world_size: int) -> Tensor:
    """Sum over all ranks, in place."""
    if world_size > 1:
        dist.all_reduce(values)
    return values


def global_counts(task: Task, batches: list[Batch], world_size: int) -> dict[str, Tensor]:
    """What each loss term divides by: counts of the targets over ranks and accumulation, before any backward."""
    batch_counts = [task.counts(batch) for batch in batches]
    names = sorted(batch_counts[0])
    # One tensor for all terms, so that the ranks reduce once.
    totals = torch.stack([torch.stack([counts[name].double() for counts in batch_counts]).sum() for name in names])
    return dict(zip(names, all_sum(totals, world_size).unbind(), strict=True))


def train_step(worker: Worker, batches: list[Batch], lr: float) -> Tensor:
    """One optimiser step over accumulated augmented batches; returns this rank's share of the loss, detached."""
    # The counts of the whole step come first: each batch's loss is divided by them, so that the gradients of batches
    # and ranks add up to that of one large batch.
    counts = global_counts(worker.task, batches, worker.world_size)
    worker.model.train()
    transfer.keep_frozen_eval(worker.config.transfer, worker.module)

    # Forward and backward of each batch; DDP reduces gradients over the ranks in the last backward only.
    batch_losses = []
    for number, batch in enumerate(batches):
        reduces = number == len(batches) - 1
        synchronisation = (
            contextlib.nullcontext() if reduces or worker.world_size == 1 else worker.model.no_sync()  # type: ignore[operator]
        )
        with synchronisation:
            outputs = worker.forward_pass(worker.train_forward, batch)
            loss = losses.total(worker.task.loss(outputs, batch), counts, worker.world_size)
            loss.backward()
        batch_losses.append(loss.detach())

    # Penalties and clipping act on the whole gradient, so they wait until it is summed.
    add_penalties(worker.config.optim, worker.module)
    if worker.config.optim.clip:
        clip_gradients(worker.config.optim, worker.module.parameters())
    set_lr(worker.optimizer, lr)
    worker.optimizer.step()
    worker.optimizer.zero_grad(set_to_none=True)
    # The average follows the weights, so it is updated after they have moved.
    if worker.average is not None:
        worker.average.update(worker.module)
    return torch.stack(batch_losses).sum()


def share_buffers(worker: Worker) -> None:
    """Give every rank the buffers of rank 0, whose model is kept: running statistics differ with each rank's rows."""
    if worker.world_size > 1:
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
    decoded = decode_batches(worker.task, tables, train=False, seed=worker.config.seed, decoder=worker.decoder)
    for table, batch in augmented_batches(decoded, worker.eval_augment, worker.device):
        terms = worker.task.loss(worker.forward_pass(module, batch), batch)
        names = sorted(terms)
        weights = [float(terms[name][0]) for name in names]
        # Summed on the device: reading each batch's loss would hold up the next.
        batch_sums = torch.stack([torch.stack([value.double() for value in terms[name][1:]]) for name in names])
        sums = sums + batch_sums if len(sums) else batch_sums
        images += table.num_rows
    columns = torch.tensor(weights, dtype=torch.float64)[:, None], sums.cpu()
    return _merge_validation(worker, names, torch.cat(columns, 1) if names else torch.zeros(0, 3), images)


def _merge_validation(worker: Worker, names: list[str], sums: Tensor, images: int) -> dict[str, float]:
    """The validation metrics over all ranks.

    Args:
        worker: This process.
        names: Of the loss terms, sorted; empty on a rank without rows.
        sums: (T, 3) weight, numerator and denominator of each term over this rank's rows.
        images: Number of this rank's rows.
    """
    # A rank without a row takes part in the reduction with zeros, under the names that its task gives.
    names = names or sorted(worker.task.loss_terms)
    sums = sums if len(sums) else torch.zeros(len(names), 3, dtype=torch.float64)
    flat = torch.cat([sums[:, 1:].reshape(-1), torch.tensor([float(images)], dtype=torch.float64)])
    weights = sums[:, 0].clone()
    if worker.world_size > 1:
        flat, weights = flat.to(worker.device), weights.to(worker.device)
        dist.all_reduce(flat)
        # The weights are the same wherever there are rows: their maximum passes over ranks that have none.
        dist.all_reduce(weights, op=dist.ReduceOp.MAX)
    means = (flat[:-1].reshape(-1, 2)[:, 0] / flat[:-1].reshape(-1, 2)[:, 1].clamp(min=1)).cpu()
    term_losses = {f"val_{name}": float(mean) for name, mean in zip(names, means, strict=True)}
    return {"val_loss": float((weights.cpu() * means).sum()), **term_losses, "val_images": int(flat[-1])}


def steps_of(worker: Worker, tables: Iterable[pa.Table], num_ahead: int = 0) -> Generator[Step, None, None]:
    """Optimiser steps out of the stream's tables, decoded ``num_ahead`` batches ahead of the model (0: in step)."""
    settings, seed = worker.config.train, worker.config.seed
    decoder = None if worker.config.stream.frames else worker.decoder

    def decode() -> Generator[DecodedBatch, None, None]:
        return decode_batches(worker.task, tables, train=True, seed=seed, decoder=decoder)

    decoded = prefetch(decode, num_ahead) if num_ahead else decode()
    return group_into_steps(
        augmented_batches(decoded, worker.augment, worker.device),
        settings.batch_size,
        worker.scale.accumulate,
    )


def run_steps(
    worker: Worker,
    steps: Iterable[Step],
    state: RunState,
    schedule: StepSchedule,
    progress: Progress,
    hooks: TrainHooks,
) -> None:
    """Train until the steps end, or the validation loss stops falling.

    Args:
        worker: This process; its ledger grows.
        steps: What ``steps_of`` yields.
        state: Where the run stands; updated.
        schedule: How long the run is, when it validates and at which rates it learns.
        progress: Advanced by every step.
        hooks: Validation, checkpoints and reports.

    Raises:
        NonFiniteLossError: A loss is NaN or infinite; what it was computed of is in the error.
    """
    settings, pending, timer = worker.config.train, PendingLosses(), StepTimer(worker.device)
    saved_for_preemption = False
    # Next batch: the timer asks for it, so that waiting for data is measured.
    for step in timer.timed(steps):
        _require_same_checkpoint(step, schedule)

        # Forward, backward and optimiser step; the rate is that of the nominal step which the run has reached.
        lr = schedule.lr(worker.config.optim, state.step) * worker.scale.lr
        loss = train_step(worker, step.batches, lr)
        # The ledger grows only now: rows count as used once the weights have learned from them, so a run that dies
        # in between trains on them after its restart.
        for positions in step.positions:
            worker.ledger.add(positions)
        state.step += 1

        # What follows the step is decided before its loss is read. All ranks ask at the same steps, because asking
        # for a preemption is a barrier; once a checkpoint was saved for one, nobody asks again.
        validates = schedule.validates_at(state.step)
        saves = not saved_for_preemption and hooks.preempted(state.step)

        # Losses arrive some steps late, so that the device never waits. Before a checkpoint all of them are read: a
        # loss that is NaN stops the run here, and weights spoiled by it are never validated nor saved.
        arrived = list(pending.push(state.step, loss, step.batches))
        if validates or saves:
            arrived += pending.wait_all()
        num_images = sum(len(positions) for positions in step.positions)
        step_s = timer.finish_step(worker.scale.images)
        report = StepReport(state.step, num_images, step_s, timer.take_wait_s(), lr, arrived)

        # Log: metrics, the history and the progress bar, each before a checkpoint that holds the history.
        hooks.on_step(report)
        _log_losses(worker, state, schedule, report, timer)
        progress.advance(1)

        # Validate, or save ahead of a preemption; a validation saves too. Buffers are shared first, so that every
        # rank evaluates the model that rank 0 writes.
        if validates:
            share_buffers(worker)
            hooks.validate(worker, state)
            if state.stops_early(settings.patience):
                break
        elif saves:
            share_buffers(worker)
            hooks.save(worker, state)
        saved_for_preemption = saved_for_preemption or saves


def _require_same_checkpoint(step: Step, schedule: StepSchedule) -> None:
    """The rows of a step were chosen by the ledger of a checkpoint: it must be the one that this worker restored."""
    if step.resumed_from != schedule.resumed_from:
        raise RuntimeError(f"the stream goes on from '{step.resumed_from}', this worker from '{schedule.resumed_from}'")


def _log_losses(worker: Worker, state: RunState, schedule: StepSchedule, report: StepReport, timer: StepTimer) -> None:
    """A row of the history for every ``log_every``-th step whose loss has arrived, with that step's learning rate."""
    due = [(step, loss) for step, loss in report.losses if step % worker.config.train.log_every == 0]
    # Taking the rate resets it, so it is taken only where it is logged: it is of all steps since the last row.
    images_s = timer.take_images_per_s() if due else 0.0
    for step, loss in due:
        lr = schedule.lr(worker.config.optim, step - 1) * worker.scale.lr
        state.log_row(step, loss=loss, lr=lr, step_s=report.seconds, images_s=images_s)
