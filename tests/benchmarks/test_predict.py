"""The benchmark of batch inference with little data: what it counts and compares, never how fast it is."""

import json
import math

import pytest

from benchmarks.speed import predict

TINY = ["--small", "--count", "12", "--model-count", "6", "--size", "64x48", "--side", "64"]


def test_agreement_of_masks_by_hand():
    first = {"a": bytes([0, 0, 1, 1]), "b": bytes([1, 1])}
    second = {"a": bytes([0, 1, 1, 1]), "b": bytes([1, 1])}
    # Class 0: 1 of 2 pixels; class 1: 4 of 5.
    assert predict.agreement(first, second) == (pytest.approx((1 / 2 + 4 / 5) / 2), pytest.approx(5 / 6))
    assert predict.agreement(first, first) == (1, 1)
    with pytest.raises(RuntimeError, match="1 and 2, 1 in both"):
        predict.agreement({"a": first["a"]}, second)


@pytest.mark.long
def test_both_sides_write_the_same_masks(capsys: pytest.CaptureFixture[str], ray_local: None):
    figures, ratios = predict.main(TINY)
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert list(record) == ["benchmark", "machine", "figures", "ratios"]
    assert record["benchmark"] == "predict"
    assert record["ratios"] == ratios
    assert set(ratios) == {"stub steady", "stub job", "unet_r34 steady", "unet_r34 job"}
    assert all(math.isfinite(value) and value > 0 for value in ratios.values())
    assert [figures[name]["images"] for name in ("stub", "unet_r34")] == [12, 6]
    for found in figures.values():
        assert found["equal_pixels"] > 0.97
        assert set(found) >= {predict.OURS, predict.RIVAL}
