"""What detectors say before any threshold or suppression, whatever their kind."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.uncertainty.measures import add_background_class


class Detections(Protocol):
    """N images, L locations (cells, anchors, proposals), K classes."""

    fixed: ClassVar[bool]
    """Whether location l of every image and every member is the same place, so that members can be pooled there."""

    @property
    def boxes(self) -> Tensor:
        """(N, L, 4) float32 x1, y1, x2, y2 in input pixels, not clipped."""
        ...

    @property
    def centres(self) -> Tensor:
        """(L, 2), or (N, L, 2) where not ``fixed``: float32 x, y of the locations in input pixels."""
        ...

    @property
    def strides(self) -> Tensor:
        """(L,) float32 pixels between neighbours at the location's level; 0 where not ``fixed``."""
        ...

    def probabilities(self) -> Tensor:
        """(N, L, K + 1) float32 class vectors that sum to 1, the last "none of these"."""
        ...

    def scores(self) -> Tensor:
        """(N, L, K) float32 in 0..1: what boxes are ranked by."""
        ...


class DetectionOutput(NamedTuple):
    """Outputs of a one-stage detector with sigmoid class scores and, perhaps, a quality."""

    logits: Tensor
    """(N, L, K) class logits (sigmoid)."""
    boxes: Tensor
    """(N, L, 4) float32 x1, y1, x2, y2 in input pixels, not clipped; differentiable."""
    quality: Tensor | None
    """(N, L) logits of the IoU between the location's box and the object; None: the head predicts none."""
    centres: Tensor
    """(L, 2) float32 x, y of the locations in input pixels."""
    strides: Tensor
    """(L,) float32 pixels between neighbours at the location's level."""

    fixed = True  # pyright: ignore[reportGeneralTypeIssues]

    def probabilities(self) -> Tensor:
        """Existence is the best class's score, shared out among the classes; see ``add_background_class``."""
        return add_background_class(self.logits.float().sigmoid())

    def scores(self) -> Tensor:
        """(N, L, K) float32 class probability, times quality where there is one."""
        classes = self.logits.float().sigmoid()
        return classes if self.quality is None else classes * self.quality.float().sigmoid()[..., None]


class SoftmaxOutput(NamedTuple):
    """Outputs of a one-stage detector whose classes exclude each other and share their mass with a background."""

    logits: Tensor
    """(N, L, K + 1) logits (softmax), the last "none of these"."""
    boxes: Tensor
    """(N, L, 4) float32 x1, y1, x2, y2 in input pixels, not clipped; differentiable."""
    centres: Tensor
    """(L, 2) float32 x, y of the locations in input pixels."""
    strides: Tensor
    """(L,) float32 pixels between neighbours at the location's level."""

    fixed = True  # pyright: ignore[reportGeneralTypeIssues]

    def probabilities(self) -> Tensor:
        """(N, L, K + 1) float32 softmax of the logits."""
        return self.logits.float().softmax(-1)

    def scores(self) -> Tensor:
        """(N, L, K) float32 softmax of the logits, without the background."""
        return torch.softmax(self.logits.float(), -1)[..., :-1]


def num_outputs(task: str, classes: Sequence[str], background: int | None) -> int:
    """Classes that a model tells apart: detectors have none for a background at the end of the list.

    Args:
        task: ``segmentation`` or ``detection``.
        classes: Names in label order.
        background: Label of the implicit background, if there is one.
    """
    if task == "detection" and background == len(classes) - 1:
        return len(classes) - 1
    return len(classes)
