"""Small images with labels, and boxes found in others, for the metrics' tests."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.metrics import DetectionMetric, SegmentationMetric
from pipeline.schema import VOID

CLASSES = 4
BACKGROUND = 3

Item = tuple[torch.Tensor, torch.Tensor, str, float]


def pixels(seed: int, images: int = 5, sharpness: float = 2.0) -> list[Item]:
    """(probabilities (4, H, W), target with a fifth void, id, score): the truth is often the likeliest class.

    Class 2 is never true; the last image's score is not known.
    """
    generator = torch.Generator().manual_seed(seed)
    out = []
    for n in range(images):
        shape = (6 + n, 9)
        logits = torch.randn(CLASSES, *shape, generator=generator) * sharpness
        target = torch.tensor([0, 1, 3], dtype=torch.uint8)[torch.randint(0, 3, shape, generator=generator)]
        logits.scatter_add_(0, target.long()[None], torch.full((1, *shape), sharpness))
        target[torch.rand(shape, generator=generator) < 0.2] = VOID
        score = float(torch.rand((), generator=generator)) if n < images - 1 else float("nan")
        out.append((logits.softmax(0), target, f"image-{n}", score))
    return out


def segmentation(items: Iterable[Item], background: int | None = BACKGROUND) -> SegmentationMetric:
    metric = SegmentationMetric(CLASSES, background)
    for item in items:
        metric.update(*item)
    return metric


def flat(items: Iterable[Item]) -> tuple[np.ndarray, np.ndarray]:
    """(C, n) float64 and (n,) of everything labelled."""
    kept = [(p[:, t != VOID].numpy(), t[t != VOID].numpy()) for p, t, *_ in items]
    return np.concatenate([p for p, _ in kept], 1).astype(np.float64), np.concatenate([t for _, t in kept])


def check_equal(got: Any, wanted: Any, rel: float = 1e-12) -> None:
    """The same nested figures to ``rel``, null for null."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for name in wanted:
            check_equal(got[name], wanted[name], rel)
    elif isinstance(wanted, list):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            check_equal(one, other, rel)
    elif wanted is None:
        assert got is None
    else:
        assert got == pytest.approx(wanted, rel=rel, abs=1e-15)


def box_images(
    seed: int, images: int, classes: int, most: int = 8, grid: float = 0.0, crowds: float = 0.15
) -> list[dict]:
    """What ``DetectionMetric.update`` takes: boxes near true ones, beside them, several on one; some images empty.

    ``grid`` rounds all corners to its multiples, so that overlaps tie; scores always tie here and there.
    """
    rng = np.random.default_rng(seed)
    out = []
    for n in range(images):
        true = int(rng.integers(0, most)) * int(rng.random() > 0.15)
        corner, size = (
            rng.uniform(0, 100, (true, 2)),
            rng.choice([8.0, 30.0, 120.0], (true, 1)) * rng.uniform(0.7, 1.3, (true, 2)),
        )
        boxes = np.concatenate([corner, corner + size], 1)
        labels = rng.integers(0, classes, true)
        picks = rng.integers(0, true, rng.integers(0, 12)) if true else np.zeros(0, int)
        near = (
            boxes[picks] + rng.normal(0, 0.08, (len(picks), 4)) * (boxes[picks, 2:] - boxes[picks, :2])[:, [0, 1, 0, 1]]
        )
        stray = rng.uniform(0, 60, (rng.integers(0, 4), 4)) + [0, 0, 60, 60]
        found = np.concatenate([near, stray])
        if grid:
            boxes, found = (np.round(each / grid) * grid for each in (boxes, found))
        names = np.where(rng.random(len(found)) < 0.85, np.concatenate([labels[picks], np.zeros(len(stray), int)]), 0)
        vectors = rng.dirichlet(np.ones(classes + 1), len(found)).astype(np.float32)
        out.append(
            {
                "image_id": f"image-{n:03d}",
                "boxes": found.astype(np.float32),
                "scores": (rng.integers(1, 20, len(found)) / 20).astype(np.float32),
                "labels": names,
                "true_boxes": boxes.astype(np.float32),
                "true_labels": labels,
                "crowd": rng.random(true) < crowds,
                "std": rng.uniform(0, 4, (len(found), 4)).astype(np.float32),
                "probabilities": vectors,
                "uncertainty": float(rng.random()) if n else float("nan"),
            }
        )
    return out


def detection(images: Iterable[dict], classes: int, operating: float = 0.3) -> DetectionMetric:
    metric = DetectionMetric(classes, operating)
    for image in images:
        metric.update(**image)
    return metric


def scattered_boxes(rng: np.random.Generator, number: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """(boxes (n, 4) of sides 20 to 60 pixels, labels of three classes), at any place within ``spread`` pixels."""
    corner = rng.uniform(0, spread, (number, 2))
    return np.concatenate([corner, corner + rng.uniform(20, 60, (number, 2))], 1), rng.integers(0, 3, number)
