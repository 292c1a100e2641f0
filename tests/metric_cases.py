"""Small images with labels for the metrics' tests."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.metrics import SegmentationMetric
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
