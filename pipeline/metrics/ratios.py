"""Ratios of counts, and means over those that are defined; NaN marks what is not.

IoU, precision, recall, F1 and calibration errors are all one count divided by another.
"""

import numpy as np
from numpy.typing import ArrayLike


def ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    """``part / whole`` elementwise, float64; NaN where the whole is 0."""
    result = np.full(np.shape(whole), np.nan)
    return np.divide(part, whole, out=result, where=np.asarray(whole) > 0)


def mean_of_defined(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over ``axis`` of the finite values; NaN where none is finite."""
    defined = np.isfinite(values)
    return ratio(np.where(defined, values, 0).sum(axis), defined.sum(axis))


def mean_or_nan(values: np.ndarray) -> float:
    """Mean of (n,) values, in numpy's pairwise summation; NaN of none."""
    return float(values.mean()) if len(values) else float("nan")


def mean_iou(inter: np.ndarray, union: np.ndarray, background: int | None) -> np.ndarray:
    """Mean over classes of intersection over union, without the background.

    Args:
        inter: (..., C) pixels in both.
        union: (..., C) pixels in either.
        background: Class id left out, if there is one.

    Returns:
        (...) float64 over the classes whose union is not empty; NaN where there is no such class.
    """
    iou_per_class = ratio(inter, union)
    if background is not None:
        iou_per_class = np.delete(iou_per_class, background, axis=-1)
    return mean_of_defined(iou_per_class)
