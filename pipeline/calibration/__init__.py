"""What doubt is worth: calibration of probabilities, scores and spreads, and the review threshold with its promise."""

from pipeline.calibration.box_sample import BoxRows, BoxSample
from pipeline.calibration.isotonic import apply_isotonic, apply_spread, fit_isotonic, fit_spread
from pipeline.calibration.promise import Threshold, review_threshold
from pipeline.calibration.sample import PixelSample
from pipeline.calibration.scaling import Calibration, Kind, apply, fit

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
