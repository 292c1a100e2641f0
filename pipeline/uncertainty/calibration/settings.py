"""Settings of a calibration."""

from typing import Literal

from pydantic import Field

from pipeline.config import Settings


class CalibrateSettings(Settings):
    """What is made of the ``calibration`` split, where the dataset has one."""

    kind: Literal["auto", "temperature", "vector", "isotonic", "none"] = "auto"
    """Segmentation: one temperature for all classes (``auto``), or a scale and a bias for each. Detection: score to
    precision by isotonic regression (``auto``), and the spread of boxes to the size of their errors."""
    risk: float | None = Field(default=None, gt=0, lt=1)
    """Promise of the review threshold: accepted images have a mean loss (1 - IoU, or 1 - F1 of boxes at IoU 0.5) of
    at most this; null: no threshold."""
    delta: float = Field(default=0.1, gt=0, lt=1)
    """Probability, over draws of the calibration split, that the promise is broken."""
