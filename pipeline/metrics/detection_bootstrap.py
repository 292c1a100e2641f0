"""Is the difference of two detectors on the same images more than chance: paired bootstrap over images.

As ``pipeline.metrics.bootstrap``: Efron 1979 (10.1214/aos/1176344552), percentile interval, the same images drawn for
all. Boxes are matched and sorted once; a draw weighs the images. Boxes of equal score are ranked by image, and the
copies of one image together, so that a draw's ties fall a little otherwise than by evaluating it anew.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.errors import InputError
from pipeline.metrics.bootstrap import draw_weights
from pipeline.metrics.detection import DetectionMetric
from pipeline.metrics.detection_calibration import laece, laece_sums
from pipeline.metrics.detection_precision import average_precision, rank_detections
from pipeline.metrics.detection_rows import LOW_IOU

FIGURES = ("map", "map50", "laece")
"""What is compared; the smaller the better for the last."""

Interval = dict[str, float | None]


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
    for k, other in enumerate(image_ids[1:]):
        if other != image_ids[0]:
            raise InputError(
                f"a paired comparison wants the same images of all: found {len(image_ids[0])} and {len(other)} images, "
                f"or other ids, in member {k}; evaluate all on one split"
            )
    num_images = len(image_ids[0])
    weights = np.concatenate([np.ones((1, num_images)), draw_weights(np.random.default_rng(seed), draws, num_images)])
    if not num_images:
        weights = np.zeros((draws + 1, 0))
    pool_figures, *member_figures = (figures(metric, weights) for metric in (pool, *members))
    mean_figures = {name: np.mean([other[name] for other in member_figures], axis=0) for name in FIGURES}
    return {
        "over_mean_member": _intervals(pool_figures, mean_figures),
        "over_chosen_member": {} if chosen is None else _intervals(pool_figures, member_figures[chosen]),
    }


def figures(metric: DetectionMetric, weights: np.ndarray) -> dict[str, np.ndarray]:
    """``FIGURES`` of weighted images.

    Args:
        metric: Of N images.
        weights: (D, N) float64: how often each image, in the order of ids, is there.

    Returns:
        (D,) float64 each; NaN where not defined.
    """
    precision = np.stack(
        [average_precision(rows, weights) for rows in rank_detections(metric.images(), metric.num_classes)]
    )
    sums = laece_sums(metric.matched(), LOW_IOU, by_image=True)
    gaps, counts = (np.tensordot(weights, each, 1) for each in sums)
    return {
        "map": _mean_over_classes(precision.mean(1)),
        "map50": _mean_over_classes(precision[:, 0]),
        "laece": laece(gaps, counts),
    }


def map_of(metric: DetectionMetric) -> Callable[[np.ndarray], np.ndarray]:
    """(D, N) weights of the images, in the order of ids -> (D,) mAP of the weighted images; boxes are sorted once."""
    detections = rank_detections(metric.images(), metric.num_classes)
    return lambda weights: _mean_over_classes(
        np.stack([average_precision(rows, weights) for rows in detections]).mean(1)
    )


def _mean_over_classes(each: np.ndarray) -> np.ndarray:
    """(K, D) -> (D,) over the classes that have true boxes; NaN without."""
    known = np.isfinite(each)
    number = known.sum(0)
    total = np.where(known, each, 0).sum(0)
    return np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)


def _intervals(minuend: dict[str, np.ndarray], subtrahend: dict[str, np.ndarray]) -> dict[str, Interval]:
    return {name: _interval(minuend[name] - subtrahend[name]) for name in FIGURES}


def _interval(values: np.ndarray) -> Interval:
    """The first value is of the images as they are, the others of draws."""
    difference, drawn = values[0], values[1:][np.isfinite(values[1:])]
    if not np.isfinite(difference) or not len(drawn):
        return {"difference": None, "low": None, "high": None}
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"difference": float(difference), "low": float(low), "high": float(high)}
