"""What doubt is worth: calibration of the pool's probabilities, and the review threshold with its promise."""

from pipeline.calibration.promise import Threshold, review_threshold
from pipeline.calibration.sample import PixelSample
from pipeline.calibration.scaling import Calibration, Kind, apply, fit

__all__ = ["Calibration", "Kind", "PixelSample", "Threshold", "apply", "fit", "review_threshold"]
