"""Boxes as distributions: each edge a Gaussian of its own. PDQ, likelihood, and CRPS.

PDQ is probability-based detection quality (Hall et al. 2020, 1811.10800). The heat map of a box is the probability
that a pixel belongs to it; with independent edges it is an outer product of two profiles, each a product of two
Gaussian distribution functions. With continuous edges (x1, x2) and standard deviations (s1, s2), pixel i, which
reaches from i to i + 1, gets ``Φ((i + 1 - x1) / s1) Φ((x2 - i) / s2)``: the authors' program, whose boxes are inclusive
pixel indices [a, b], has the same with x1 = a, x2 = b + 1. An edge without spread gives each pixel the share that it
covers. The masks of true objects are their boxes, rounded to pixels.

Nothing of an image's size is held: a profile is kept as runs of pixels of one value, a pixel each where it changes,
so that a large, sure box is a small table; sums over rectangles are read from its cumulative sums.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from pipeline.metrics.detection_rows import ImageDetections, MatchedDetections
from pipeline.metrics.matching import match
from pipeline.metrics.ratios import ratio

STD_FLOOR = 1.0
"""Least standard deviation in pixels that a likelihood is computed with; labels are hardly better."""
_MIN_HEAT = 0.0027
"""Heat below this counts as 0, as in the authors' program: three standard deviations."""
_MIN_LOG_ARGUMENT = 1e-14
"""Least probability that a logarithm is taken of, as in the authors' program."""
_MIN_QUALITY = 1e-8
"""Spatial qualities below this count as 0, as in the authors' program."""
_OUTSIDE_REACH, _INSIDE_REACH = 2.8, 7.7
"""Standard deviations outside and inside of an edge between which its factor is neither 0 nor 1 to ``_TINY``."""
_RUNS_PER_STD = 16
"""Runs per standard deviation of an edge that is less sure than so many pixels."""
_FAR = 2**24
"""Beyond any image: where one ends whose size is not known."""
_NO_ROWS = np.zeros(0, np.int64)


class PdqSums(NamedTuple):
    """Sums over the assigned pairs of images, from which PDQ follows."""

    total: float
    """Sum of pPDQ over the pairs."""
    spatial: float
    """Sum of the spatial quality over the pairs."""
    label: float
    """Sum of the label quality over the pairs."""
    num_pairs: int
    """Assigned pairs: true positives."""
    num_boxes: int
    """Confident detections that no crowd absorbed."""
    num_true: int
    """True boxes without crowds."""


def pdq(images: Sequence[ImageDetections], operating_score: float) -> dict[str, float]:
    """PDQ of the detections from the operating score on; crowds, and boxes absorbed by one, do not count.

    ``pdq``: Σ pPDQ / (TP + FP + FN) over the pairs of the best assignment, ``pPDQ = √(Q_S Q_L)``, Q_L the probability
    of the true class; ``pdq_spatial, pdq_label``: means of Q_S and Q_L over these pairs. NaN where a box has no
    probabilities or no standard deviations, or where there is no box at all.
    """
    if any(not image.provided.all() and len(image.std) for image in images):
        return dict.fromkeys(("pdq", "pdq_spatial", "pdq_label"), float("nan"))
    sums = [_image_sums(image, operating_score) for image in images]
    total, spatial, label, num_pairs, num_boxes, num_true = np.sum([PdqSums(0, 0, 0, 0, 0, 0), *sums], 0)
    return {
        "pdq": float(ratio(total, num_boxes + num_true - num_pairs)),
        "pdq_spatial": float(ratio(spatial, num_pairs)),
        "pdq_label": float(ratio(label, num_pairs)),
    }


def _image_sums(image: ImageDetections, operating_score: float) -> PdqSums:
    """``PdqSums`` of one image."""
    confident = image.scores >= operating_score
    detections = image.boxes[confident], image.scores[confident], image.labels[confident]
    # Crowds count on neither side: not what they absorb, and not themselves.
    kept = ~match(*detections, image.true_boxes, image.true_labels, image.crowd).ignored
    truth, true_labels = image.true_boxes[~image.crowd], image.true_labels[~image.crowd]
    height, width = np.where(image.size > 0, image.size, _FAR).tolist()
    rows, columns, spatial = spatial_quality(image.boxes[confident][kept], image.std[kept], truth, (height, width))
    label = image.probabilities[kept].astype(np.float64)[rows, true_labels[columns]]
    pair_quality = np.sqrt(spatial * label)
    # A detection is assigned to one true box at most; which one is decided for all of them together.
    pairs = assign(rows, columns, pair_quality, (int(kept.sum()), len(truth)))
    return PdqSums(
        total=float(pair_quality[pairs].sum()),
        spatial=float(spatial[pairs].sum()),
        label=float(label[pairs].sum()),
        num_pairs=len(pairs),
        num_boxes=int(kept.sum()),
        num_true=len(truth),
    )


def assign(rows: np.ndarray, columns: np.ndarray, quality: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pairs, as indices, of the assignment with the largest sum: what the Hungarian method finds, sparsely.

    Args:
        rows: (P,) box of each pair.
        columns: (P,) true box of each pair.
        quality: (P,) in 0..1; pairs of 0 are never assigned.
        shape: Numbers of boxes and of true boxes.
    """
    from scipy.sparse import coo_array  # here, since scipy is slow to import
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    good = np.flatnonzero(quality > 0)
    distinct, position = np.unique(rows[good], return_inverse=True)
    if not len(good):
        return good
    # The method wants every box assigned, so each may be left over to a partner of its own, a column beyond the true
    # boxes. It minimises, and takes no cost of 0: a pair costs 2 - quality, to be left over costs 2.
    unassigned = np.arange(len(distinct))
    cost = np.concatenate([2 - quality[good], np.full(len(distinct), 2.0)])
    cells = np.concatenate([position, unassigned]), np.concatenate([columns[good], shape[1] + unassigned])
    costs = coo_array((cost, cells), (len(distinct), shape[1] + len(distinct))).tocsr()
    box, true = min_weight_full_bipartite_matching(costs)
    partner = np.full((len(distinct),), -1)
    partner[box] = true
    return good[partner[position] == columns[good]]


def spatial_quality(
    boxes: np.ndarray, std: np.ndarray, truth: np.ndarray, size: tuple[int, int] = (_FAR, _FAR)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q_S of all pairs that overlap: ``exp(-(L_fg + L_bg))``.

    With P the heat map, S the true mask: ``L_fg = -Σ_{i in S} ln P_i / |S|``, and over the pixels outside of it that
    the heat map shows, ``L_bg = -Σ ln(1 - P_i) / |S|``.

    Args:
        boxes: (B, 4) pixels.
        std: (B, 4) standard deviations of x1, y1, x2, y2, pixels; NaN counts as 0.
        truth: (T, 4).
        size: Height and width of the image: beyond it nothing is asked.

    Returns:
        rows (P,), columns (P,) int64 and their quality (P,), above 1e-8.
    """
    masks = _pixel_masks(truth)
    area = np.prod(masks[:, 2:] - masks[:, :2], 1).astype(np.float64)
    spreads = np.nan_to_num(std.astype(np.float64))
    pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(_NO_ROWS, _NO_ROWS, np.zeros(0))]
    for row, (box, spread) in enumerate(zip(boxes.astype(np.float64), spreads, strict=True)):
        # The heat map is an outer product of a profile along x and one along y.
        (x, in_x), (y, in_y) = (_profile(box[axis::2], spread[axis::2], size[1 - axis]) for axis in (0, 1))
        if len(x) < 2 or len(y) < 2:
            continue
        # Masks beside the heat map have quality 0: all their pixels would have the least probability.
        overlaps = (masks[:, :2] < [x[-1], y[-1]]) & (masks[:, 2:] > [x[0], y[0]])
        near = np.flatnonzero(overlaps.all(1))
        if not len(near):
            continue
        inner = np.clip(masks[near], [x[0], y[0], x[0], y[0]], [x[-1], y[-1], x[-1], y[-1]])
        shared = np.prod(inner[:, 2:] - inner[:, :2], 1)
        heat = in_y[:, None] * in_x
        heat[heat < _MIN_HEAT] = 0
        logs = np.log(np.maximum(np.stack([heat, 1 - heat]), _MIN_LOG_ARGUMENT))
        # Background is asked only where the heat map shows something.
        logs[1] *= heat > 0
        (foreground, background_inside), (_, background_total) = _rectangle_sums(x, y, logs, inner)
        # Minus (L_fg + L_bg) |S|: pixels of the mask outside the heat map have the least logarithm; the background is
        # what the heat map shows outside of the mask.
        log_quality = foreground + (area[near] - shared) * np.log(_MIN_LOG_ARGUMENT) + background_total
        log_quality = log_quality - background_inside
        quality = np.exp(np.minimum(log_quality / area[near], 0))
        good = quality > _MIN_QUALITY
        pairs.append((np.full(good.sum(), row), near[good], quality[good]))
    rows, columns, values = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return rows, columns, values


def _pixel_masks(truth: np.ndarray) -> np.ndarray:
    """(T, 4) int64: edges of the pixels whose centres lie in each box; at least one pixel."""
    edges = np.ceil(truth.astype(np.float64) - 0.5).astype(np.int64)
    centre = np.floor(truth[:, :2] / 2.0 + truth[:, 2:] / 2.0).astype(np.int64)
    is_empty = edges[:, 2:] <= edges[:, :2]
    return np.concatenate([np.where(is_empty, centre, edges[:, :2]), np.where(is_empty, centre + 1, edges[:, 2:])], 1)


def _profile(edges: np.ndarray, std: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """One axis of a heat map: ends of the runs (R + 1,) int64 inside 0..``end``, and their values (R,)."""
    (low, high), (before, after) = edges, std
    first = max(0, int(np.floor(low - _OUTSIDE_REACH * before)))
    last = min(end, int(np.ceil(high + _OUTSIDE_REACH * after)))
    if last <= first:
        return _NO_ROWS, np.zeros(0)
    # The profile changes around its two edges alone: there runs are short, a pixel where the edge is sharp.
    runs = [
        np.arange(int(np.floor(start)) - 1, stop + 2, max(1, int(spread / _RUNS_PER_STD)))
        for start, stop, spread in (
            (low - _OUTSIDE_REACH * before, min(last, low + _INSIDE_REACH * before), before),
            (max(first, high - _INSIDE_REACH * after), high + _OUTSIDE_REACH * after, after),
        )
    ]
    knots = np.unique(np.concatenate([[first, last], *runs]).astype(np.int64))
    knots = knots[(knots >= first) & (knots <= last)]
    # A run has the value of its middle pixel, as if that were a pixel of its own.
    middle = (knots[:-1] + knots[1:] - 1) / 2
    return knots, _cdf(middle + 1 - low, before) * _cdf(high - middle, after)


def _cdf(inside: np.ndarray, std: float) -> np.ndarray:
    """Probability that an edge lies before a point ``inside`` pixels beyond it; of a sure edge, the share covered."""
    return ndtr(inside / std) if std > 0 else np.clip(inside, 0, 1)


def _rectangle_sums(
    x: np.ndarray, y: np.ndarray, tables: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over rectangles of pixels of tables whose cells are runs.

    Args:
        x: (X + 1,) ends of the runs along x.
        y: (Y + 1,) ends of the runs along y.
        tables: (P, Y, X).
        boxes: (T, 4) rectangles inside of them.

    Returns:
        (P, T), and (P,) of the whole tables.
    """
    sums = np.zeros((len(tables), len(y), len(x)))
    np.cumsum(np.cumsum(tables * (np.diff(y)[:, None] * np.diff(x)), 1), 2, out=sums[:, 1:, 1:])
    # Inside of a run sums grow evenly, so that reading between its ends is exact.
    column, right = _locate(x, boxes[:, None, 0::2])
    row, down = _locate(y, boxes[:, 1::2, None])
    upper = sums[:, row, column] * (1 - right) + sums[:, row, column + 1] * right
    lower = sums[:, row + 1, column] * (1 - right) + sums[:, row + 1, column + 1] * right
    corners = upper * (1 - down) + lower * down
    # A rectangle's sum from the cumulative sums at its four corners.
    return corners[..., 1, 1] - corners[..., 0, 1] - corners[..., 1, 0] + corners[..., 0, 0], sums[:, -1, -1]


def _locate(knots: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(knot before each value, share of the way to the next)."""
    before = np.minimum(np.searchsorted(knots, values, side="right") - 1, len(knots) - 2)
    return before, (values - knots[before]) / (knots[before + 1] - knots[before])


def edge_likelihood(images: Sequence[ImageDetections], matched: MatchedDetections) -> dict[str, float]:
    """How well Gaussian edges foretell those of the true box, over confident true positives at IoU 0.5.

    ``nll_box``: mean of ``ln(s √(2 π)) + e² / (2 s²)`` in nats per coordinate, s at least ``STD_FLOOR``.
    ``crps_box``: mean of the continuous ranked probability score, in pixels per coordinate (Gneiting & Raftery 2007,
    10.1198/016214506000001437): the energy score of one coordinate, |e| for an edge without spread. Spreads that
    are not known count as 0. NaN without a true positive, or where an image gave no standard deviations.
    """
    if not len(matched.edge_error) or any(not image.provided[0] and len(image.std) for image in images):
        return {"nll_box": float("nan"), "crps_box": float("nan")}
    error = matched.edge_error.astype(np.float64)
    std = np.nan_to_num(matched.edge_std.astype(np.float64))
    return {
        "nll_box": float(nll(error, np.maximum(std, STD_FLOOR)).mean()),
        "crps_box": float(crps(error, std).mean()),
    }


def nll(error: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Negative log-density of a Gaussian at ``error``, in nats, elementwise; ``std`` above 0."""
    return np.log(std) + np.log(2 * np.pi) / 2 + (error / std) ** 2 / 2


def crps(error: np.ndarray, std: np.ndarray) -> np.ndarray:
    """``s (z (2 Φ(z) - 1) + 2 φ(z) - 1 / √π)``, z = e / s, elementwise; its limit |e| for s = 0."""
    scale = np.where(std > 0, std, 1)
    z = error / scale
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    return np.where(std > 0, scale * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi)), np.abs(error))
