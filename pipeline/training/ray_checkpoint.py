"""Checkpoints that go through Ray Train: reported, restored; and the batches of a step whose loss is not finite."""

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path

import ray.train
import safetensors.torch
import torch

from pipeline import storage
from pipeline.models.device import use_fused_kernels
from pipeline.training import checkpoint
from pipeline.training.loss_readback import NonFiniteLossError
from pipeline.training.run_state import RunState
from pipeline.training.worker import Worker


def report_checkpoint(worker: Worker, state: RunState, metrics: dict[str, float], resumed_from: str) -> None:
    """Write this rank's part aside; Ray uploads it while training goes on, and deletes older ones after that.

    Args:
        worker: This process; all ranks report at the same step.
        state: Where the run stands.
        metrics: What Ray ranks checkpoints by; with ``val_loss``.
        resumed_from: Name of the checkpoint that this worker group began from.
    """
    # The folder's name tells attempts apart: files that a dead attempt left must not mix with a later one's, whose
    # ranks trained on other rows.
    attempt = hashlib.sha256(f"{worker.world_size} from {resumed_from}".encode()).hexdigest()[:4]
    folder = tempfile.mkdtemp(prefix="dubito-checkpoint-")
    checkpoint.save(
        Path(folder),
        worker.rank,
        worker.ledger,
        model=worker.module,
        average=worker.average,
        optimizer=worker.optimizer,
        progress=state.to_dict(),
    )
    ray.train.report(
        {**metrics, "step": state.step, "augment": worker.augment.report()},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step-{state.step:08d}-{attempt}",
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def restore(worker: Worker) -> tuple[RunState, str]:
    """Load the checkpoint that Ray hands out, if any, into the worker: (the run's state, the checkpoint's name)."""
    start = ray.train.get_checkpoint()
    if start is None:
        return RunState(), ""
    with start.as_directory() as folder:
        progress = checkpoint.load(
            Path(folder), worker.rank, model=worker.module, average=worker.average, optimizer=worker.optimizer
        )
        worker.ledger = checkpoint.read_ledger(folder)
        # Loading takes over the saved choice of kernels, which may be another device's.
        use_fused_kernels(worker.optimizer, worker.device)
    return RunState.from_dict(progress), start.path.rstrip("/").rsplit("/", 1)[-1]


def save_batches(error: NonFiniteLossError, run_uri: str, rank: int) -> str:
    """Save the batches of the step whose loss is not finite: images, labels and ids, as the model saw them.

    Returns:
        URI of the folder.
    """
    folder = storage.join(run_uri, f"not-finite-step-{error.step:08d}")
    for number, batch in enumerate(error.batches):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        tensors = {name: value.cpu().contiguous() for name, value in fields.items() if isinstance(value, torch.Tensor)}
        content = safetensors.torch.save(tensors, {"image_ids": json.dumps(batch.image_ids)})
        storage.write_bytes(storage.join(folder, f"rank-{rank}-batch-{number}.safetensors"), content)
    return folder
