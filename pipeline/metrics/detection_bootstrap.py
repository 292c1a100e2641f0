"""Is the difference of two detectors on the same images more than chance: paired bootstrap over images.

As ``pipeline.metrics.bootstrap``: Efron 1979 (10.1214/aos/1176344552), percentile interval, the same images drawn for
all. Detections are matched and sorted once; a draw weighs the images. Detections of equal score are ranked by image,
and the copies of one image together, so that a draw's ties fall a little otherwise than by evaluating it anew.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.errors import InputError
from pipeline.metrics.bootstrap import Interval, draw_weights, percentile_interval
from pipeline.metrics.detection import DetectionMetric
from pipeline.metrics.detection_calibration import laece, laece_sums
from pipeline.metrics.detection_precision import average_precision, rank_detections
from pipeline.metrics.detection_rows import LOW_IOU
from pipeline.metrics.ratios import mean_of_defined

FIGURES = ("map", "map50", "laece")
"""What is compared; the smaller the better for the last."""


def paired(
    pool: DetectionMetric, members: Sequence[DetectionMetric], chosen: int | None, draws: int = 500, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """``FIGURES`` of the pool minus those of its members, with 95 % intervals.

    Args:
        pool: Of some images.
        members: Of the same images, at least one.
        chosen: The member that somebody without an ensemble would use; None: not known.
        draws: How often images are drawn again, at least once.
        seed: Of the draws; the same seed draws the same images.

    Returns:
        ``over_mean_member`` and ``over_chosen_member``: by figure ``{difference, low, high}``, null where it is not
        defined; a draw in which it is not is left out. The second is empty without ``chosen``.

    Raises:
        InputError: The metrics are not of the same images.
    """
    image_ids = [[image.id for image in metric.images()] for metric in (pool, *members)]
    for k, member_ids in enumerate(image_ids[1:]):
        if member_ids != image_ids[0]:
            raise InputError(
                f"a paired comparison wants the same images of all: found {len(image_ids[0])} and {len(member_ids)} "
                f"images, or other ids, in member {k}; evaluate all on one split"
            )
    num_images = len(image_ids[0])
    # The first row weighs the images as they are, the others are the draws: one pass gives both.
    drawn = draw_weights(np.random.default_rng(seed), draws, num_images)
    weights = np.concatenate([np.ones((1, num_images)), drawn])
    pool_figures, *member_figures = (figures(metric, weights) for metric in (pool, *members))
    mean_figures = {name: np.mean([values[name] for values in member_figures], axis=0) for name in FIGURES}
    return {
        "over_mean_member": _intervals(pool_figures, mean_figures),
        "over_chosen_member": {} if chosen is None else _intervals(pool_figures, member_figures[chosen]),
    }


def figures(metric: DetectionMetric, weights: np.ndarray) -> dict[str, np.ndarray]:
    """``FIGURES`` of weighted images.

    Args:
        metric: Of N images.
        weights: (D, N) float64: how often each image counts, in the order of ids.

    Returns:
        (D,) float64 by figure; NaN where not defined.
    """
    by_class = rank_detections(metric.images(), metric.num_classes)
    # (K, 10 thresholds, D)
    precision = np.stack([average_precision(detections, weights) for detections in by_class])
    gaps, counts = laece_sums(metric.matched(), LOW_IOU, by_image=True)
    return {
        "map": mean_of_defined(precision.mean(1), axis=0),
        "map50": mean_of_defined(precision[:, 0], axis=0),
        "laece": laece(np.tensordot(weights, gaps, 1), np.tensordot(weights, counts, 1)),
    }


def map_of(metric: DetectionMetric) -> Callable[[np.ndarray], np.ndarray]:
    """(D, N) weights of the images, in the order of ids -> (D,) mAP of the weighted images; boxes are sorted once."""
    by_class = rank_detections(metric.images(), metric.num_classes)

    def weighted_map(weights: np.ndarray) -> np.ndarray:
        precision = np.stack([average_precision(detections, weights) for detections in by_class])
        return mean_of_defined(precision.mean(1), axis=0)

    return weighted_map


def _intervals(minuend: dict[str, np.ndarray], subtrahend: dict[str, np.ndarray]) -> dict[str, Interval]:
    """Of each figure the difference of two sides, (1 + draws,) each, of which the first is no draw."""
    differences = {name: minuend[name] - subtrahend[name] for name in FIGURES}
    return {name: percentile_interval(values[0], values[1:]) for name, values in differences.items()}
