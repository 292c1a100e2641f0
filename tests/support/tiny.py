"""Tiny bundles with random weights, and tiny images, for the tests of what scores them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline import models
from pipeline.datasets import ingest
from pipeline.models import bundle

INPUT = {"size": [32, 32], "fit": "letterbox", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
UNET = {"name": "unet", "width": 4, "depth": 2}
DETECTOR = {"name": "anchor_free", "width": 4, "strides": [8], "head_width": 8}
CLASSES = ["cell", "background"]


def manifest(model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A bundle's manifest, before sizes and digests are added."""
    settings = models.parse(model, "test")
    described = {"task": settings.task, "model": models.describe(settings), "classes": CLASSES}
    return {**described, "background": 1, "input": INPUT, **changes}


def weights(folder: Path, model: dict[str, Any], outputs: int, seed: int) -> Path:
    """A file of random weights that ``seed`` decides."""
    torch.manual_seed(seed)
    path = folder / f"{model['name']}-{seed}.safetensors"
    module = models.parse(model, "test").build(outputs)
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)
    return path


def make_bundle(folder: Path, model: dict[str, Any], seeds: tuple[int, ...] = (0, 1), **changes: Any) -> str:
    """A bundle with a member for each seed; its URI."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = len(changes.get("classes", CLASSES)) - (models.parse(model, "test").task == "detection")
    files = [weights(folder, model, outputs, seed) for seed in seeds]
    return bundle.write_bundle(str(folder / "bundle"), manifest(model, **changes), files).uri


def png(height: int, width: int, seed: int) -> bytes:
    """A noisy colour image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(pixels)


def encode(pixels: np.ndarray) -> bytes:
    """As PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def make_squares(root: Path, splits: dict[str, range], **options: Any) -> str:
    """A dataset of 32x32 images, a bright square on noise in each: masks and boxes; its URI. Ray must be running.

    ``options`` are those of ingest.
    """
    rng = np.random.default_rng(0)
    for n in (number for numbers in splits.values() for number in numbers):
        ids = np.zeros((32, 32), np.uint8)
        ids[4 + n % 5 : 20, 6 : 14 + n % 7] = 1
        noise = rng.integers(0, 90, (32, 32, 3)) + 120 * (ids[..., None] > 0)
        for folder, pixels in (("images", noise), ("labels", ids)):
            path = root / folder / f"image{n:02d}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode(pixels.astype(np.uint8)))
    named = {split: [f"image{n:02d}" for n in numbers] for split, numbers in splits.items()}
    (root / "splits.json").write_text(json.dumps(named))
    ingest.ingest(
        "instances", str(root / "images"), str(root / "labels"), str(root / "dataset"),
        classes=["cell"], splits=str(root / "splits.json"), options=options,
    )  # fmt: skip
    return str(root / "dataset")


def table(images: Sequence[bytes | None], **more: list[Any]) -> pa.Table:
    """Rows as a reading task hands them on."""
    names = [f"image{n}.png" for n in range(len(images))]
    columns = {"image_id": names, "uri": [f"/x/{name}" for name in names], "sha256": ["0" * 64] * len(names)}
    return pa.table({**columns, "image": pa.array(images, pa.binary()), **more})
