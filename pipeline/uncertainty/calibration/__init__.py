"""What doubt is worth: calibration of probabilities, scores and spreads, and the review threshold with its promise."""

from pipeline.uncertainty.calibration.box_sample import BoxRows, BoxSample
from pipeline.uncertainty.calibration.isotonic import apply_isotonic, apply_spread, fit_isotonic, fit_spread
from pipeline.uncertainty.calibration.pixel_sample import PixelSample
from pipeline.uncertainty.calibration.review_threshold import Threshold, review_threshold
from pipeline.uncertainty.calibration.temperature import Calibration, Kind, apply, fit

__all__ = [
    "BoxRows",
    "BoxSample",
    "Calibration",
    "Kind",
    "PixelSample",
    "Threshold",
    "apply",
    "apply_isotonic",
    "apply_spread",
    "fit",
    "fit_isotonic",
    "fit_spread",
    "review_threshold",
]
