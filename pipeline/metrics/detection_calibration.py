"""Do scores say how often, and how well, a box is right: LaECE, LRP, D-ECE, log score, true against false ones.

The formulas are the papers'. Boxes that a crowd absorbed are not counted.
"""

from typing import Any

import numpy as np

from pipeline.metrics.detection_rows import ANY_IOU, HIT_IOU, LOW_IOU, MatchedDetections
from pipeline.metrics.ranking import auroc, average_precision_of_counts
from pipeline.metrics.ratios import ratio

LAECE_BINS = 25
"""Equal bins of score, as in the paper."""
BINS = 15
"""Of D-ECE and the reliability diagram, as everywhere here."""
_MIN_PROBABILITY = 1e-6
_OVERLAP_ROW = {HIT_IOU: 0, LOW_IOU: 1, ANY_IOU: 2}


def laece_sums(matched: MatchedDetections, min_iou: float, by_image: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What LaECE sums over the said boxes: score minus overlap, and 1.

    Args:
        judged: Of N images.
        least: ``LOW_IOU`` or ``ANY_IOU``.
        by_image: Each image apart.

    Returns:
        (N or 1, K, 25) float64 gaps and (N or 1, K, 25) counts.
    """
    confident, row = matched.confident, _OVERLAP_ROW[min_iou]
    use = confident.counted[row]
    images, num_classes = matched.num_true.shape
    shape = (images if by_image else 1, num_classes, LAECE_BINS)
    cell = (confident.image[use] * by_image, confident.label[use], _bin(confident.score[use], LAECE_BINS))
    gaps, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(gaps, cell, confident.score[use] - confident.overlap[row, use])
    np.add.at(counts, cell, 1)
    return gaps, counts


def laece(gaps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Localisation-aware expected calibration error (Oksuz et al. 2023, 2307.00934), from ``laece_sums``' sums.

    Of class c, with n_j boxes of mean score s_j in bin j, of which a share precision_j is right with mean overlap
    IoU_j: ``Σ_j n_j / n |s_j - precision_j IoU_j|``; precision times mean IoU is the mean of IoU, 0 for the wrong.

    Args:
        gaps: (..., K, 25).
        counts: (..., K, 25).

    Returns:
        (...) the mean over classes that have boxes, in 0..1; NaN without one.
    """
    error_per_class = ratio(np.abs(gaps).sum(-1), counts.sum(-1))
    known = np.isfinite(error_per_class)
    number = known.sum(-1)
    return ratio(np.where(known, error_per_class, 0).sum(-1), number)


def lrp(matched: MatchedDetections) -> float:
    """Localisation-recall-precision error at the operating point, least overlap τ = ``LOW_IOU``, mean over classes.

    ``(Σ_TP (1 - IoU) / (1 - τ) + N_FP + N_FN) / (N_TP + N_FP + N_FN)`` (Oksuz et al. 2018, 1807.01696; 2021,
    2011.10772); τ as Oksuz et al. 2023 have it. A class that is neither said nor there does not count.

    Returns:
        In 0..1; NaN without any box.
    """
    confident, num_classes = matched.confident, matched.num_true.shape[1]
    row = _OVERLAP_ROW[LOW_IOU]
    use = confident.counted[row]
    label, overlap = confident.label[use], confident.overlap[row, use]
    hit = overlap > 0
    hits = np.bincount(label[hit], minlength=num_classes)
    localisation_loss = np.bincount(label[hit], (1 - overlap[hit]) / (1 - LOW_IOU), minlength=num_classes)
    errors = np.bincount(label[~hit], minlength=num_classes) + matched.num_true.sum(0) - hits
    return _mean(ratio(localisation_loss + errors, hits + errors))


def optimal_lrp(matched: MatchedDetections) -> float:
    """The lowest LRP over all scores, of each class that has true boxes, τ = ``HIT_IOU``; their mean.

    Oksuz et al. 2018 (1807.01696). Saying nothing is a choice too, so that it is at most 1.
    """
    lowest = []
    for label, num_true in enumerate(matched.num_true.sum(0).tolist()):
        overlap, ends, _ = _by_score(matched, matched.label == label)
        hit = overlap > 0
        hits, num_boxes = (np.append(0, each[ends]) for each in (hit.cumsum(), np.arange(1, len(hit) + 1)))
        localisation_loss = np.append(0, np.where(hit, (1 - overlap) / (1 - HIT_IOU), 0).cumsum()[ends])
        if num_true:
            lowest.append(
                ((localisation_loss + num_boxes - hits + num_true - hits) / (num_boxes + num_true - hits)).min()
            )
    return _mean(np.array(lowest))


def best_f1(matched: MatchedDetections) -> dict[str, float] | None:
    """The score from which saying boxes gives the highest F1 at IoU 0.5, all classes together; the higher of equals.

    Returns:
        ``score, f1, precision, recall``; None without a box or without a true one.
    """
    overlap, ends, scores = _by_score(matched, slice(None))
    num_true = int(matched.num_true.sum())
    if not len(ends) or not num_true:
        return None
    hits, num_boxes = (overlap > 0).cumsum()[ends], ends + 1
    f1 = 2 * hits / (num_boxes + num_true)
    best = int(f1.argmax())
    return {
        "score": float(scores[best]),
        "f1": float(f1[best]),
        "precision": float(hits[best] / num_boxes[best]),
        "recall": float(hits[best] / num_true),
    }


def score_ranking(matched: MatchedDetections) -> dict[str, float]:
    """Right boxes against wrong ones by score, IoU 0.5: ``auroc_tp``, ``aupr_tp`` (right = positive)."""
    hit = matched.overlap > 0
    values, at = np.unique(matched.score, return_inverse=True)
    right, wrong = (np.bincount(at[each], minlength=len(values)) for each in (hit, ~hit))
    return {
        "auroc_tp": auroc(matched.score[~hit], matched.score[hit]),
        "aupr_tp": average_precision_of_counts(wrong, right),
    }


def reliability(score: np.ndarray, overlap: np.ndarray) -> dict[str, np.ndarray]:
    """Precision against score in 15 bins: ``confidence, accuracy, count`` (15,)."""
    at = _bin(score, BINS)
    count = np.bincount(at, minlength=BINS)
    right, total = (np.bincount(at, each, minlength=BINS) for each in (overlap > 0, score))
    return {"confidence": ratio(total, count), "accuracy": ratio(right, count), "count": count}


def d_ece(matched: MatchedDetections) -> float:
    """Detection ECE of the said boxes: Σ_bins share |precision - mean score|, 15 bins, IoU 0.5.

    Küppers et al. 2020 (2004.13546), by score alone; NaN where nothing is said.
    """
    confident, counted = matched.confident, matched.confident.counted[0]
    bins = reliability(confident.score[counted], confident.overlap[0, counted])
    gaps = np.abs(bins["confidence"] - bins["accuracy"]) * bins["count"]
    return float(ratio(np.nansum(gaps), bins["count"].sum()))


def score_nll(matched: MatchedDetections) -> float:
    """Log score of the said boxes' scores as probabilities of being right, IoU 0.5; in nats (Good 1952).

    Mean of ``-ln s`` over the right ones and of ``-ln(1 - s)`` over the wrong ones, s kept 1e-6 away from 0 and 1;
    NaN where nothing is said.
    """
    confident, counted = matched.confident, matched.confident.counted[0]
    score = np.clip(confident.score[counted], _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    losses = -np.log(np.where(confident.overlap[0, counted] > 0, score, 1 - score))
    return float(ratio(losses.sum(), np.array(len(losses))))


def recalls(judged: MatchedDetections) -> np.ndarray:
    """(K,) share of each class's true boxes that are said, IoU 0.5; NaN without a true one."""
    said, number = judged.confident, judged.num_true.shape[1]
    right = np.bincount(said.label[said.counted[0] & (said.overlap[0] > 0)], minlength=number)
    return ratio(right, judged.num_true.sum(0))


def figures(matched: MatchedDetections) -> dict[str, Any]:
    """All of the above, by name; not finite or None where not defined."""
    errors = {
        name: float(laece(*laece_sums(matched, min_iou))[0])
        for name, min_iou in (("laece", LOW_IOU), ("laece0", ANY_IOU))
    }
    return {
        **errors,
        "lrp": lrp(matched),
        "olrp": optimal_lrp(matched),
        "d_ece": d_ece(matched),
        "nll_score": score_nll(matched),
        **score_ranking(matched),
        "best_f1": best_f1(matched),
        "reliability": reliability(matched.score, matched.overlap),
    }


def _bin(score: np.ndarray, number: int) -> np.ndarray:
    """Bin of each score, (n,) int64; a bin holds its lower end, the last one 1 too."""
    return np.clip((score * number).astype(np.int64), 0, number - 1)


def _by_score(matched: MatchedDetections, selected: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(overlaps by falling score, last row of each group of equal scores, their scores)."""
    scores, overlap = matched.score[selected], matched.overlap[selected]
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)])
    return overlap[order], ends, ordered[ends]


def _mean(each: np.ndarray) -> float:
    known = each[np.isfinite(each)]
    return float(known.mean()) if len(known) else float("nan")
