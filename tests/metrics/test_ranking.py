"""Ranking figures against their definitions, scipy, scikit-learn and torch-uncertainty."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.metrics import ranking
from pipeline.metrics.ranking import auroc, fpr_at_tpr

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12)
counts = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6)


@given(scores, scores)
def test_auroc_is_the_share_of_pairs_in_order(low: list[int], high: list[int]):
    pairs = [(h > n) + 0.5 * (h == n) for h in high for n in low]
    assert math.isclose(auroc(low, high), float(np.mean(pairs)), abs_tol=1e-12)


def test_auroc_of_nothing_is_nan():
    assert math.isnan(auroc([], [1.0]))


@given(scores, scores, st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]))
def test_fpr_is_that_of_the_highest_threshold_that_enough_positives_reach(low, high, tpr):
    reached = [t for t in {*low, *high} if np.mean(np.array(high) >= t) >= tpr - 1e-12]
    assert fpr_at_tpr(low, high, tpr) == np.mean(np.array(low) >= max(reached))


@settings(max_examples=25)
@given(scores, scores)
def test_fpr_equals_torch_uncertainty(low, high):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch_uncertainty")
        from torch_uncertainty.metrics.classification import FPR95

        theirs = FPR95(pos_label=1)
        theirs.update(torch.tensor([*low, *high]).float(), torch.tensor([0] * len(low) + [1] * len(high)))
        assert fpr_at_tpr(low, high) == pytest.approx(float(theirs.compute()))


def test_fpr_of_nothing_is_nan_and_of_twenty_positives_leaves_one_out():
    assert math.isnan(fpr_at_tpr([1.0], []))
    assert fpr_at_tpr([0.5, 1.5], np.arange(20)) == 0.5


def _rows(groups: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(bin, wrong) of every row of (right, wrong) counts by bin."""
    bins = [[k] * (right + wrong) for k, (right, wrong) in enumerate(groups)]
    wrong = [[0] * right + [1] * wrong for right, wrong in groups]
    return np.array(sum(bins, [])), np.array(sum(wrong, []))


@given(counts)
def test_auroc_of_counts_equals_that_of_rows(groups):
    bins, hit = _rows(groups)
    got = ranking.auroc_of_counts(*np.array(groups).T)
    assert got == pytest.approx(auroc(bins[hit == 0], bins[hit == 1]), nan_ok=True)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=3))
def test_average_precision_of_counts_is_the_mean_over_orders_of_ties(groups):
    metrics = pytest.importorskip("sklearn.metrics")
    got = ranking.average_precision_of_counts(*np.array(groups).T)
    bins, hit = _rows(groups)
    if not hit.sum():
        assert math.isnan(got)
        return
    inside = [set(itertools.permutations(hit[bins == k])) for k in range(len(groups))]
    orders = [np.concatenate(order) for order in itertools.product(*inside)]
    areas = [metrics.average_precision_score(order, np.arange(len(hit))) for order in orders]
    assert got == pytest.approx(np.mean(areas))


@given(counts)
def test_risk_coverage_area_is_the_mean_over_orders_of_ties(groups):
    """Group by group: the mean over orders of a running mean is the running mean of the group's mean loss."""
    right, wrong = np.array(groups).T
    bins, hit = _rows(groups)
    got = ranking.aurc(right + wrong, wrong)
    if not len(bins):
        assert math.isnan(got)
        return
    rate = np.array([hit[bins == b].mean() for b in bins])
    assert got == pytest.approx((np.cumsum(rate) / np.arange(1, len(bins) + 1)).mean())
    best = (np.cumsum(np.sort(hit)) / np.arange(1, len(bins) + 1)).mean()
    oracle = [[right.sum(), wrong.sum()], [0, wrong.sum()]]
    excess = ranking.excess_aurc(right + wrong, wrong, oracle)
    assert excess >= 0
    assert excess == pytest.approx(got - best, abs=1e-9)


def test_ties_are_the_mean_over_all_their_orders():
    losses = [0.1, 0.9, 0.4, 0.2]
    areas = [np.mean(np.cumsum([0.3, *order, 0.8]) / np.arange(1, 7)) for order in itertools.permutations(losses)]
    values = ranking.group_ties([0, 1, 1, 1, 1, 2], [0.3, *losses, 0.8])
    assert ranking.aurc(*values) == pytest.approx(np.mean(areas))


def test_risk_coverage_area_survives_billions_of_rows():
    number, lost = np.array([10**9, 1, 10**9]), np.array([10**6, 1, 5 * 10**8])
    half, rate = 1e6 / 1e9, 0.5
    # The second half's mean of (L0 + k / 2) / (N0 + k) is r + (L0 / N0 - r) ln 2.
    assert ranking.aurc(number, lost) == pytest.approx((half + rate + (half - rate) * math.log(2)) / 2, rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=30), st.integers(1, 12))
def test_the_curve_ends_at_the_mean_and_its_parts_are_running_means(rows, points):
    doubt, losses = np.array([s for s, _ in rows]), np.array([loss for _, loss in rows])
    coverage, risk = ranking.risk_coverage(doubt, losses, points)
    assert len(coverage) <= points
    assert (np.diff(coverage) > 0).all()
    assert (coverage[-1], risk[-1]) == (1, pytest.approx(losses.mean(), abs=1e-12))
    means = np.array([losses[doubt == s].mean() for s in np.sort(doubt)])
    running = np.cumsum(means) / np.arange(1, len(means) + 1)
    kept = np.round(coverage * len(rows)).astype(int)
    assert risk == pytest.approx(running[kept - 1], abs=1e-12)


def test_the_curve_of_many_rows_has_a_hundred_and_one_points():
    rng = np.random.default_rng(0)
    coverage, risk = ranking.risk_coverage(rng.random(5000), rng.random(5000))
    assert (len(coverage), len(risk)) == (101, 101)
    assert len(ranking.risk_coverage([], [])[0]) == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=20))
def test_spearman_equals_scipy(pairs):
    first, second = np.array(pairs).T
    got = ranking.spearman(first, second)
    if len(set(first)) > 1 and len(set(second)) > 1:
        assert got == pytest.approx(stats.spearmanr(first, second).statistic)
    else:
        assert math.isnan(got)


def test_spearman_of_nothing_is_nan():
    assert math.isnan(ranking.spearman([], []))
