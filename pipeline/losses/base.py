"""What a detection loss is: settings that, called, give terms."""

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from pipeline.config import Settings

Term = tuple[float, Tensor, Tensor]
"""Weight, sum, count: the loss is Σ weight * sum / count, the count taken over ranks and accumulation."""


class BoxLoss(Settings):
    """Settings of a detection loss; ``DETECTION_LOSSES`` lists its kinds."""

    terms: ClassVar[tuple[str, ...]]
    """Names of its terms."""
    takes_targets: ClassVar[bool] = False
    """Whether the model is asked with its targets, ``model(images, boxes, labels)``, since it samples by them."""

    @abstractmethod
    def counts(self, labels: Tensor, crowd: Tensor | None) -> dict[str, Tensor]:
        """What each term is divided by, of targets alone: float32 scalars, a tensor of its own each.

        Args:
            labels: (N, B) int64; -1 = padding.
            crowd: (N, B) bool; None: no crowds.
        """

    @abstractmethod
    def __call__(self, output: Any, boxes: Tensor, labels: Tensor, crowd: Tensor | None) -> dict[str, Term]:
        """Each term's (weight, sum, count).

        Args:
            output: A model's raw outputs.
            boxes: (N, B, 4) float32 xyxy in input pixels, padded; B may be 0.
            labels: (N, B) int64; -1 = padding.
            crowd: (N, B) bool; None: no crowds.
        """


def objects(labels: Tensor, crowd: Tensor | None) -> Tensor:
    """(N, B) bool: boxes that are objects, neither padding (label -1) nor crowd regions."""
    real = labels >= 0
    return real if crowd is None else real & ~crowd
