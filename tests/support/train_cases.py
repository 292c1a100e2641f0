"""Small tasks, rows and workers of the training loop, and a run without Ray."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline import schema
from pipeline.datasets.dataset import DatasetInfo
from pipeline.images.batch import Batch
from pipeline.runtime.progress import Progress, SilentSink
from pipeline.training import loop
from pipeline.training.run_state import RunState, StepSchedule
from pipeline.training.train_config import TrainConfig
from pipeline.training.worker import Worker, build_worker
from tests.support.train_hooks import NoHooks

SIZE = 32


def tree(task: str, **over):
    model = {"name": "unet", "width": 4, "depth": 2, "norm": "group"}
    if task == "detection":
        model = {"name": "anchor_free", "norm": "group"}
    base = {
        "task": task,
        "data": "none",
        "out": "none",
        "model": model,
        "loss": {"cross_entropy": 1.0, "dice": 0.5} if task == "segmentation" else {},
        "input": {"size": [SIZE, SIZE]},
        "optim": {"name": "sgd", "lr": 0.05},
        "train": {"steps": 4, "batch_size": 4},
    }
    return TrainConfig.parse({**base, **over}, "test")


def info() -> DatasetInfo:
    classes = ("a", "b", schema.BACKGROUND)
    return DatasetInfo("none", "t", classes, 2, ("segmentation", "detection"), {}, "f", {}, {})


def rows(count: int, seed: int = 0, start: int = 0) -> pa.Table:
    """Random images with one box each but every fourth, and masks with uneven amounts of void."""
    rng = np.random.default_rng(seed)
    content = []
    for i in range(count):
        pixels = rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        mask = np.full((SIZE, SIZE), 2, np.uint8)
        mask[4:20, 6:22] = i % 2
        mask[: (5 * i) % SIZE] = schema.VOID
        box = {"x1": 6.0, "y1": 4.0, "x2": 22.0, "y2": 20.0, "label": i % 2, "crowd": False, "instance": 0}
        content.append(
            {
                "image_id": f"i{i}",
                "image": file.getvalue(),
                "height": SIZE,
                "width": SIZE,
                "mask": schema.pack_map(mask.tobytes()),
                "boxes": [] if i % 4 == 3 else [box],
            }
        )
    names = ["image_id", "image", "height", "width", "mask", "boxes"]
    table = pa.Table.from_pylist(content, schema=pa.schema([schema.DATASET.field(name) for name in names]))
    positions = pa.array(np.arange(start, start + count, dtype=np.int64))
    table = table.append_column("position", positions)
    table = table.append_column("epoch", pa.array(np.zeros(count, np.int64)))
    return table.append_column("resumed_from", pa.array([""] * count))


def worker_of(config: TrainConfig, **kwargs) -> Worker:
    return build_worker(config, info(), torch.device("cpu"), **kwargs)


def view_of(worker: Worker, table: pa.Table) -> Batch:
    """The augmented batch of a table."""
    return worker.augment(worker.task.collate(table, train=True, seed=0)[0])


def gradient(worker: Worker, tables: list[pa.Table]) -> torch.Tensor:
    """Gradient of one step over ``tables`` as accumulated batches, before the optimiser uses it."""
    gradients: list[torch.Tensor] = []

    def spy(optimizer, args, kwargs):
        grads = [p.grad.flatten() for p in worker.module.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads).clone())

    worker.optimizer.register_step_pre_hook(spy)
    loop.train_step(worker, [view_of(worker, table) for table in tables], 0.01)
    return gradients[0]


class Validations(NoHooks):
    """Validates on five images, as a real run does, and keeps (step, metrics, rows in the ledger)."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float], int]] = []

    def validate(self, worker: Worker, state: RunState) -> None:
        metrics = loop.validate(worker, [rows(5, seed=1)])
        state.record_validation(metrics["val_loss"], worker.config.train.min_delta)
        self.seen.append((state.step, metrics, worker.ledger.count(0, 10**9)))


def run_loop(
    worker: Worker,
    tables: Iterable[pa.Table],
    hooks: Any = None,
    state: RunState | None = None,
    every: int = 2,
    steps: int = 4,
) -> RunState:
    """Train on the tables, validating ``every`` so many steps; where the run stands then."""
    state = state or RunState()
    progress = Progress(SilentSink(), "t", steps)
    schedule = StepSchedule(steps, every, "")
    loop.run_steps(worker, loop.steps_of(worker, tables), state, schedule, progress, hooks or Validations())
    return state
