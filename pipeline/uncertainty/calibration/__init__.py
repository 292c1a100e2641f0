"""What doubt is worth: calibration of probabilities, scores and spreads, and the review threshold with its promise."""

from pipeline.uncertainty.calibration.box_sample import BoxRows, BoxSample
from pipeline.uncertainty.calibration.isotonic import apply_isotonic, apply_spread, fit_isotonic, fit_spread
from pipeline.uncertainty.calibration.pixel_sample import PixelSample
from pipeline.uncertainty.calibration.review_threshold import ReviewThreshold, fit_review_threshold
from pipeline.uncertainty.calibration.temperature import Calibration, Kind, apply_temperature, fit_temperature

__all__ = [
    "BoxRows",
    "BoxSample",
    "Calibration",
    "Kind",
    "PixelSample",
    "ReviewThreshold",
    "apply_temperature",
    "apply_isotonic",
    "apply_spread",
    "fit_temperature",
    "fit_isotonic",
    "fit_spread",
    "fit_review_threshold",
]
