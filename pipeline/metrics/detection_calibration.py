"""Do scores say how often, and how well, a detection is right: LaECE, LRP, D-ECE, log score, true against false ones.

The formulas are the papers'. Detections that a crowd absorbed are not counted.
"""

from typing import Any

import numpy as np

from pipeline.metrics.detection_rows import ANY_IOU, HIT_IOU, LOW_IOU, MatchedDetections
from pipeline.metrics.ranking import auroc, average_precision_of_counts
from pipeline.metrics.ratios import mean_of_defined, mean_or_nan, ratio

LAECE_BINS = 25
"""Equal bins of score, as in the paper."""
BINS = 15
"""Equal bins of score of D-ECE and the reliability diagram, as many as segmentation has."""
_MIN_PROBABILITY = 1e-6
"""The log score keeps scores so far away from 0 and 1."""
_OVERLAP_ROW = {HIT_IOU: 0, LOW_IOU: 1, ANY_IOU: 2}
"""Row of ``ConfidentDetections.overlap`` and ``counted``."""


def laece_sums(matched: MatchedDetections, min_iou: float, by_image: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What LaECE sums over the confident detections: score minus overlap, and 1.

    Args:
        matched: Of N images.
        min_iou: ``LOW_IOU`` or ``ANY_IOU``.
        by_image: Each image apart.

    Returns:
        (N or 1, K, 25) float64 gaps and (N or 1, K, 25) counts.
    """
    confident, row = matched.confident, _OVERLAP_ROW[min_iou]
    counted = confident.counted[row]
    num_images, num_classes = matched.num_true.shape
    shape = (num_images if by_image else 1, num_classes, LAECE_BINS)
    # Without by_image every detection falls into row 0.
    cell = (
        confident.image[counted] * by_image,
        confident.label[counted],
        _score_bin(confident.score[counted], LAECE_BINS),
    )
    gaps, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(gaps, cell, confident.score[counted] - confident.overlap[row, counted])
    np.add.at(counts, cell, 1)
    return gaps, counts


def laece(gaps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Localisation-aware expected calibration error (Oksuz et al. 2023, 2307.00934), from ``laece_sums``' sums.

    Of class c, with n_j detections of mean score s_j in bin j, of which a share precision_j is right with mean overlap
    IoU_j: ``Σ_j n_j / n |s_j - precision_j IoU_j|``; precision times mean IoU is the mean of IoU, 0 for the wrong.

    Args:
        gaps: (..., K, 25).
        counts: (..., K, 25).

    Returns:
        (...) the mean over classes that have detections, in 0..1; NaN without one.
    """
    return mean_of_defined(ratio(np.abs(gaps).sum(-1), counts.sum(-1)))


def lrp(matched: MatchedDetections) -> float:
    """Localisation-recall-precision error at the operating point, least overlap τ = ``LOW_IOU``, mean over classes.

    ``(Σ_TP (1 - IoU) / (1 - τ) + N_FP + N_FN) / (N_TP + N_FP + N_FN)`` (Oksuz et al. 2018, 1807.01696; 2021,
    2011.10772); τ as Oksuz et al. 2023 have it. A class without a confident detection and without a true box does not
    count.

    Returns:
        In 0..1; NaN without any box.
    """
    confident, num_classes = matched.confident, matched.num_true.shape[1]
    row = _OVERLAP_ROW[LOW_IOU]
    counted = confident.counted[row]
    label, overlap = confident.label[counted], confident.overlap[row, counted]
    hit = overlap > 0
    hits = np.bincount(label[hit], minlength=num_classes)
    localisation = np.bincount(label[hit], (1 - overlap[hit]) / (1 - LOW_IOU), minlength=num_classes)
    # False positives plus false negatives.
    errors = np.bincount(label[~hit], minlength=num_classes) + matched.num_true.sum(0) - hits
    per_class = ratio(localisation + errors, hits + errors)
    return mean_or_nan(per_class[np.isfinite(per_class)])


def optimal_lrp(matched: MatchedDetections) -> float:
    """The lowest LRP over all scores, of each class that has true boxes, τ = ``HIT_IOU``; their mean.

    Oksuz et al. 2018 (1807.01696). No detection at all is a choice too, so that it is at most 1.
    """
    lowest = []
    for label, num_true in enumerate(matched.num_true.sum(0).tolist()):
        overlap, ends, _ = _by_falling_score(matched, matched.label == label)
        hit = overlap > 0
        # Sums over the detections from each score on; the 0 in front is the choice of no detection.
        hits = np.append(0, hit.cumsum()[ends])
        num_detected = np.append(0, np.arange(1, len(hit) + 1)[ends])
        localisation = np.append(0, np.where(hit, (1 - overlap) / (1 - HIT_IOU), 0).cumsum()[ends])
        if num_true:
            errors = localisation + num_detected - hits + num_true - hits
            lowest.append((errors / (num_detected + num_true - hits)).min())
    per_class = np.array(lowest)
    return mean_or_nan(per_class[np.isfinite(per_class)])


def best_f1(matched: MatchedDetections) -> dict[str, float] | None:
    """The score from which detections have the highest F1 at IoU 0.5, all classes together; the higher of equals.

    Returns:
        ``score, f1, precision, recall``; None without a detection or without a true box.
    """
    overlap, ends, scores = _by_falling_score(matched, slice(None))
    num_true = int(matched.num_true.sum())
    if not len(ends) or not num_true:
        return None
    hits, num_detected = (overlap > 0).cumsum()[ends], ends + 1
    f1 = 2 * hits / (num_detected + num_true)
    best = int(f1.argmax())
    return {
        "score": float(scores[best]),
        "f1": float(f1[best]),
        "precision": float(hits[best] / num_detected[best]),
        "recall": float(hits[best] / num_true),
    }


def score_ranking(matched: MatchedDetections) -> dict[str, float]:
    """True against false positives by score, IoU 0.5: ``auroc_tp``, ``aupr_tp`` (a true positive is positive)."""
    hit = matched.overlap > 0
    values, group = np.unique(matched.score, return_inverse=True)
    right = np.bincount(group[hit], minlength=len(values))
    wrong = np.bincount(group[~hit], minlength=len(values))
    return {
        "auroc_tp": auroc(matched.score[~hit], matched.score[hit]),
        "aupr_tp": average_precision_of_counts(wrong, right),
    }


def reliability(score: np.ndarray, overlap: np.ndarray) -> dict[str, np.ndarray]:
    """Precision against score in 15 bins: ``confidence, accuracy, count`` (15,)."""
    bins = _score_bin(score, BINS)
    count = np.bincount(bins, minlength=BINS)
    right = np.bincount(bins, overlap > 0, minlength=BINS)
    score_sum = np.bincount(bins, score, minlength=BINS)
    return {"confidence": ratio(score_sum, count), "accuracy": ratio(right, count), "count": count}


def d_ece(matched: MatchedDetections) -> float:
    """Detection ECE of the confident detections: Σ_bins share |precision - mean score|, 15 bins, IoU 0.5.

    Küppers et al. 2020 (2004.13546), by score alone; NaN without a confident detection.
    """
    confident = matched.confident
    counted = confident.counted[0]
    bins = reliability(confident.score[counted], confident.overlap[0, counted])
    gaps = np.abs(bins["confidence"] - bins["accuracy"]) * bins["count"]
    return float(ratio(np.nansum(gaps), bins["count"].sum()))


def score_nll(matched: MatchedDetections) -> float:
    """Log score of the confident detections' scores as probabilities of being right, IoU 0.5; in nats (Good 1952).

    Mean of ``-ln s`` over the true positives and of ``-ln(1 - s)`` over the false ones, s kept 1e-6 away from 0 and 1;
    NaN without a confident detection.
    """
    confident = matched.confident
    counted = confident.counted[0]
    score = np.clip(confident.score[counted], _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    losses = -np.log(np.where(confident.overlap[0, counted] > 0, score, 1 - score))
    return float(ratio(losses.sum(), len(losses)))


def figures(matched: MatchedDetections) -> dict[str, Any]:
    """The figures of this module by their key in ``DetectionMetric.compute``; NaN or None where not defined."""
    return {
        "laece": float(laece(*laece_sums(matched, LOW_IOU))[0]),
        "laece0": float(laece(*laece_sums(matched, ANY_IOU))[0]),
        "lrp": lrp(matched),
        "olrp": optimal_lrp(matched),
        "d_ece": d_ece(matched),
        "nll_score": score_nll(matched),
        **score_ranking(matched),
        "best_f1": best_f1(matched),
        "reliability": reliability(matched.score, matched.overlap),
    }


def _score_bin(score: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin of each score, (n,) int64; a bin holds its lower end, the last one 1 too."""
    return np.clip((score * num_bins).astype(np.int64), 0, num_bins - 1)


def _by_falling_score(matched: MatchedDetections, selected: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(overlaps by falling score, last row of each group of equal scores, the groups' scores) of some detections."""
    scores, overlap = matched.score[selected], matched.overlap[selected]
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)])
    return overlap[order], ends, ordered[ends]
