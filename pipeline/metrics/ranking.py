"""How well a score ranks one group above another."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata


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
    ranks = rankdata(np.concatenate([low, high]))
    above = ranks[len(low) :].sum() - len(high) * (len(high) + 1) / 2
    return float(above / (len(low) * len(high)))
