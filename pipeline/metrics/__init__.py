"""The metrics by task: state is a few arrays that add, so the parts of a dataset merge in any order.

segmentation: ``SegmentationMetric``, figures from counts over all pixels
pixels: the counts of one image's pixels, on the device of its probabilities
detection: ``DetectionMetric``, figures from the detections and true boxes of all images
detection_rows: what is kept of an image of detection, and its detections matched with the true boxes
matching: COCO's greedy matching of one image
coco_match: COCO's greedy matching of all images, at all sizes and thresholds
detection_precision: average precision, also with a weight for each image
detection_calibration: LaECE, LRP, D-ECE and log score of the detections' scores
probabilistic: PDQ, and the likelihood of Gaussian box edges
ranking: how well a score ranks: AUROC, average precision, risk-coverage, Spearman
bootstrap: paired bootstrap over the images of segmentation
detection_bootstrap: paired bootstrap over the images of detection
ratios: ratios of counts, and means over those that are defined
plain_json: figures as plain JSON types
"""

from typing import Any, Protocol, Self

import numpy as np

from pipeline.metrics.detection import DetectionMetric
from pipeline.metrics.matching import Match, match
from pipeline.metrics.segmentation import SegmentationMetric

__all__ = ["METRICS", "DetectionMetric", "Match", "Metric", "SegmentationMetric", "match"]


class Metric(Protocol):
    """What every metric offers beside ``update``, whose arguments differ by task."""

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
