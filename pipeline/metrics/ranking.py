"""How well a score ranks: one group above another, large losses above small ones.

A score is doubt: the higher, the more doubtful. Groups of tied rows, or bins of a histogram, have no order
inside; what depends on one is given as its mean over all orders.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import digamma


def auroc(negatives: ArrayLike, positives: ArrayLike) -> float:
    """Probability that a positive scores higher than a negative, ties counting half (Mann-Whitney U / n m).

    Args:
        negatives: (n,) scores of those that should score low.
        positives: (m,) scores of those that should score high.

    Returns:
        In [0, 1]; NaN if either group is empty.
    """
    low, high = np.asarray(negatives, np.float64), np.asarray(positives, np.float64)
    if not len(low) or not len(high):
        return float("nan")
    ranks = _ranks(np.concatenate([low, high]))
    above = ranks[len(low) :].sum() - len(high) * (len(high) + 1) / 2
    return float(above / (len(low) * len(high)))


def fpr_at_tpr(negatives: ArrayLike, positives: ArrayLike, tpr: float = 0.95) -> float:
    """Share of negatives at or above the highest threshold that at least ``tpr`` of the positives reach.

    Args:
        negatives: (n,) scores of those that should score low.
        positives: (m,) scores of those that should score high.
        tpr: Above 0, at most 1.

    Returns:
        In [0, 1]; NaN if either group is empty.
    """
    low, high = np.asarray(negatives, np.float64), np.asarray(positives, np.float64)
    if not len(low) or not len(high):
        return float("nan")
    # 1e-9 keeps 0.95 * 20 at 19.
    rank = max(1, int(np.ceil(tpr * len(high) - 1e-9)))
    threshold = np.sort(high)[len(high) - rank]
    return float((low >= threshold).mean())


def auroc_of_counts(negatives: np.ndarray, positives: np.ndarray) -> float:
    """``auroc`` from counts (G,) by bin, lowest score first; rows of one bin are tied."""
    low, high = np.asarray(negatives, np.float64), np.asarray(positives, np.float64)
    pairs = low.sum() * high.sum()
    # A positive beats the negatives of all lower bins, and half of those in its own.
    return float((high * (low.cumsum() - low / 2)).sum() / pairs) if pairs else float("nan")


def average_precision_of_counts(negatives: np.ndarray, positives: np.ndarray) -> float:
    """Area under precision-recall as Σ (R_k - R_{k-1}) P_k, from counts by bin, lowest score first.

    The mean over orders inside the bins of what scikit-learn's ``average_precision_score`` gives: in a bin of
    n rows, w positive, after N0 rows, W0 positive, the j-th row is positive with w / n, and has then on average
    ``W0 + 1 + (j - 1) a`` positives up to it, ``a = (w - 1) / (n - 1)``; summed as in ``aurc``.

    Returns:
        In [0, 1]; NaN without positives.
    """
    # Turned round: precision counts from the highest score down.
    low, high = np.asarray(negatives, np.float64)[::-1], np.asarray(positives, np.float64)[::-1]
    number = low + high
    before, high_before = number.cumsum() - number, high.cumsum() - high
    if not high.sum():
        return float("nan")
    slope = (high - 1) / np.maximum(number - 1, 1)
    # Σ_j 1 / (N0 + j), the harmonic sum over the rows of a bin.
    steps = digamma(before + number + 1) - digamma(before + 1)
    precisions = slope * number + (high_before + 1 - slope - slope * before) * steps
    return float((high * precisions / np.maximum(number, 1)).sum() / high.sum())


def aurc(counts: ArrayLike, losses: ArrayLike) -> float:
    """Area under risk-coverage: 1/N Σ_k (mean loss of the k surest) (Geifman & El-Yaniv 2017, 1705.08500).

    In a group of n rows with losses L, after N0 rows with losses L0, the mean over orders of what its k-th
    row adds is ``(L0 + k r) / (N0 + k)``, ``r = L / n``; summed over k: ``L + (L0 - r N0) (ψ(N0 + n + 1) -
    ψ(N0 + 1))`` with the digamma function ψ.

    Args:
        counts: (G,) rows by group, the surest group first.
        losses: (G,) sums of their losses.

    Returns:
        In the unit of the losses; NaN of no rows.
    """
    number, loss_sums = np.asarray(counts, np.float64), np.asarray(losses, np.float64)
    number, loss_sums = number[number > 0], loss_sums[number > 0]
    if not len(number):
        return float("nan")
    before, losses_before = number.cumsum() - number, loss_sums.cumsum() - loss_sums
    steps = digamma(before + number + 1) - digamma(before + 1)
    total = loss_sums + (losses_before - loss_sums / number * before) * steps
    return float(total.sum() / number.sum())


def excess_aurc(counts: ArrayLike, losses: ArrayLike, oracle_groups: ArrayLike) -> float:
    """``aurc`` minus that of an oracle, which ranks by loss (E-AURC; Geifman et al. 2019, 1805.08206).

    Args:
        counts: (G,) as in ``aurc``.
        losses: (G,) as in ``aurc``.
        oracle_groups: (2, K) the same rows by loss, K groups of equal losses: their counts, and their losses' sums.
    """
    number, oracle_losses = np.asarray(oracle_groups, np.float64)
    order = np.argsort(oracle_losses / np.maximum(number, 1))
    # An oracle cannot be worse: what is below 0 is rounding, and cut off; NaN stays.
    return float(np.maximum(aurc(counts, losses) - aurc(number[order], oracle_losses[order]), 0))


def group_ties(scores: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(counts, losses) of groups of equal scores (n,), the lowest first: what ``aurc`` takes."""
    _, group, counts = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    return counts, np.bincount(group, np.asarray(losses, np.float64), minlength=len(counts))


def risk_coverage(scores: ArrayLike, losses: ArrayLike, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss of the surest rows by the share of them that is accepted.

    Args:
        scores: (n,) doubt.
        losses: (n,) any unit.
        points: At most so many coverages; those of k = 1..n rows where n is not larger.

    Returns:
        (coverage, risk), coverage rising to 1; empty of no rows.
    """
    counts, loss_sums = group_ties(scores, losses)
    total = int(counts.sum())
    if not total:
        return np.zeros(0), np.zeros(0)
    accepted = np.unique(np.ceil(np.linspace(total, 1, min(points, total)) - 1e-9).astype(np.int64))
    ends = np.concatenate([[0], counts.cumsum()])
    loss_ends = np.concatenate([[0.0], loss_sums.cumsum()])
    # Linear inside a group: its mean over orders.
    return accepted / total, np.interp(accepted, ends, loss_ends) / accepted


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Correlation of ranks, ties sharing theirs (Spearman 1904); NaN of fewer than two, or of equal values."""
    first_ranks, second_ranks = (_ranks(np.asarray(values, np.float64)) for values in (first, second))
    # Pearson's correlation of the ranks, written out: centred, then scaled.
    if len(first_ranks):
        first_ranks = first_ranks - first_ranks.mean()
    if len(second_ranks):
        second_ranks = second_ranks - second_ranks.mean()
    scale = np.sqrt((first_ranks @ first_ranks) * (second_ranks @ second_ranks))
    return float(np.clip(first_ranks @ second_ranks / scale, -1, 1)) if scale else float("nan")


def image_ranking(table: dict[str, np.ndarray]) -> dict[str, Any]:
    """How well the images' scores rank their losses.

    Args:
        table: ``score`` and ``loss`` (N,) of a metric's ``images_table``; images without either are left out.

    Returns:
        ``spearman_image`` of score and 1 - loss; ``aurc_image, eaurc_image``; ``risk_coverage``: ``coverage, risk``,
        None where no image is ranked.
    """
    ranked = np.isfinite(table["score"]) & np.isfinite(table["loss"])
    scores, losses = table["score"][ranked], table["loss"][ranked]
    counts, loss_sums = group_ties(scores, losses)
    coverage, risk = risk_coverage(scores, losses)
    return {
        "spearman_image": spearman(scores, 1 - losses),
        "aurc_image": aurc(counts, loss_sums),
        "eaurc_image": excess_aurc(counts, loss_sums, [np.ones(len(losses)), losses]),
        "risk_coverage": {"coverage": coverage, "risk": risk} if ranked.any() else None,
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1 on, ties sharing the mean of theirs."""
    from scipy.stats import rankdata  # here, since scipy is slow to import

    return rankdata(values)
