"""Do scores say how often, and how well, a box is right: LaECE, LRP, D-ECE, log score, true against false ones.

The formulas are the papers'. Boxes that a crowd absorbed are not counted.
"""

from typing import Any

import numpy as np

from pipeline.metrics.detection_rows import ANY_IOU, HIT_IOU, LOW_IOU, Judged
from pipeline.metrics.overlap import iou
from pipeline.metrics.ranking import auroc, average_precision_of_counts

LAECE_BINS = 25
"""Equal bins of score, as in the paper."""
BINS = 15
"""Of D-ECE and the reliability diagram, as everywhere here."""
_SURE = 1e-6
_ROW = {HIT_IOU: 0, LOW_IOU: 1, ANY_IOU: 2}


def laece_sums(judged: Judged, least: float, by_image: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What LaECE sums over the said boxes: score minus overlap, and 1.

    Args:
        judged: Of N images.
        least: ``LOW_IOU`` or ``ANY_IOU``.
        by_image: Each image apart.

    Returns:
        (N or 1, K, 25) float64 gaps and (N or 1, K, 25) counts.
    """
    said, row = judged.said, _ROW[least]
    use = said.counted[row]
    images, number = judged.true.shape
    shape = (images if by_image else 1, number, LAECE_BINS)
    at = (said.image[use] * by_image, said.label[use], _bin(said.score[use], LAECE_BINS))
    gaps, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(gaps, at, said.score[use] - said.overlap[row, use])
    np.add.at(counts, at, 1)
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
    each = iou(np.abs(gaps).sum(-1), counts.sum(-1))
    known = np.isfinite(each)
    number = known.sum(-1)
    return iou(np.where(known, each, 0).sum(-1), number)


def lrp(judged: Judged) -> float:
    """Localisation-recall-precision error at the operating point, least overlap τ = ``LOW_IOU``, mean over classes.

    ``(Σ_TP (1 - IoU) / (1 - τ) + N_FP + N_FN) / (N_TP + N_FP + N_FN)`` (Oksuz et al. 2018, 1807.01696; 2021,
    2011.10772); τ as Oksuz et al. 2023 have it. A class that is neither said nor there does not count.

    Returns:
        In 0..1; NaN without any box.
    """
    said, number = judged.said, judged.true.shape[1]
    row = _ROW[LOW_IOU]
    use = said.counted[row]
    label, overlap = said.label[use], said.overlap[row, use]
    hit = overlap > 0
    right = np.bincount(label[hit], minlength=number)
    lost = np.bincount(label[hit], (1 - overlap[hit]) / (1 - LOW_IOU), minlength=number)
    other = np.bincount(label[~hit], minlength=number) + judged.true.sum(0) - right
    return _mean(iou(lost + other, right + other))


def optimal_lrp(judged: Judged) -> float:
    """The lowest LRP over all scores, of each class that has true boxes, τ = ``HIT_IOU``; their mean.

    Oksuz et al. 2018 (1807.01696). Saying nothing is a choice too, so that it is at most 1.
    """
    found = []
    for label, true in enumerate(judged.true.sum(0).tolist()):
        overlap, ends, _ = _by_score(judged, judged.label == label)
        hit = overlap > 0
        right, number = (np.append(0, each[ends]) for each in (hit.cumsum(), np.arange(1, len(hit) + 1)))
        lost = np.append(0, np.where(hit, (1 - overlap) / (1 - HIT_IOU), 0).cumsum()[ends])
        if true:
            found.append(((lost + number - right + true - right) / (number + true - right)).min())
    return _mean(np.array(found))


def best_f1(judged: Judged) -> dict[str, float] | None:
    """The score from which saying boxes gives the highest F1 at IoU 0.5, all classes together; the higher of equals.

    Returns:
        ``score, f1, precision, recall``; None without a box or without a true one.
    """
    overlap, ends, scores = _by_score(judged, slice(None))
    true = int(judged.true.sum())
    if not len(ends) or not true:
        return None
    right, number = (overlap > 0).cumsum()[ends], ends + 1
    f1 = 2 * right / (number + true)
    best = int(f1.argmax())
    return {
        "score": float(scores[best]),
        "f1": float(f1[best]),
        "precision": float(right[best] / number[best]),
        "recall": float(right[best] / true),
    }


def ranks(judged: Judged) -> dict[str, float]:
    """Right boxes against wrong ones by score, IoU 0.5: ``auroc_tp``, ``aupr_tp`` (right = positive)."""
    hit = judged.overlap > 0
    values, at = np.unique(judged.score, return_inverse=True)
    right, wrong = (np.bincount(at[each], minlength=len(values)) for each in (hit, ~hit))
    return {
        "auroc_tp": auroc(judged.score[~hit], judged.score[hit]),
        "aupr_tp": average_precision_of_counts(wrong, right),
    }


def reliability(score: np.ndarray, overlap: np.ndarray) -> dict[str, np.ndarray]:
    """Precision against score in 15 bins: ``confidence, accuracy, count`` (15,)."""
    at = _bin(score, BINS)
    count = np.bincount(at, minlength=BINS)
    right, total = (np.bincount(at, each, minlength=BINS) for each in (overlap > 0, score))
    return {"confidence": iou(total, count), "accuracy": iou(right, count), "count": count}


def d_ece(judged: Judged) -> float:
    """Detection ECE of the said boxes: Σ_bins share |precision - mean score|, 15 bins, IoU 0.5.

    Küppers et al. 2020 (2004.13546), by score alone; NaN where nothing is said.
    """
    said, use = judged.said, judged.said.counted[0]
    bins = reliability(said.score[use], said.overlap[0, use])
    gaps = np.abs(bins["confidence"] - bins["accuracy"]) * bins["count"]
    return float(iou(np.nansum(gaps), bins["count"].sum()))


def score_nll(judged: Judged) -> float:
    """Log score of the said boxes' scores as probabilities of being right, IoU 0.5; in nats (Good 1952).

    Mean of ``-ln s`` over the right ones and of ``-ln(1 - s)`` over the wrong ones, s kept 1e-6 away from 0 and 1;
    NaN where nothing is said.
    """
    said, use = judged.said, judged.said.counted[0]
    score = np.clip(said.score[use], _SURE, 1 - _SURE)
    lost = -np.log(np.where(said.overlap[0, use] > 0, score, 1 - score))
    return float(iou(lost.sum(), np.array(len(lost))))


def recalls(judged: Judged) -> np.ndarray:
    """(K,) share of each class's true boxes that are said, IoU 0.5; NaN without a true one."""
    said, number = judged.said, judged.true.shape[1]
    right = np.bincount(said.label[said.counted[0] & (said.overlap[0] > 0)], minlength=number)
    return iou(right, judged.true.sum(0))


def figures(judged: Judged) -> dict[str, Any]:
    """All of the above, by name; not finite or None where not defined."""
    errors = {
        name: float(laece(*laece_sums(judged, least))[0]) for name, least in (("laece", LOW_IOU), ("laece0", ANY_IOU))
    }
    return {
        **errors,
        "lrp": lrp(judged),
        "olrp": optimal_lrp(judged),
        "d_ece": d_ece(judged),
        "nll_score": score_nll(judged),
        **ranks(judged),
        "best_f1": best_f1(judged),
        "reliability": reliability(judged.score, judged.overlap),
    }


def _bin(score: np.ndarray, number: int) -> np.ndarray:
    """Bin of each score, (n,) int64; a bin holds its lower end, the last one 1 too."""
    return np.clip((score * number).astype(np.int64), 0, number - 1)


def _by_score(judged: Judged, which: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(overlaps by falling score, last row of each group of equal scores, their scores)."""
    scores, overlap = judged.score[which], judged.overlap[which]
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)])
    return overlap[order], ends, ordered[ends]


def _mean(each: np.ndarray) -> float:
    known = each[np.isfinite(each)]
    return float(known.mean()) if len(known) else float("nan")
