"""What doubt is worth: calibration of probabilities, scores and spreads, and the review threshold with its promise.

settings: which calibration, and the promise that is asked for
temperature: temperature and vector scaling of pixel probabilities
isotonic: a box's score -> precision, its spread -> size of real errors
pixel_sample: a streamed sample of pixels to fit on
box_sample: a streamed sample of boxes to fit on
review_threshold: the score from which images go to review, as a promise about risk
"""

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
