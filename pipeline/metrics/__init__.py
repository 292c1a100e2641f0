"""The metrics by task: state is a few arrays that add, so the parts of a dataset merge in any order."""

from typing import Any, Protocol, Self

import numpy as np

from pipeline.metrics.detection import DetectionMetric
from pipeline.metrics.matching import Match, match
from pipeline.metrics.segmentation import SegmentationMetric

__all__ = ["METRICS", "DetectionMetric", "Match", "Metric", "SegmentationMetric", "match"]


class Metric(Protocol):
    """What every metric offers beside its own ``update``."""

    def merge(self, other: Self, /) -> None:
        """Add what ``other`` has counted; ``other`` is not changed."""
        ...

    def compute(self) -> dict[str, Any]:
        """The figures, of plain JSON types; null where nothing was counted."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Everything counted so far, as arrays that ``numpy.savez`` writes without pickle."""
        ...

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """The inverse of ``state``."""
        ...


METRICS: dict[str, type[SegmentationMetric] | type[DetectionMetric]] = {
    "segmentation": SegmentationMetric,
    "detection": DetectionMetric,
}
