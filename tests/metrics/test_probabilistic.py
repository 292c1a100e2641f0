"""Boxes as distributions: golden values of the authors' PDQ, whole heat maps, and integrals."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.special import ndtr
from scipy.stats import norm

from pipeline.metrics import DetectionMetric
from pipeline.metrics.probabilistic import assign, crps, nll, spatial_quality
from tests.support.metric_cases import box_images, detection

TRUTH = np.array([[20.0, 30, 60, 70]])
"""The authors' [20, 30, 59, 69], inclusive pixel indices, as continuous edges."""


def _quality(box, std, truth, size=(100, 100)) -> float:
    rows, columns, values = spatial_quality(np.asarray(box, float)[None], np.broadcast_to(std, (1, 4)), truth, size)
    assert (rows.tolist(), columns.tolist()) == (([0], [0]) if len(values) else ([], []))
    return float(values.sum())


@pytest.mark.parametrize(
    ("variance", "shift", "wanted", "within"),
    [(0, 0, 1, 1e-6), (0, 2, 0.001862, 1e-6), (1, 0, 0.896875, 1e-4), (1, 2, 0.636326, 1e-4), (4, 0, 0.821994, 1e-4),
     (4, 2, 0.702276, 1e-4), (25, 0, 0.628265, 1e-4), (25, 2, 0.592375, 1e-4)],
)  # fmt: skip
def test_pdq_is_the_authors(variance, shift, wanted, within):
    # Their program approximates the heat map outside of a region, in float32: hence the fifth digit.
    std = np.sqrt(variance)
    assert _quality(TRUTH[0] + shift, std, TRUTH) == pytest.approx(wanted, abs=within)
    metric = DetectionMetric(2, 0.5)
    more = {"std": np.full((1, 4), std), "probabilities": [[0.05, 0.9, 0.05]], "size": (100, 100)}
    metric.update("a", TRUTH + shift, [0.9], [1], TRUTH, [1], **more)
    got = metric.compute()
    assert got["pdq"] == pytest.approx(np.sqrt(0.9 * wanted), abs=within)
    assert (got["pdq_label"], got["pdq_spatial"]) == pytest.approx((0.9, wanted), abs=within)


def _whole(box: np.ndarray, std: np.ndarray, truth: np.ndarray, height: int, width: int) -> float:
    """Q_S from a heat map of the whole image."""

    def part(inside, spread):
        return ndtr(inside / spread) if spread > 0 else np.clip(inside, 0, 1)

    x, y = np.arange(width), np.arange(height)
    in_x = part(x + 1 - box[0], std[0]) * part(box[2] - x, std[2])
    in_y = part(y + 1 - box[1], std[1]) * part(box[3] - y, std[3])
    heat = np.outer(in_y, in_x)
    heat[heat < 0.0027] = 0
    mask = np.outer((y + 0.5 >= truth[1]) & (y + 0.5 < truth[3]), (x + 0.5 >= truth[0]) & (x + 0.5 < truth[2]))
    fore = np.log(np.maximum(heat[mask], 1e-14)).sum()
    back = np.log(np.maximum(1 - heat[~mask & (heat > 0)], 1e-14)).sum()
    return float(np.exp((fore + back) / mask.sum()))


EDGE = st.floats(0, 60, width=32)


@settings(max_examples=80)
@given(
    box=st.tuples(EDGE, EDGE, st.floats(1, 60), st.floats(1, 60)),
    std=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, 3.0, 9.0, 25.0])] * 4),
    move=st.tuples(*[st.floats(-6, 6)] * 4),
)
def test_runs_and_sums_give_what_a_whole_heat_map_gives(box, std, move):
    corners = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]])
    truth = np.clip(corners + move, 0, [95, 75, 97, 77])
    truth[2:] = np.maximum(truth[2:], truth[:2] + 2)
    wanted = _whole(corners, np.array(std), truth, 80, 100)
    got = _quality(corners, np.array(std), truth[None], (80, 100))
    assert got == pytest.approx(wanted if wanted > 1e-8 else 0, rel=1e-6, abs=2e-8)


@pytest.mark.parametrize("std", [40.0, 90.0])
def test_unsure_edges_are_taken_in_steps(std):
    box, truth = np.array([300.0, 200, 700, 900]), np.array([[310.0, 190, 720, 880]])
    wanted = _whole(box, np.full(4, std), truth[0], 1200, 1000)
    assert wanted > 0.2
    assert _quality(box, std, truth, (1200, 1000)) == pytest.approx(wanted, rel=1e-3)


def test_a_large_image_takes_little_memory():
    box, truth = np.array([[100.0, 100, 3600, 2800]] * 4), np.array([[100.0, 100, 3600, 2800]] * 3)
    tracemalloc.start()
    _, _, values = spatial_quality(box, np.array([[0.0], [2.0], [20.0], [200.0]]) * np.ones(4), truth, (3000, 4000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(values) == 12
    assert values[0] == pytest.approx(1)
    assert (np.diff(values[::3]) < 0).all()
    assert peak < 20e6


def test_unknown_spread_counts_as_none_and_a_tiny_object_has_a_pixel():
    assert _quality(TRUTH[0] + 2, np.nan, TRUTH) == _quality(TRUTH[0] + 2, 0.0, TRUTH)
    speck = np.array([[10.6, 10.6, 10.9, 10.9]])
    assert _quality([10, 10, 11, 11], 0.0, speck) == pytest.approx(1)
    assert len(spatial_quality(np.array([[80.0, 80, 90, 90]]), np.ones((1, 4)), TRUTH)[2]) == 0
    assert len(spatial_quality(np.zeros((1, 4)), np.zeros((1, 4)), np.zeros((0, 4)))[2]) == 0


def test_beyond_the_image_nothing_is_asked():
    truth = np.array([[60.0, 60, 100, 100]])
    inside, anywhere = _quality(truth[0], 3.0, truth), _quality(truth[0], 3.0, truth, (2**20, 2**20))
    assert inside > anywhere + 0.01
    assert inside == pytest.approx(_whole(truth[0], np.full(4, 3.0), truth[0], 100, 100))


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), boxes=st.integers(1, 9), true=st.integers(1, 9), some=st.floats(0, 1))
def test_the_assignment_is_the_hungarian_one(seed, boxes, true, some):
    rng = np.random.default_rng(seed)
    table = rng.random((boxes, true)) * (rng.random((boxes, true)) < some)
    rows, columns = (each.ravel() for each in np.indices(table.shape))
    pairs = assign(rows, columns, table.ravel(), table.shape)
    assert len(np.unique(rows[pairs])) == len(np.unique(columns[pairs])) == len(pairs)
    best = linear_sum_assignment(table, maximize=True)
    assert table.ravel()[pairs].sum() == pytest.approx(table[best].sum())
    assert (table.ravel()[pairs] > 0).all()


def _pdq(found, scores, vectors, true, labels, **more):
    metric = DetectionMetric(2)
    std = np.zeros((len(found), 4))
    metric.update("a", found, scores, np.zeros(len(found)), true, labels, std=std, probabilities=vectors, **more)
    return metric.compute()["pdq"]


def test_false_and_missed_boxes_lower_pdq_and_crowds_do_not():
    box, far, third = [0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]
    sure = [[0.64, 0.2, 0.16]]
    assert _pdq([box], [0.9], sure, [box], [0]) == pytest.approx(0.8)
    assert _pdq([box, far], [0.9, 0.9], sure * 2, [box, third], [0, 0]) == pytest.approx(0.8 / 3)
    assert _pdq([box, far], [0.9, 0.2], sure * 2, [box], [0]) == pytest.approx(0.8)
    assert _pdq([box, far], [0.9, 0.9], sure * 2, [box, far], [0, 0], crowd=[False, True]) == pytest.approx(0.8)
    # The other class's share counts where that is the truth.
    assert _pdq([box], [0.9], sure, [box], [1]) == pytest.approx(np.sqrt(0.2))


@pytest.mark.parametrize("missing", ["std", "probabilities"])
def test_what_was_not_given_is_null(missing):
    rows = box_images(3, 4, 2)
    whole = detection(rows, 2).compute()
    rows[2] |= {missing: None}
    got = detection(rows, 2).compute()
    gone = {"pdq", "pdq_spatial", "pdq_label"} | ({"nll_box", "crps_box"} if missing == "std" else set())
    assert {name for name in whole if whole[name] is not None and got[name] is None} == gone


def test_likelihood_of_edges_by_hand():
    metric = DetectionMetric(1)
    found = [[0, 0, 100, 100], [200, 0, 300, 100], [400, 0, 500, 100], [600, 0, 700, 100]]
    true = [[3, 0, 100, 100], [200, 4, 300, 100], [600, 0, 700, 100]]
    std = [[2, 1, 1, 1], [np.nan, np.nan, 5, 0.5], [9, 9, 9, 9], [7, 7, 7, 7]]
    # The third is wrong and the fourth is not said.
    metric.update("a", found, [0.9, 0.8, 0.7, 0.1], np.zeros(4), true, np.zeros(3), std=std)
    got = metric.compute()
    spreads, errors = [2, 1, 1, 1, 1, 1, 5, 1], [-3, 0, 0, 0, 0, -4, 0, 0]
    assert got["nll_box"] == pytest.approx(-norm.logpdf(errors, scale=spreads).mean())
    sharp = crps(np.array([-3.0, 0, 0, 0, 0, 0]), np.array([2, 1, 1, 1, 5, 0.5]))
    assert got["crps_box"] == pytest.approx((sharp.sum() + 4) / 8)
    assert got["pdq"] is None


@pytest.mark.parametrize(("error", "std"), [(0.0, 1.0), (2.5, 1.0), (-4.0, 3.0), (1.0, 0.05)])
def test_crps_is_the_integral_of_the_squared_distance(error, std):
    t = np.linspace(-60, 60, 1_200_001)
    square = (ndtr(t / std) - (t >= error)) ** 2
    assert crps(np.array(error), np.array(std)) == pytest.approx(square.sum() * (t[1] - t[0]), abs=1e-4)
    assert nll(np.array(error), np.array(std)) == pytest.approx(-norm.logpdf(error, scale=std))


def test_crps_of_a_sure_edge_is_its_distance():
    assert crps(np.array([-3.0, 2.0]), np.zeros(2)).tolist() == [3, 2]
    assert crps(np.array(-3.0), np.array(1e-6)) == pytest.approx(3, abs=1e-5)
