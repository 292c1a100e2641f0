"""Intervals of differences: closed forms, coverage, and what can not be compared."""

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.metrics import bootstrap
from tests.support.metric_cases import BACKGROUND, pixels, segmentation


def _rows(inter: np.ndarray, union: np.ndarray, nll: np.ndarray) -> dict[str, np.ndarray]:
    n = len(nll)
    columns = {"inter": inter, "union": union, "nll": nll, "brier": nll / 2, "pixels": np.full(n, 10)}
    return {"ids": np.array([f"{k:03d}" for k in range(n)]), **columns}


def _tables(seed: int, images: int = 40, gain: float = 0.0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    union = rng.integers(1, 50, (images, 3))
    shared = rng.normal(0, 1, images)
    return [
        _rows(rng.integers(0, union + 1), union, 10 + shared + rng.normal(0, 0.3, images) - shift)
        for shift in (gain, 0.0)
    ]


@pytest.mark.parametrize("figure", ["iou", "nll", "brier"])
@pytest.mark.parametrize("background", [None, 2])
def test_the_difference_and_its_interval_equal_a_plain_loop(figure, background):
    a, b = _tables(0)
    kept = [c for c in range(3) if figure != "iou" or c != background]

    def of(rows, picks):
        if figure != "iou":
            return rows[figure][picks].sum() / rows["pixels"][picks].sum()
        return np.mean(rows["inter"][picks][:, kept].sum(0) / rows["union"][picks][:, kept].sum(0))

    got = bootstrap.paired(a, b, figure, resamples=300, background=background)
    everything = np.arange(40)
    assert got["difference"] == pytest.approx(of(a, everything) - of(b, everything))
    picks = np.random.default_rng(0).integers(0, 40, (300, 40))
    low, high = np.percentile([of(a, each) - of(b, each) for each in picks], [2.5, 97.5])
    assert (got["low"], got["high"]) == (pytest.approx(low), pytest.approx(high))


def test_images_are_drawn_together_so_what_both_find_hard_cancels():
    a, b = _tables(1, 200)
    other = {**b, "nll": np.random.default_rng(9).permutation(b["nll"])}
    width = [np.subtract(*(bootstrap.paired(a, rows, "nll")[end] for end in ("high", "low"))) for rows in (b, other)]
    assert width[0] < width[1] / 2


def test_a_model_against_itself_differs_by_nothing():
    a, _ = _tables(2)
    assert bootstrap.paired(a, a, "iou") == {"difference": 0, "low": 0, "high": 0}
    got = bootstrap.paired_mean(a, [a, a, a], "nll")
    assert got == {"difference": pytest.approx(0, abs=1e-12), "low": pytest.approx(0), "high": pytest.approx(0)}


def test_the_mean_over_members_is_of_their_figures():
    a, b = _tables(3)
    c, _ = _tables(4)
    one, two = (bootstrap.paired(a, rows, "iou")["difference"] for rows in (b, c))
    assert bootstrap.paired_mean(a, [b, c], "iou")["difference"] == pytest.approx((one + two) / 2)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(200):
        got = bootstrap.paired(*_tables(seed, 60, gain=0.5), "nll", resamples=200)
        held += got["low"] <= -0.05 <= got["high"]
    assert 0.88 <= held / 200 <= 0.99


def test_many_images_are_drawn_in_parts_with_the_same_answer(monkeypatch):
    a, b = _tables(5)
    whole = bootstrap.paired(a, b, "iou", resamples=100)
    monkeypatch.setattr(bootstrap, "_MAX_WEIGHTS", 40 * 7)
    assert bootstrap.paired(a, b, "iou", resamples=100) == pytest.approx(whole)


def test_rows_of_the_metric_are_what_it_takes():
    metric = segmentation(pixels(0))
    rows, figures = metric.images_table(), metric.compute()
    worse = segmentation(pixels(0, sharpness=0.1))
    other = worse.compute()
    for name in ("nll", "brier"):
        got = bootstrap.paired(rows, worse.images_table(), name, 50)
        assert got["difference"] == pytest.approx(figures[name] - other[name])
    got = bootstrap.paired(rows, worse.images_table(), "iou", 50, background=BACKGROUND)
    means = [np.mean(each["iou"][:BACKGROUND]) for each in (figures, other)]
    assert got["difference"] == pytest.approx(means[0] - means[1])


def test_nothing_to_compare_gives_null_and_other_images_an_error():
    nothing = {"difference": None, "low": None, "high": None}
    empty = segmentation([]).images_table()
    assert bootstrap.paired(empty, empty, "iou") == nothing
    a, b = _tables(6)
    blank = {**a, "union": np.zeros_like(a["union"]), "inter": np.zeros_like(a["inter"])}
    assert bootstrap.paired(blank, blank, "iou", 20) == nothing
    with pytest.raises(InputError, match="found 40 and 39 images"):
        bootstrap.paired(a, {name: value[1:] for name, value in b.items()}, "iou")
