"""Is the difference of two models on the same images more than chance: paired bootstrap over images.

Efron 1979 (10.1214/aos/1176344552), percentile interval. Images are drawn again with replacement, the same
ones for both sides, and the dataset's figure is computed from the drawn images' summed counts. The interval
is about other images of the same kind, not about other seeds of training.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from pipeline.errors import InputError
from pipeline.metrics.ratios import mean_iou

Figure = Literal["iou", "nll", "brier"]
Rows = dict[str, np.ndarray]
Interval = dict[str, float | None]
"""``difference, low, high``: a difference and its 95 % interval; None where it is not defined."""

_SUMMED_COLUMNS = {"iou": ("inter", "union"), "nll": ("nll", "pixels"), "brier": ("brier", "pixels")}
"""Columns of which a figure is the ratio of the sums over images."""
_MAX_WEIGHTS = 2**22
"""Weights of images held at a time."""


def paired(
    a_rows: Rows, b_rows: Rows, figure: Figure, resamples: int = 2000, seed: int = 0, background: int | None = None
) -> Interval:
    """Figure of ``a`` minus that of ``b``, with its 95 % interval.

    Args:
        a_rows: ``SegmentationMetric.images_table()`` of one model.
        b_rows: ``images_table()`` of another model, of the same images.
        figure: ``iou``: mean over classes of the dataset's IoU; ``nll``, ``brier``: means over pixels.
        resamples: How often images are drawn again, at least once.
        seed: Of the draws; the same seed draws the same images.
        background: Class id that the mean over classes leaves out.

    Returns:
        ``difference, low, high``: null where nothing was counted; a draw in which the figure is not defined
        is left out.

    Raises:
        InputError: The tables are not of the same images.
    """
    return paired_mean(a_rows, [b_rows], figure, resamples, seed, background)


def paired_mean(
    a_rows: Rows,
    b_rows: Sequence[Rows],
    figure: Figure,
    resamples: int = 2000,
    seed: int = 0,
    background: int | None = None,
) -> Interval:
    """Figure of ``a`` minus the mean of the figures of several models; arguments as for ``paired``."""
    num_images = len(a_rows["ids"])
    for k, rows in enumerate(b_rows):
        if not np.array_equal(rows["ids"], a_rows["ids"]):
            raise InputError(
                f"a paired comparison wants both tables of the same images, sorted by id: found {num_images} and "
                f"{len(rows['ids'])} images, or other ids, in table {k}; evaluate both on one split"
            )
    tables = [_summed_columns(rows, figure) for rows in (a_rows, *b_rows)]
    # Weights of 1 are the images as they are.
    difference = _difference(np.ones((1, num_images)), tables, figure, background)[0]
    rng = np.random.default_rng(seed)
    chunk = max(1, _MAX_WEIGHTS // max(1, num_images))
    draws = [
        _difference(draw_weights(rng, min(chunk, resamples - start), num_images), tables, figure, background)
        for start in range(0, resamples, chunk)
    ]
    return percentile_interval(difference, np.concatenate(draws))


def percentile_interval(difference: float, draws: np.ndarray) -> Interval:
    """``difference, low, high`` with the 2.5 and 97.5 percentiles of the draws (D,) that are defined; else null."""
    defined = draws[np.isfinite(draws)]
    if not np.isfinite(difference) or not len(defined):
        return {"difference": None, "low": None, "high": None}
    low, high = np.percentile(defined, [2.5, 97.5])
    return {"difference": float(difference), "low": float(low), "high": float(high)}


def iou_of(rows: Rows, background: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """(D, N) weights of the images of ``rows`` -> (D,) mean over classes of the weighted dataset's IoU."""
    inter, union = _summed_columns(rows, "iou")
    return lambda weights: mean_iou(weights @ inter, weights @ union, background)


def differences(
    ids: Sequence[np.ndarray], sides: Sequence[Callable[[np.ndarray], np.ndarray]], resamples: int, seed: int
) -> np.ndarray:
    """(1 + resamples,) the first side's figure minus the second's: of the images as they are, then of draws.

    Args:
        ids: The sorted ids of each side's images.
        sides: Two functions, (D, N) weights of images -> (D,) figure, NaN where it is not defined.
        resamples: How often images are drawn again.
        seed: Of the draws.

    Raises:
        InputError: The sides are not of the same images.
    """
    if not np.array_equal(ids[0], ids[1]):
        raise InputError(
            f"a paired comparison wants both sides of the same images: found {len(ids[0])} and {len(ids[1])} images, "
            "or other ids; evaluate both on one split"
        )
    num_images = len(ids[0])
    rng = np.random.default_rng(seed)
    chunk = max(1, _MAX_WEIGHTS // max(1, num_images))
    values = [sides[0](np.ones((1, num_images))) - sides[1](np.ones((1, num_images)))]
    for start in range(0, resamples, chunk) if num_images else ():
        # Both sides see the same draw: what both find hard cancels.
        weights = draw_weights(rng, min(chunk, resamples - start), num_images)
        values.append(sides[0](weights) - sides[1](weights))
    return np.concatenate(values)


def draw_weights(rng: np.random.Generator, resamples: int, num_images: int) -> np.ndarray:
    """(resamples, num_images) float64: how often each image is drawn, with replacement."""
    picks = rng.integers(0, max(1, num_images), (resamples, num_images))
    # One count for all draws: every draw has bins of its own.
    flat_index = (picks + np.arange(resamples)[:, None] * num_images).ravel()
    counts = np.bincount(flat_index, minlength=resamples * num_images)
    return counts.reshape(resamples, num_images).astype(np.float64)


def _summed_columns(rows: Rows, figure: Figure) -> tuple[np.ndarray, np.ndarray]:
    """The two columns whose sums over images make the figure, (n, 1 or C) float64: exact for counts of pixels."""
    upper, lower = (np.asarray(rows[name], np.float64) for name in _SUMMED_COLUMNS[figure])
    if upper.ndim == 2:
        return upper, lower
    return upper[:, None], lower[:, None]


def _difference(
    weights: np.ndarray, tables: list[tuple[np.ndarray, np.ndarray]], figure: Figure, background: int | None
) -> np.ndarray:
    """(resamples,) the first table's figure minus the mean of the others' figures."""
    sums = [(weights @ upper, weights @ lower) for upper, lower in tables]
    # The mean over pixels is the mean over one class, which is no background.
    left_out = background if figure == "iou" else None
    first, *others = (mean_iou(upper, lower, left_out) for upper, lower in sums)
    return first - np.mean(others, axis=0)
