"""The review threshold keeps its promise, and accepts something."""

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from benchmarks.quality.review_threshold import POPULATIONS, draw, repeated_splits
from pipeline.uncertainty.calibration import fit_review_threshold
from pipeline.uncertainty.calibration.review_threshold import p_value

DELTA = 0.1


def too_many(violations: int, draws: int, delta: float = DELTA) -> bool:
    """More than ``delta`` of the draws, beyond chance at one in a thousand."""
    return binomtest(violations, draws, delta, alternative="greater").pvalue < 1e-3


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize("factor", [0.8, 1.5])
def test_the_promise_holds_over_2000_draws(name: str, factor: float):
    found = draw(name, factor, DELTA, n=200, draws=2000, seed=1)
    assert found["draws"] == 2000
    assert not too_many(found["violations"], 2000), found


@pytest.mark.long
@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize("n", [50, 1000])
@pytest.mark.parametrize("delta", [0.05, 0.3])
def test_the_promise_holds_at_other_sizes(name: str, n: int, delta: float):
    for method in ("betting", "hoeffding_bentkus"):
        found = draw(name, 1.0, delta, n=n, draws=2000, seed=2, method=method)
        assert not too_many(found["violations"], 2000, delta), (method, found)


@pytest.mark.parametrize("n", [200, 400])
def test_an_informative_score_lets_half_pass(n: int):
    for name in ("informative", "binary losses", "ties"):
        assert draw(name, 1.5, DELTA, n=n, draws=200, seed=3)["accepted"] >= 0.5, name


@pytest.mark.parametrize("method", ["betting", "hoeffding_bentkus"])
@pytest.mark.parametrize("kind", ["constant", "coin", "skewed"])
def test_a_p_value_is_small_no_more_often_than_it_says(method: str, kind: str):
    """At the edge of the hypothesis (the mean is the risk), where it is hardest."""
    rng = np.random.default_rng(0)
    losses = {
        "constant": lambda: np.full(60, 0.2),
        "coin": lambda: (rng.random(60) < 0.2).astype(float),
        "skewed": lambda: rng.beta(0.25, 1.0, 60),
    }[kind]
    small = [p_value(losses(), 0.2, 0.05, method) for _ in range(2000)]  # pyright: ignore[reportArgumentType]
    for level in (0.01, 0.05, 0.2):
        assert not too_many(int((np.array(small) <= level).sum()), 2000, level), level


def test_hoeffding_bentkus_in_closed_form():
    """No loss in n: Hoeffding says (1 - risk)^n."""
    assert p_value(np.zeros(30), 0.1, 0.1, "hoeffding_bentkus") == pytest.approx(0.9**30)
    assert p_value(np.full(30, 0.2), 0.1, 0.1, "hoeffding_bentkus") == 1.0
    divergence = 0.05 * math.log(0.05 / 0.2) + 0.95 * math.log(0.95 / 0.8)
    assert p_value(np.full(100, 0.05), 0.2, 0.1, "hoeffding_bentkus") <= math.exp(-100 * divergence) * (1 + 1e-9)


def test_the_threshold_is_what_was_counted():
    rng = np.random.default_rng(0)
    scores = rng.random(300)
    losses = 0.4 * scores * rng.random(300)
    found = fit_review_threshold(scores, losses, risk=0.09)
    assert found.value is not None
    inside = scores.astype(np.float32) <= np.float32(found.value)
    assert found.accepted == inside.mean()
    assert found.accepted_loss == pytest.approx(losses[inside].mean())
    assert found.accepted_loss < 0.09
    assert (found.n, found.risk, found.delta, found.n_needed) == (300, 0.09, 0.1, None)
    assert "accepts" in found.note
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


def test_more_risk_or_less_certainty_never_accepts_fewer():
    rng = np.random.default_rng(1)
    scores = rng.random(300)
    losses = 0.5 * scores**2
    by_risk = [fit_review_threshold(scores, losses, risk).accepted for risk in (0.02, 0.05, 0.1, 0.2, 0.4)]
    by_delta = [fit_review_threshold(scores, losses, 0.1, delta).accepted for delta in (0.01, 0.1, 0.5)]
    assert by_risk == sorted(by_risk)
    assert by_delta == sorted(by_delta)
    assert by_risk[0] < by_risk[-1]


def test_only_the_order_of_scores_matters():
    rng = np.random.default_rng(2)
    scores = rng.random(200)
    losses = 0.5 * scores
    a, b = fit_review_threshold(scores, losses, 0.2), fit_review_threshold(np.exp(3 * scores), losses, 0.2)
    assert (a.accepted, a.accepted_loss) == (b.accepted, b.accepted_loss)


def test_without_a_threshold_it_says_how_many_images_would_do():
    rng = np.random.default_rng(3)
    scores = rng.random(12)
    losses = 0.1 + 0.05 * rng.random(12)
    few = fit_review_threshold(scores, losses, risk=0.16)
    assert few.value is None
    assert (few.accepted, few.accepted_loss) == (0.0, None)
    assert few.n_needed is not None
    assert few.n_needed > 12
    assert f"about {few.n_needed} calibration images" in few.note
    repeats = few.n_needed // 12
    assert fit_review_threshold(np.tile(scores, repeats), np.tile(losses, repeats), 0.16).value is not None
    never = fit_review_threshold(scores, losses, risk=0.05)
    assert (never.value, never.n_needed) == (None, None)
    assert "even the surest" in never.note


@pytest.mark.parametrize(
    ("scores", "losses", "why"),
    [
        ([], [], "missing, or all alike"),
        ([0.5], [0.0], "missing, or all alike"),
        ([0.5] * 100, [0.0] * 100, "missing, or all alike"),
        ([math.nan] * 100, [0.0] * 100, "missing, or all alike"),
        (np.linspace(0, 1, 100), [0.3] * 100, "even the surest have too high a loss"),
        (np.linspace(0, 1, 100), [0.19989999] * 100, "far more images"),
    ],
)
def test_the_reason_why_there_is_no_threshold_is_true(scores: list[float], losses: list[float], why: str):
    found = fit_review_threshold(scores, losses, risk=0.1999)
    assert (found.value, found.n_needed) == (None, None)
    assert why in found.note


def test_many_hopeless_images_are_not_repeated():
    found = fit_review_threshold(np.linspace(0, 1, 600_000), np.full(600_000, 0.0999999), risk=0.1)
    assert (found.value, found.n_needed) == (None, None)
    assert "far more images" in found.note


def test_odd_input():
    assert fit_review_threshold([], [], 0.1).value is None
    assert fit_review_threshold([0.5] * 100, [0.0] * 100, 0.1).value is None, "ties cannot be told apart"
    scores = np.r_[np.linspace(0, 1, 200), np.full(40, np.nan)]
    found = fit_review_threshold(scores, np.r_[np.zeros(200), np.ones(40)], 0.1)
    assert found.value is not None
    assert found.value < 1
    with pytest.raises(ValueError, match="0..1"):
        fit_review_threshold([0.1], [1.5], 0.1)
    with pytest.raises(ValueError, match="0..1"):
        fit_review_threshold([0.1], [math.nan], 0.1)
    for risk, delta in ((0.0, 0.1), (1.0, 0.1), (0.1, 0.0), (0.1, 1.0), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="risk and delta must lie between 0 and 1"):
            fit_review_threshold([0.1], [0.5], risk, delta)
    with pytest.raises(ValueError, match="one loss for each score"):
        fit_review_threshold([0.1, 0.2], [0.5], 0.1)


def test_repeated_splits_count_what_happens_to_the_rest():
    rng = np.random.default_rng(4)
    scores = rng.random(400)
    losses = 0.3 * scores
    found = repeated_splits(scores, losses, risk=0.2, delta=0.1, n=200, repeats=50, seed=0)
    assert found["repeats"] == 50
    assert found["accepted"] > 0.5
    assert found["accepted_loss"] < 0.2
    assert found["violations"] == 0
