"""AUROC against its definition."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics.ranking import auroc

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(scores, scores)
def test_auroc_is_the_share_of_pairs_in_order(low: list[int], high: list[int]):
    pairs = [(h > n) + 0.5 * (h == n) for h in high for n in low]
    assert math.isclose(auroc(low, high), float(np.mean(pairs)), abs_tol=1e-12)


def test_auroc_of_nothing_is_nan():
    assert math.isnan(auroc([], [1.0]))
