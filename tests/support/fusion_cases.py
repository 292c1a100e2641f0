"""Members' boxes of one image, for the tests of fusion."""

import dataclasses

import pytest
import torch
from torch import Tensor

from pipeline.images import boxes as box_ops
from pipeline.uncertainty.box_clusters import Clusters, MemberBoxes
from pipeline.uncertainty.box_fusion import FUSIONS

BOTH = pytest.mark.parametrize("fuse", FUSIONS.values(), ids=FUSIONS)
"""For a test of every way to fuse."""


def member(boxes: list, scores: list, labels: list | None = None, classes: int = 2) -> MemberBoxes:
    """A member sure of its labels."""
    names = torch.tensor(labels or [0] * len(scores), dtype=torch.int64)
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return MemberBoxes(corners, torch.tensor(scores, dtype=torch.float32), names, torch.eye(classes + 1)[names])


def some_members(seed: int, members: int, objects: int = 12, classes: int = 2, noise: int = 4) -> list[MemberBoxes]:
    """Members that see most of the same objects, some boxes of their own, in whole pixels; all scores differ."""
    generator = torch.Generator().manual_seed(seed)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator).float()

    corner, side, label = whole(120, objects, 2), 16 + whole(30, objects, 2), whole(classes, objects).long()
    scores = (1 + torch.randperm(members * objects, generator=generator)) / (members * objects + 1)
    out = []
    for own in scores.split(objects):
        low = corner + whole(noise, objects, 2)
        boxes = torch.cat([low, low + side + whole(noise, objects, 2)], 1)
        seen = (torch.rand(objects, generator=generator) < 0.8).nonzero()[:, 0]
        vectors = (2 * torch.randn(objects, classes + 1, generator=generator)).softmax(1)
        out.append(MemberBoxes(boxes[seen], own[seen], label[seen], vectors[seen]))
    return out


def suppressed(one: MemberBoxes, iou: float = 0.0) -> MemberBoxes:
    """Without two overlapping boxes of one class, the best first."""
    at = box_ops.batched_nms(one.boxes, one.scores, one.labels, iou)
    return MemberBoxes(one.boxes[at], one.scores[at], one.labels[at], one.probabilities[at])


def same(a: Clusters, b: Clusters, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    for field in dataclasses.fields(Clusters):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        torch.testing.assert_close(
            mine, other, atol=atol, rtol=rtol, equal_nan=True, msg=lambda m, n=field.name: f"{n}: {m}"
        )
