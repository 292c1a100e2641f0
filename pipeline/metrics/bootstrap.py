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

_SUMMED_COLUMNS = {"iou": ("inter", "union"), "nll": ("nll", "pixels"), "brier": ("brier", "pixels")}
_MAX_WEIGHTS = 2**22
"""Weights held at a time, in numbers."""


def paired(
    a_rows: Rows, b_rows: Rows, figure: Figure, resamples: int = 2000, seed: int = 0, background: int | None = None
) -> dict[str, float | None]:
    """Figure of ``a`` minus that of ``b``, with its 95 % interval.

    Args:
        a_rows: ``SegmentationMetric.images_table()`` of one model.
        b_rows: That of another, of the same images.
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
) -> dict[str, float | None]:
    """Figure of ``a`` minus the mean of the figures of several models; arguments as for ``paired``."""
    images = len(a_rows["ids"])
    for k, rows in enumerate(b_rows):
        if not np.array_equal(rows["ids"], a_rows["ids"]):
            raise InputError(
                f"a paired comparison wants both tables of the same images, sorted by id: found {images} and "
                f"{len(rows['ids'])} images, or other ids, in table {k}; evaluate both on one split"
            )
    tables = [_summed_columns(rows, figure) for rows in (a_rows, *b_rows)]
    difference = _difference(np.ones((1, images)), tables, figure, background)[0]
    rng = np.random.default_rng(seed)
    chunk = max(1, _MAX_WEIGHTS // max(1, images))
    draws = [
        _difference(draw_weights(rng, min(chunk, resamples - start), images), tables, figure, background)
        for start in range(0, resamples, chunk)
    ]
    values = np.concatenate(draws)
    values = values[np.isfinite(values)]
    if not np.isfinite(difference) or not len(values):
        return {"difference": None, "low": None, "high": None}
    low, high = np.percentile(values, [2.5, 97.5])
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
        ids: Of each side's images, sorted.
        sides: (D, N) weights of images -> (D,) figure, NaN where it is not defined.
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
    images, rng = len(ids[0]), np.random.default_rng(seed)
    chunk = max(1, _MAX_WEIGHTS // max(1, images))
    values = [sides[0](np.ones((1, images))) - sides[1](np.ones((1, images)))]
    for start in range(0, resamples, chunk) if images else ():
        weights = draw_weights(rng, min(chunk, resamples - start), images)
        values.append(sides[0](weights) - sides[1](weights))
    return np.concatenate(values)


def _summed_columns(rows: Rows, figure: Figure) -> tuple[np.ndarray, np.ndarray]:
    """What is summed over images, as (n, 1 or C) float64: exact for counts of pixels."""
    first, second = (np.asarray(rows[name], np.float64) for name in _SUMMED_COLUMNS[figure])
    return (first, second) if first.ndim == 2 else (first[:, None], second[:, None])


def draw_weights(rng: np.random.Generator, resamples: int, images: int) -> np.ndarray:
    """(resamples, images) float64: how often each image is drawn."""
    picks = rng.integers(0, max(1, images), (resamples, images))
    flat_index = (picks + np.arange(resamples)[:, None] * images).ravel()
    return np.bincount(flat_index, minlength=resamples * images).reshape(resamples, images).astype(np.float64)


def _difference(
    weights: np.ndarray, tables: list[tuple[np.ndarray, np.ndarray]], figure: Figure, background: int | None
) -> np.ndarray:
    """(resamples,) the first table's figure minus the mean of the others'."""
    sums = [(weights @ first, weights @ second) for first, second in tables]
    left_out = background if figure == "iou" else None
    first, *others = (mean_iou(upper, lower, left_out) for upper, lower in sums)
    return first - np.mean(others, axis=0)
