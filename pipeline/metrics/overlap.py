"""Intersection over union from counts of pixels."""

import numpy as np


def iou(inter: np.ndarray, union: np.ndarray) -> np.ndarray:
    """``inter / union`` elementwise, float64; NaN where the union is empty."""
    out = np.full(np.shape(union), np.nan)
    return np.divide(inter, union, out=out, where=np.asarray(union) > 0)


def mean_iou(inter: np.ndarray, union: np.ndarray, background: int | None) -> np.ndarray:
    """Mean of ``iou`` over classes that are shown, without the background.

    Args:
        inter: (..., C).
        union: (..., C).
        background: Class id left out, if there is one.

    Returns:
        (...) float64; NaN where no such class is shown.
    """
    each = iou(inter, union)
    if background is not None:
        each = np.delete(each, background, axis=-1)
    shown = np.isfinite(each)
    total, number = np.where(shown, each, 0).sum(-1), shown.sum(-1)
    return np.divide(total, number, out=np.full(np.shape(total), np.nan), where=number > 0)
