"""Rows, tasks and stand-ins of model outputs for the tests of the tasks."""

import io
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from pipeline import schema
from pipeline.images.batch import Batch
from pipeline.images.input_settings import InputSettings
from pipeline.models import DetectionOutput as Output
from pipeline.tasks import Detection, Segmentation

CLASSES = ["cell", "vessel", "background"]


def png(height: int, width: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def random_mask(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), (height, width))


def box(x1: float, y1: float, x2: float, y2: float, label: int, crowd: bool | None = False) -> dict[str, Any]:
    return {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "label": label, "crowd": crowd, "instance": 0}


def table_of(sizes: list[tuple[int, int]], **columns: list[Any]) -> pa.Table:
    rows = {
        "image_id": [f"i{n}" for n in range(len(sizes))],
        "image": [png(*size, n) for n, size in enumerate(sizes)],
        "height": [size[0] for size in sizes],
        "width": [size[1] for size in sizes],
        **columns,
    }
    fields = [schema.DATASET.field(name) for name in rows if name in schema.DATASET.names]
    extra = [pa.field(name, pa.int64()) for name in rows if name not in schema.DATASET.names]
    return pa.Table.from_pydict(rows, schema=pa.schema([*fields, *extra]))


def segmentation(
    size: tuple[int, int] = (16, 24),
    fit: Literal["crop", "letterbox"] = "letterbox",
    loss: dict[str, Any] | None = None,
    predict: dict[str, Any] | None = None,
    classes: list[str] = CLASSES,
    background: int | None = 2,
) -> Segmentation:
    return Segmentation(
        classes,
        background,
        InputSettings(size=size, fit=fit),
        Segmentation.parse_loss(loss or {}, "loss"),
        Segmentation.parse_predict(predict or {}, "predict"),
        threads=2,
    )


def detection(
    size: tuple[int, int] = (32, 32), predict: dict[str, Any] | None = None, background: int | None = 2
) -> Detection:
    return Detection(
        CLASSES,
        background,
        InputSettings(size=size),
        Detection.parse_loss({}, "loss"),
        Detection.parse_predict(predict or {}, "predict"),
        threads=1,
    )


def _grid(height: int, width: int, stride: int = 8) -> Tensor:
    rows, columns = torch.meshgrid(
        torch.arange(stride / 2, height, stride), torch.arange(stride / 2, width, stride), indexing="ij"
    )
    return torch.stack([columns.flatten(), rows.flatten()], 1)


def output_of(images: int, size: tuple[int, int], seed: int, sharpness: float = 2.0) -> Output:
    generator = torch.Generator().manual_seed(seed)
    centres = _grid(*size)
    count = len(centres)
    reach = 3 + 8 * torch.rand(images, count, 4, generator=generator)
    boxes = torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], -1)
    logits = torch.randn(images, count, 2, generator=generator) * sharpness
    quality = torch.randn(images, count, generator=generator)
    return Output(logits, boxes, quality, centres, torch.full((count,), 8.0))


def framed(task: Segmentation | Detection, sizes: list[tuple[int, int]]) -> Batch:
    batch, failures = task.collate(table_of(sizes), train=False, seed=0)
    assert not failures
    return batch


def logits_of(images: int, size: tuple[int, int], seed: int, sharpness: float = 2.0) -> Tensor:
    return torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(seed)) * sharpness


def as_rows(task: Segmentation | Detection, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Through the Arrow schema, as they are written."""
    wanted = schema.PREDICTIONS[task.name]
    table = pa.Table.from_pydict(columns, schema=pa.schema([wanted.field(name) for name in columns]))
    return table.to_pylist()
