"""Scores that mean what they say: isotonic regression against scikit-learn, spreads against known ones, the sample."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.uncertainty.calibration import BoxSample, apply_isotonic, apply_spread, fit_isotonic, fit_spread
from pipeline.uncertainty.calibration.isotonic import MIN_SLOPE


def overconfident(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores in 0..1 and hits that come with probability score²."""
    rng = np.random.default_rng(seed)
    scores = rng.random(count)
    return scores, (rng.random(count) < scores**2).astype(float)


def mapped(parameters: dict, scores: np.ndarray) -> np.ndarray:
    return apply_isotonic(parameters, torch.from_numpy(scores)).numpy()


def d_ece(scores: np.ndarray, hits: np.ndarray, bins: int = 20) -> float:
    """Expected calibration error of detections: Σ n_b / n |precision - mean score| over equal bins of the score."""
    at = np.minimum((scores * bins).astype(int), bins - 1)
    gap = np.bincount(at, hits - scores, bins)
    return float(np.abs(gap).sum() / len(scores))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("digits", [2, 9])
def test_the_blocks_are_those_of_scikit_learn(weighted: bool, digits: int):
    isotonic = pytest.importorskip("sklearn.isotonic")
    scores, hits = overconfident(3000)
    scores = scores.round(digits)
    weights = np.random.default_rng(1).uniform(0.1, 3, 3000) if weighted else np.ones(3000)
    shifted = (hits - MIN_SLOPE * scores) / (1 - MIN_SLOPE)
    steps = isotonic.IsotonicRegression(y_min=0, y_max=1).fit_transform(scores, shifted, sample_weight=weights)
    levels = np.unique(steps)
    centres = [np.average(scores[steps == level], weights=weights[steps == level]) for level in levels]
    found = fit_isotonic(scores, hits, weights if weighted else None)
    assert 10 < len(levels) <= 100
    np.testing.assert_allclose(found["x"], [0, *centres, 1], rtol=1e-9)
    np.testing.assert_allclose(
        mapped(found, np.array(centres)), MIN_SLOPE * np.array(centres) + (1 - MIN_SLOPE) * levels
    )
    # Outside the outermost centres the map is level, but for the least slope.
    ends = mapped(found, np.array([0.0, 1.0]))
    np.testing.assert_allclose(
        ends, [(1 - MIN_SLOPE) * levels[0], MIN_SLOPE + (1 - MIN_SLOPE) * levels[-1]], atol=1e-12
    )


def test_what_is_learned_is_the_precision():
    scores, hits = overconfident(40_000)
    found = fit_isotonic(scores, hits)
    grid = np.linspace(0.05, 0.95, 50)
    assert np.abs(mapped(found, grid) - grid**2).max() < 0.06
    assert np.abs(mapped(found, grid) - grid**2).mean() < 0.02
    # Blocks have the mean of their targets, so all of them together have theirs.
    assert mapped(found, scores).mean() == pytest.approx(hits.mean(), abs=2e-3)


def test_calibration_lowers_the_error_on_other_boxes():
    found = fit_isotonic(*overconfident(5000))
    scores, hits = overconfident(20_000, 1)
    before, after = d_ece(scores, hits), d_ece(mapped(found, scores), hits)
    assert before > 0.15
    assert after < 0.025


def test_calibrated_scores_stay_nearly_what_they_are():
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    found = fit_isotonic(scores, (rng.random(20_000) < scores).astype(float))
    assert np.abs(mapped(found, scores) - scores).mean() < 0.02


def test_precision_times_overlap_is_a_target_too():
    scores, hits = overconfident(20_000)
    overlap = hits * np.random.default_rng(2).uniform(0.5, 1, 20_000)
    grid = np.linspace(0.1, 0.9, 20)
    assert np.abs(mapped(fit_isotonic(scores, overlap), grid) - 0.75 * grid**2).mean() < 0.02


@settings(max_examples=80)
@given(
    rows=st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1), st.floats(0, 5)), max_size=60),
    kind=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_map_rises_within_its_bounds(rows: list, kind: torch.dtype):
    scores, targets, weights = (np.array(column, float) for column in zip(*rows, strict=True)) if rows else [[]] * 3
    found = fit_isotonic(np.array(scores) / 50, np.array(targets), np.array(weights))
    x, y = np.array(found["x"]), np.array(found["y"])
    assert x[0] == 0
    assert x[-1] == 1
    assert (np.diff(x) > 0).all()
    assert ((y >= 0) & (y <= 1)).all()
    assert (np.diff(y) >= MIN_SLOPE * np.diff(x) - 1e-12).all()
    grid = torch.linspace(0, 1, 2001, dtype=kind)
    out = apply_isotonic(found, grid)
    assert out.dtype == kind
    assert (out.diff() > 0).all()
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize(
    ("scores", "targets", "at", "wanted"),
    [
        ([], [], 0.5, 0.5),
        ([0.3], [1.0], 0.3, 1.0),
        ([0.3], [0.0], 0.3, 0.0),
        ([0.0], [1.0], 0.0, 0.99),
        ([1.0], [0.0], 1.0, 0.01),
        ([0.2, 0.9, 0.5], [1, 1, 1], 0.9, 1.0),
        ([0.2, 0.9, 0.5], [0, 0, 0], 0.2, 0.0),
        ([0.5, 0.5], [0, 1], 0.5, 0.5),
        ([0.2, 0.9], [1, 0], 0.55, 0.5),
        ([math.nan, 0.4, 0.4], [1, 1, math.nan], 0.4, 1.0),
    ],
)
def test_few_points(scores: list, targets: list, at: float, wanted: float):
    found = fit_isotonic(np.array(scores, float), np.array(targets, float))
    assert mapped(found, np.array([at]))[0] == pytest.approx(wanted, abs=0.011)


def test_neither_order_nor_a_weight_of_nothing_matters():
    scores, hits = overconfident(500)
    scores = scores.round(2)
    order = np.random.default_rng(3).permutation(500)
    one, other = fit_isotonic(scores, hits), fit_isotonic(scores[order], hits[order])
    np.testing.assert_allclose(one["y"], other["y"], rtol=1e-12)
    more = fit_isotonic(np.append(scores, 0.9), np.append(hits, 0), np.append(np.ones(500), 0))
    assert one == more
    twice = fit_isotonic(np.tile(scores, 2), np.tile(hits, 2))
    np.testing.assert_allclose(one["y"], fit_isotonic(scores, hits, np.full(500, 2.0))["y"], rtol=1e-12)
    np.testing.assert_allclose(one["y"], twice["y"], rtol=1e-12)


def test_many_blocks_are_drawn_with_few_knots():
    scores = np.linspace(0, 1, 5001)
    found = fit_isotonic(scores, np.sqrt(scores))
    assert 90 < len(found["x"]) <= 103
    assert np.abs(mapped(found, scores) - np.sqrt(scores)).max() < 0.006


def test_scores_of_any_shape_outside_their_range_and_without_a_map():
    found = fit_isotonic(*overconfident(300))
    scores = torch.tensor([[-0.5, 0.0], [1.0, 1.5]])
    out = apply_isotonic(found, scores)
    assert out.shape == (2, 2)
    assert out[0, 0] == out[0, 1] < out[1, 0] == out[1, 1]
    assert apply_isotonic(found, torch.zeros(0)).shape == (0,)
    assert apply_isotonic(found, torch.tensor(0.5)).shape == ()
    assert apply_isotonic(None, scores) is scores


def made(count: int, scale: float, floor: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spreads of 0 to 8 % of boxes of 8 to 300 pixels, and errors drawn from the Gaussian."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(math.log(8), math.log(300), (count, 2)))[:, [0, 1, 0, 1]]
    std = size * rng.uniform(0, 0.08, (count, 4))
    return std, rng.normal(0, np.hypot(scale * std, floor * size)), size


@pytest.mark.parametrize(("scale", "floor"), [(1.0, 0.02), (2.5, 0.05), (0.5, 0.01), (4.0, 0.002)])
def test_the_spread_is_found(scale: float, floor: float):
    found = fit_spread(*made(4000, scale, floor))
    assert found["scale"] == pytest.approx(scale, rel=0.06)
    assert found["floor"] == pytest.approx(floor, rel=0.1)


def test_the_spread_found_is_the_most_likely_of_a_grid():
    std, error, size = made(300, 2.0, 0.03)

    def nll(scale: float, floor: float) -> float:
        sigma = np.hypot(scale * std, floor * size)
        return float(np.mean(np.log(sigma) + 0.5 * (error / sigma) ** 2))

    found = fit_spread(std, error, size)
    grid = [nll(a, b) for a in np.geomspace(0.1, 10, 60) for b in np.geomspace(0.001, 0.5, 60)]
    assert nll(**found) <= min(grid) + 1e-9


def test_the_spread_does_not_depend_on_the_size_of_pixels():
    rows = made(500, 2.0, 0.03)
    one, other = fit_spread(*rows), fit_spread(*(each * 7 for each in rows))
    assert other == pytest.approx(one, rel=1e-4)


def test_members_who_never_differ_leave_all_to_the_floor():
    _, error, size = made(2000, 0.0, 0.04)
    for std in (np.zeros_like(error), np.full_like(error, np.nan)):
        assert fit_spread(std, error, size) == pytest.approx({"scale": 1.0, "floor": 0.04}, rel=0.05)


def test_a_single_vote_counts_as_no_spread():
    std, error, size = made(2000, 2.0, 0.03)
    half = np.arange(2000) < 1000
    error[half] = np.random.default_rng(5).normal(0, 0.03 * size[half])
    unknown = np.where(half[:, None], np.nan, std)
    assert fit_spread(unknown, error, size) == fit_spread(np.nan_to_num(unknown), error, size)
    assert fit_spread(unknown, error, size) == pytest.approx({"scale": 2.0, "floor": 0.03}, rel=0.08)


def test_errors_as_large_as_the_box_are_covered_but_bounded():
    std, error, size = made(1000, 0.0, 0.03)
    error[:5] = size[:5]
    found = fit_spread(np.zeros_like(std), error, size)
    assert found["floor"] == pytest.approx(math.sqrt(np.mean((error / size) ** 2)), rel=1e-3)
    assert found["floor"] <= math.hypot(0.033, math.sqrt(5 / 1000))


@pytest.mark.parametrize("rows", [0, 1])
def test_a_spread_of_few_boxes_is_finite(rows: int):
    for error in (np.zeros((rows, 4)), np.full((rows, 4), 1e6), np.full((rows, 4), np.nan)):
        found = fit_spread(np.zeros((rows, 4)), error, np.full((rows, 4), 10.0))
        assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert fit_spread(np.ones((1, 4)), np.ones((1, 4)), np.zeros((1, 4))) == {"scale": 1.0, "floor": 0.0}


def test_applying_a_spread():
    std, size = torch.tensor([[3.0, 0.0, math.nan, 1.0]]), torch.tensor([[40.0, 20, 40, 20]])
    out = apply_spread({"scale": 2.0, "floor": 0.2}, std, size)
    torch.testing.assert_close(out, torch.tensor([[10.0, 4.0, 8.0, math.sqrt(20)]]))
    assert apply_spread(None, std, size) is std


def images(count: int) -> list[tuple]:
    """(name, columns...) of images with 0 to 11 boxes each."""
    rng = np.random.default_rng(0)
    out = []
    for n in range(count):
        boxes = n * 5 % 12
        one = [rng.random(boxes, np.float32) for _ in range(3)]
        four = [rng.normal(size=(boxes, 4)).astype(np.float32) for _ in range(3)]
        out.append((f"image{n}", *one, *four))
    return out


def sample_of(rows: list[tuple], size: int = 2**16) -> BoxSample:
    out = BoxSample(size)
    for row in rows:
        out.update(*row)
    return out


def test_a_sample_that_holds_all_boxes_is_all_boxes():
    rows = images(9)
    sample = sample_of(rows)
    assert (sample.images, sample.boxes) == (9, sum(len(row[1]) for row in rows))
    order = np.argsort(sample.rows().score)
    for column, values in enumerate(sample.rows(), 1):
        wanted = np.concatenate([row[column] for row in rows])
        at = np.argsort(np.concatenate([row[1] for row in rows]))
        np.testing.assert_array_equal(values[order], wanted[at])


@settings(max_examples=30)
@given(st.permutations(range(8)), st.integers(0, 8), st.integers(1, 60))
def test_neither_order_nor_sharding_changes_the_sample(order: list[int], cut: int, size: int):
    rows = images(8)
    whole = sample_of(rows, size)
    shuffled = [rows[n] for n in order]
    merged = BoxSample.from_state(sample_of(shuffled[cut:], size).state())
    merged.merge(sample_of(shuffled[:cut], size))
    assert (merged.images, merged.boxes) == (whole.images, whole.boxes)
    assert len(merged.rows().score) == min(size, whole.boxes)
    for mine, other in zip(merged.rows(), whole.rows(), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_the_sample_is_uniform():
    """Over many names each of 40 boxes is among the 10 kept a quarter of the time, whatever its score."""
    scores, wide = np.arange(40) / 40, np.zeros((40, 4))
    kept = np.zeros(40)
    for n in range(2000):
        sample = BoxSample(10)
        sample.update(f"name{n}", scores, scores, scores, wide, wide, wide)
        kept[(sample.rows().score * 40).round().astype(int)] += 1
    # Standard deviation of the count: sqrt(2000 * 0.25 * 0.75) = 19.4.
    assert np.abs(kept - 500).max() < 4.5 * 19.4


def test_images_without_a_box_and_scores_that_are_no_number():
    sample = BoxSample()
    none, wide = np.zeros(0), np.zeros((0, 4))
    sample.update("empty", none, none, none, wide, wide, wide)
    assert (sample.images, sample.boxes, len(sample.rows().std)) == (1, 0, 0)
    two, unknown = np.array([0.5, math.nan]), np.full((2, 4), math.nan)
    sample.update("broken", two, np.ones(2), np.ones(2), unknown, np.ones((2, 4)), np.ones((2, 4)))
    assert (sample.images, sample.boxes) == (2, 1)
    assert np.isnan(sample.rows().std).all()
