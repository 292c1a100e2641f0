"""Calibration of boxes: scores to the precision they have, and spreads to the size of the errors."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

MIN_SLOPE = 0.01
"""The least slope of the map: scores that differ stay different, and average precision what it was."""
_MAX_BLOCKS = 100
"""Blocks of the regression that the map keeps at most, or steps of one hundredth."""
_MIN_RELATIVE_WEIGHT = 1e-12
"""Rows that weigh less than this share of the largest weight are left out."""
_LIMITS = ((1e-3, 20.0), (1e-4, 1.0))
"""Lowest and highest ``scale``, and ``floor``. A spread below a ten thousandth of the box is none that
anybody measures."""


def fit_isotonic(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> dict[str, list[float]]:
    """Score -> mean target by isotonic regression (Zadrozny & Elkan 2002, 10.1145/775047.775151).

    Targets are 0 or 1 for precision, and precision times IoU where members of different kinds are to be compared
    (MoCaE: Oksuz et al. 2024, arXiv 2309.14976). The map is ``f(x) = m x + (1 - m) h(x)``, m = ``MIN_SLOPE``: h is
    the isotonic regression of ``(target - m x) / (1 - m)`` cut to 0..1, so f is the least-squares fit among the maps
    within 0..1 that rise by at least m. h is drawn piecewise linear through the centres of its blocks (mean score,
    mean value), and level outside the outermost. More than 100 blocks: those within one hundredth are one.

    Args:
        scores: (n,) in 0..1.
        targets: (n,) in 0..1.
        weights: (n,); None: all 1. Rows that weigh nothing, or are no numbers, are left out.

    Returns:
        ``{"x": [...], "y": [...]}``: knots, x rising from 0 to 1, y rising within 0..1; of no row, the identity.
    """
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    use = np.isfinite(scores) & np.isfinite(targets) & np.isfinite(weights)
    use &= weights > _MIN_RELATIVE_WEIGHT * weights[use].max(initial=0)
    if not use.any():
        return {"x": [0.0, 1.0], "y": [0.0, 1.0]}
    from scipy.optimize import isotonic_regression  # here, since scipy is slow to import

    # One row a score: rows of one score must have one value, whatever their order.
    x, row_of_score = np.unique(scores[use].clip(0, 1), return_inverse=True)
    weight = np.bincount(row_of_score, weights[use])
    target = np.bincount(row_of_score, weights[use] * targets[use]) / weight
    # The regression is of what the slope leaves over, so that the map with the slope is the least-squares one.
    regression = isotonic_regression((target - MIN_SLOPE * x) / (1 - MIN_SLOPE), weights=weight)
    block_starts = regression.blocks[:-1]
    centres = _run_means(x, weight, block_starts)[0]
    values = regression.x[block_starts].clip(0, 1)
    if len(values) > _MAX_BLOCKS:
        # Blocks within one hundredth become one, at their mean.
        mass = np.add.reduceat(weight, block_starts)
        starts = np.flatnonzero(np.diff(np.floor(values * _MAX_BLOCKS), prepend=-1))
        centres, values = _run_means(centres, mass, starts)[0], _run_means(values, mass, starts)[0]
    # Level outside the outermost centres.
    ends_x = np.array([0.0, *centres.clip(0, 1), 1.0])
    ends_y = np.array([values[0], *values, values[-1]])
    # A block's centre may be 0 or 1 itself, or within rounding of its neighbour's.
    kept = np.flatnonzero(np.diff(np.maximum.accumulate(ends_x), prepend=-1.0) > 0)
    knots, level = ends_x[kept], ends_y[kept]
    return {"x": knots.tolist(), "y": (MIN_SLOPE * knots + (1 - MIN_SLOPE) * level).clip(0, 1).tolist()}


def _run_means(values: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means of runs that begin at ``starts``, and their weights."""
    total = np.add.reduceat(weights, starts)
    return np.add.reduceat(values * weights, starts) / total, total


def apply_isotonic(parameters: dict[str, Any] | None, scores: Tensor) -> Tensor:
    """Scores (...) of any shape through the map, on their device and of their type; None: as they are.

    Rising and within 0..1; scores outside 0..1 count as 0 or 1. Computed in float64: float32 scores less than 1e-5
    apart can still come out equal where the map is flattest.
    """
    if parameters is None:
        return scores
    x, y = (torch.tensor(parameters[name], dtype=torch.float64).to(scores.device) for name in ("x", "y"))
    values = scores.double().clamp(0, 1).contiguous()
    right = torch.searchsorted(x, values, right=True).clamp(1, len(x) - 1)
    x0, x1, y0, y1 = x[right - 1], x[right], y[right - 1], y[right]
    return (y0 + (y1 - y0) * ((values - x0) / (x1 - x0)).clamp(0, 1)).to(scores.dtype)


def fit_spread(std: np.ndarray, error: np.ndarray, size: np.ndarray) -> dict[str, float]:
    """The Gaussian of variance ``(scale std)² + (floor size)²`` that makes the errors of edges most likely.

    ``scale`` corrects the spread of members, ``floor`` adds the error that they have in common, as a share of the
    box. L-BFGS on both logarithms from three starts. Nothing is trimmed: boxes are matched from IoU 0.5 on, so no
    error exceeds its box's size, and gross ones within that belong to what the spread has to cover; one in n
    adds at most ``1 / n`` to the mean of (error / size)².

    Args:
        std: (n, 4) pixels; NaN (one vote: not known) counts as 0, so ``floor`` alone covers those.
        error: (n, 4) pixels, predicted minus true edge.
        size: (n, 4) pixels, width or height: whichever the coordinate lies along.

    Returns:
        ``{"scale": a, "floor": b}``; without a row that has a size and finite errors, the identity (1 and 0).
    """
    std, error, size = (np.asarray(column, np.float64) for column in (std, error, size))
    use = np.isfinite(error) & np.isfinite(size) & (size > 0)
    if not use.any():
        return {"scale": 1.0, "floor": 0.0}
    # By the size of the box: so large images and small ones weigh the same, and the limits mean the same.
    spread = (np.where(np.isfinite(std), std, 0.0)[use] / size[use]) ** 2
    square = (error[use] / size[use]) ** 2

    def objective(logs: np.ndarray) -> tuple[float, np.ndarray]:
        # Mean negative log-likelihood, and its slope by both logarithms.
        scaled, common = math.exp(2 * logs[0]) * spread, math.exp(2 * logs[1])
        variance = scaled + common
        slope = (1 - square / variance) / variance
        value = 0.5 * float(np.mean(np.log(variance) + square / variance))
        return value, np.array([np.mean(slope * scaled), np.mean(slope) * common])

    from scipy.optimize import minimize  # here, since scipy is slow to import

    bounds = [(math.log(low), math.log(high)) for low, high in _LIMITS]
    rms = math.log(float(np.clip(math.sqrt(square.mean()), *_LIMITS[1])))
    # Mostly the members' spread, mostly the common part, and both: the likelihood may have more than one hill.
    starts = [(0.0, rms - 3), (-2.0, rms), (0.0, rms)]
    best = min(
        (
            minimize(objective, np.clip(start, *np.array(bounds).T), jac=True, method="L-BFGS-B", bounds=bounds)
            for start in starts
        ),
        key=lambda optimum: optimum.fun,
    )
    # Members who never differ say nothing of the scale.
    scale = math.exp(best.x[0]) if spread.any() else 1.0
    return {"scale": scale, "floor": math.exp(best.x[1])}


def apply_spread(parameters: dict[str, Any] | None, std: Tensor, size: Tensor) -> Tensor:
    """(..., 4) pixels: ``sqrt((scale std)² + (floor size)²)``, NaN taken as 0; None: ``std`` as it is.

    Args:
        parameters: As ``fit_spread`` gives.
        std: (..., 4) pixels.
        size: (..., 4) pixels, width or height: whichever the coordinate lies along.
    """
    if parameters is None:
        return std
    return torch.hypot(parameters["scale"] * std.nan_to_num(nan=0.0), parameters["floor"] * size)
