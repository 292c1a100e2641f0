"""The review threshold: which images need no second look, as a promise about the risk of those.

    P( E[loss | score <= threshold] > risk ) <= delta     over draws of the calibration split

for images that come from where that split came from. Selective risk with a guarantee (SGR, Geifman & El-Yaniv
2017, 1705.08500), tested as in Learn-then-Test (Angelopoulos et al. 2021, 2110.01052), by betting.

Why it holds. Coverages q_1 > ... > q_J are fixed in advance; candidate j is the k_j-th smallest of the n scores, k_j =
ceil(q_j n). Given its value t, the points strictly below t are independent draws from those with score < t (ties only
make them fewer), so a p-value computed from their losses is valid for "the risk below t exceeds ``risk``" whatever the
risk does as a function of t. All J are tested at delta / J, so with probability 1 - delta no false one is accepted, and
the largest accepted may be chosen. Accepting means score < t: the threshold is the float32 just below t.
(Holm's larger levels would need p-values valid given all candidates at once, and these are not.)

Betting is the default because it sees small variance. Share accepted at n = 200, delta = 0.1, betting against
Hoeffding-Bentkus (``python -m benchmarks.quality.review_threshold``): informative score, risk = mean loss: 0.71,
0.35; useless score, risk = 1.5 times the mean loss: 0.98, 0.05. It is the weaker where losses are 0 or 1: risk = 1.5
times: 0.74, 0.86.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the split that are tried as what is accepted."""
MAX_REPEATS = 256
"""How many times the split is imagined repeated, to say which size would do."""
MAX_IMAGES = 1_000_000
"""How large the repeated split may be: bounds time and memory."""
_ORDER_SEED = 20_170_731
"""Of the order in which points are bet on: fixed, and unrelated to scores and losses."""

Method = Literal["betting", "hoeffding_bentkus"]


@dataclass(frozen=True)
class ReviewThreshold:
    """A review threshold, the promise that it keeps, and what it accepts of the calibration split."""

    value: float | None
    """Accept where ``uncertainty <= value``; None: nothing can be accepted."""
    risk: float
    """Largest mean loss of what is accepted."""
    delta: float
    """Probability that the promise is broken."""
    n: int
    """Images of the calibration split."""
    accepted: float
    """Share of the calibration split that is accepted."""
    mean_loss: float
    """Mean loss of all images of the split."""
    accepted_loss: float | None
    """Mean loss of what is accepted, in the split."""
    method: Method
    """Which p-values were used."""
    n_needed: int | None
    """With no threshold: how many such images would give one; None where no number would."""
    note: str
    """One sentence for a person."""

    def to_dict(self) -> dict[str, Any]:
        """As a bundle's manifest keeps it."""
        return asdict(self)


def fit_review_threshold(
    scores: ArrayLike,
    losses: ArrayLike,
    risk: float,
    delta: float = 0.1,
    method: Method = "betting",
    *,
    explain: bool = True,
) -> ReviewThreshold:
    """The threshold that accepts most among those that keep the promise.

    Args:
        scores: (n,) of the calibration split, higher = more doubtful; rounded to float32, as they are stored.
            NaN is never accepted.
        losses: (n,) in 0..1.
        risk: Largest mean loss of what is accepted, between 0 and 1.
        delta: Probability that the promise is broken, between 0 and 1.
        method: Of the p-values.
        explain: Whether to look for ``n_needed``, which takes most of the time.

    Raises:
        ValueError: Losses outside 0..1, other lengths, or risk or delta not between 0 and 1.
    """
    score, loss = np.asarray(scores, np.float32), np.asarray(losses, np.float64)
    if score.shape != loss.shape or score.ndim != 1:
        raise ValueError(f"wanted one loss for each score, found {score.shape} and {loss.shape}")
    if not ((loss >= 0) & (loss <= 1)).all():
        raise ValueError("losses must lie in 0..1")
    if not (0 < risk < 1 and 0 < delta < 1):
        raise ValueError(f"risk and delta must lie between 0 and 1, found {risk} and {delta}")
    # Infinitely doubtful: above every threshold.
    score = np.where(np.isnan(score), np.float32(np.inf), score)
    value = _largest_threshold(score, loss, risk, delta, method)
    n = len(loss)
    mean = float(loss.mean()) if n else 0.0
    is_accepted = score <= (np.float32(-np.inf) if value is None else np.float32(value))
    share = float(is_accepted.mean()) if n else 0.0
    accepted_loss = float(loss[is_accepted].mean()) if is_accepted.any() else None
    needed = _images_needed(score, loss, risk, delta, method) if value is None and explain else None
    reason = "" if value is not None else _reason(needed, score, loss, risk)
    note = _note(value, risk, delta, n, share, reason)
    return ReviewThreshold(
        value=value,
        risk=risk,
        delta=delta,
        n=n,
        accepted=share,
        mean_loss=mean,
        accepted_loss=accepted_loss,
        method=method,
        n_needed=needed,
        note=note,
    )


def _note(value: float | None, risk: float, delta: float, n: int, share: float, reason: str) -> str:
    """What is promised and what is accepted, or why nothing is."""
    promise = f"mean loss at most {risk:g} with probability {1 - delta:g}"
    if value is not None:
        return f"review threshold {value:.4g}: {promise}; accepts {share:.0%} of {n} calibration images"
    return f"no threshold keeps the promise ({promise}) on {n} calibration images, so all go to review; {reason}"


def _reason(needed: int | None, score: np.ndarray, loss: np.ndarray, risk: float) -> str:
    """Why there is no threshold, and what would help."""
    if needed is not None:
        return f"about {needed} calibration images like these would do"
    candidate_losses = _candidate_losses(score, loss)
    if not candidate_losses:
        return "no image is surer than the others: the scores are missing, or all alike"
    if min(candidate_losses) >= risk:
        return "nor would more images like these do: even the surest have too high a loss"
    return "far more images would be needed, or a larger risk"


def _candidates(score: np.ndarray) -> list[np.float32]:
    """Thresholds that are tried, largest first; those with no score below are left out."""
    ranked = np.sort(score)
    tried = [ranked[math.ceil(coverage * len(score)) - 1] for coverage in COVERAGES] if len(score) else []
    return [threshold for threshold in tried if np.isfinite(threshold) and threshold > ranked[0]]


def _candidate_losses(score: np.ndarray, loss: np.ndarray) -> list[float]:
    """Mean loss below each candidate; repeating the split changes none of them."""
    return [float(loss[score < candidate].mean()) for candidate in _candidates(score)]


def _largest_threshold(score: np.ndarray, loss: np.ndarray, risk: float, delta: float, method: Method) -> float | None:
    """The largest threshold whose test is passed."""
    # Betting goes through the points one by one, so their order must not follow the scores.
    order = np.random.default_rng(_ORDER_SEED).permutation(len(score))
    score, loss = score[order], loss[order]
    # All candidates share delta, those that are left out too: their number must not depend on the scores.
    level = delta / len(COVERAGES)
    for candidate in _candidates(score):
        if p_value(loss[score < candidate], risk, level, method) <= level:
            return float(np.nextafter(candidate, np.float32(-np.inf)))
    return None


def p_value(losses: np.ndarray, risk: float, level: float, method: Method = "betting") -> float:
    """p-value of "the mean loss exceeds ``risk``", from independent losses in 0..1; valid at any n.

    ``betting``: one over the largest capital of a gambler who bets that losses fall below ``risk``, with stakes set
    from the losses before (Waudby-Smith & Ramdas 2024, 2010.09686, predictable plug-in); ``level`` only tunes the
    stakes. ``hoeffding_bentkus``: the smaller of two closed bounds of the mean (Bates et al. 2021, 2101.02703).
    """
    n = len(losses)
    if method == "hoeffding_bentkus":
        return _hoeffding_bentkus(float(losses.mean()), n, risk)
    # Running mean and variance, begun with one imagined loss of 1/2 and a variance of 1/4, for the first stakes.
    num_seen = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(losses)) / (1 + num_seen)
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / (1 + num_seen)
    # A stake may depend on the losses before it alone; else the p-value is not valid.
    variance_before = np.concatenate([[0.25], variance[:-1]])
    # Below 1 / (1 - risk), so that the capital stays positive whatever the loss is.
    stake = np.minimum(np.sqrt(2 * math.log(1 / level) / (n * variance_before)), 0.99 / (1 - risk))
    # The logarithm of the capital after each bet; by Ville's inequality its highest value counts.
    capital = np.cumsum(np.log1p(-stake * (losses - risk)))
    return float(min(1.0, math.exp(-max(0.0, capital.max()))))


def _hoeffding_bentkus(mean: float, n: int, risk: float) -> float:
    """The smaller of Hoeffding's bound, in its form with the relative entropy, and e times the binomial tail."""
    if mean >= risk:
        return 1.0
    from scipy.special import bdtr  # here, since scipy is slow to import

    divergence = (1 - mean) * math.log((1 - mean) / (1 - risk)) + (mean * math.log(mean / risk) if mean else 0.0)
    bentkus = math.e * float(bdtr(math.ceil(n * mean - 1e-9), n, risk))
    return min(1.0, math.exp(-n * divergence), bentkus)


def _images_needed(score: np.ndarray, loss: np.ndarray, risk: float, delta: float, method: Method) -> int | None:
    """Images that would do if they were like these: the split repeated; None if the most that is tried is too few."""
    if min(_candidate_losses(score, loss), default=1.0) >= risk:
        return None
    max_repeats = min(MAX_REPEATS, MAX_IMAGES // len(loss))

    def passes(repeats: int) -> bool:
        return _largest_threshold(np.tile(score, repeats), np.tile(loss, repeats), risk, delta, method) is not None

    # Doubled until it passes, then halved between the last that failed and the first that passed.
    low, high = 1, 2
    while high <= max_repeats and not passes(high):
        low, high = high, 2 * high
    if high > max_repeats:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high * len(loss)
