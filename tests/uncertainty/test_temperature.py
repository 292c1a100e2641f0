"""The streamed sample stands for all pixels; scaling finds what is known, and never makes it worse."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.schema import VOID
from pipeline.uncertainty import calibration
from pipeline.uncertainty.calibration import PixelSample
from pipeline.uncertainty.calibration.pixel_sample import uniform_hash


def overconfident(
    images: int, classes: int = 3, factor: float = 2.0, seed: int = 0, side: int = 40
) -> list[tuple[str, Tensor, Tensor]]:
    """Labels drawn from softmax(z), probabilities softmax(factor z): the right temperature is ``factor``."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for n in range(images):
        z = 2.5 * torch.randn(classes, side, side, generator=generator)
        drawn = torch.multinomial(z.softmax(0).flatten(1).T, 1, generator=generator)
        target = drawn.reshape(side, side).to(torch.uint8)
        target[torch.rand(side, side, generator=generator) < 0.1] = VOID
        out.append((f"image{n}", (factor * z).softmax(0), target))
    return out


def sample_of(rows: list[tuple[str, Tensor, Tensor]], size: int = 2**17) -> PixelSample:
    out = PixelSample(len(rows[0][1]), size)
    for image_id, probabilities, target in rows:
        out.update(probabilities, target, image_id)
    return out


def nll(probabilities: Tensor, target: Tensor) -> float:
    keep = target != VOID
    picked = probabilities.flatten(1)[:, keep.flatten()]
    return float(-picked.gather(0, target[keep].long()[None]).log().mean())


def test_a_sample_that_holds_all_pixels_is_all_pixels():
    rows = overconfident(3)
    sample = sample_of(rows)
    log, labels, weights = sample.rows()
    assert (sample.images, sample.pixels) == (3, sum(int((target != VOID).sum()) for _, _, target in rows))
    assert len(labels) == sample.pixels
    assert (weights == 1).all()
    wanted = sum(nll(p, t) * int((t != VOID).sum()) for _, p, t in rows)
    assert -log[np.arange(len(labels)), labels].sum() == pytest.approx(wanted, rel=1e-5)


def test_a_small_sample_estimates_sums_over_all():
    rows = overconfident(12)
    log, labels, _ = sample_of(rows).rows()
    small = sample_of(rows, 2000)
    part, some, weights = small.rows()
    assert len(some) == 2000
    assert weights.sum() == pytest.approx(small.pixels, rel=0.1)
    for label in range(3):
        assert weights[some == label].sum() == pytest.approx((labels == label).sum(), rel=0.25)
    wanted = -log[np.arange(len(labels)), labels].sum()
    assert -(weights * part[np.arange(2000), some]).sum() == pytest.approx(wanted, rel=0.15)


def test_the_estimate_has_no_bias():
    """Over many names, that is many draws of the hash, the mean of the estimated sums is the sum."""
    _, probabilities, target = overconfident(1)[0]
    estimates = []
    for n in range(300):
        sample = PixelSample(3, 60)
        sample.update(probabilities, target, f"name{n}")
        log, labels, weights = sample.rows()
        estimates.append(-(weights * log[np.arange(60), labels]).sum())
    wanted = nll(probabilities, target) * int((target != VOID).sum())
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - wanted) < 4 * error
    assert error < 0.05 * wanted


@settings(max_examples=20)
@given(st.permutations(range(6)), st.integers(1, 5), st.integers(50, 400))
def test_neither_order_nor_sharding_matters(order: list[int], cut: int, size: int):
    rows = overconfident(6, side=12)
    whole = sample_of(rows, size)
    shuffled = [rows[n] for n in order]
    merged = PixelSample.from_state(sample_of(shuffled[cut:], size).state())
    merged.merge(sample_of(shuffled[:cut], size))
    assert (merged.images, merged.pixels) == (whole.images, whole.pixels)
    for mine, other in zip(merged.rows(), whole.rows(), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_the_hash_is_uniform_and_differs_by_name():
    values = uniform_hash(100_000, "a", torch.device("cpu")).numpy()
    assert values.min() > 0
    assert values.max() <= 1
    assert np.abs(np.histogram(values, 20, (0, 1))[0] / 5000 - 1).max() < 0.06
    other = uniform_hash(100_000, "b", torch.device("cpu")).numpy()
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.02


def test_images_without_a_labelled_pixel_add_nothing():
    sample = PixelSample(2)
    sample.update(torch.full((2, 4, 4), 0.5), torch.full((4, 4), VOID, dtype=torch.uint8), "void")
    assert (sample.images, sample.pixels, len(sample.rows()[1])) == (1, 0, 0)
    with pytest.raises(ValueError, match="no pixel"):
        calibration.fit_temperature(sample.rows())


def test_pixels_that_are_no_number_are_left_out():
    _, probabilities, target = overconfident(1)[0]
    broken = probabilities.clone()
    broken[:, :5] = torch.nan
    blank = target.clone()
    blank[:5] = VOID
    found, wanted = PixelSample(3, 300), PixelSample(3, 300)
    found.update(broken, target, "a")
    wanted.update(probabilities, blank, "a")
    assert found.pixels == wanted.pixels
    for mine, other in zip(found.rows(), wanted.rows(), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_temperature_is_found(classes: int, factor: float):
    rows = overconfident(8, classes, factor)
    found = calibration.fit_temperature(sample_of(rows).rows()).parameters["temperature"]
    assert found == pytest.approx(factor, rel=0.04)
    small = calibration.fit_temperature(sample_of(rows, 3000).rows()).parameters["temperature"]
    assert small == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize("kind", ["temperature", "vector"])
def test_the_loss_falls_and_is_the_one_that_is_said(kind: calibration.Kind):
    rows = overconfident(6)
    fitted = calibration.fit_temperature(sample_of(rows).rows(), kind)
    probabilities = torch.stack([p for _, p, _ in rows])
    target = torch.stack([t for _, _, t in rows])
    after = calibration.apply_temperature(fitted.to_dict(), probabilities)
    torch.testing.assert_close(after.sum(1), torch.ones(6, 40, 40))
    assert nll(after.movedim(1, 0).flatten(1)[:, :, None], target.flatten()[:, None]) == pytest.approx(
        fitted.nll_after, rel=1e-4
    )
    assert fitted.nll_after < fitted.nll_before
    if kind == "temperature":
        assert torch.equal(after.argmax(1), probabilities.argmax(1))


def test_a_vector_undoes_what_one_temperature_cannot():
    scale, bias = torch.tensor([1.5, 0.7, 1.0])[:, None, None], torch.tensor([1.0, -1.0, 0.0])[:, None, None]
    rows = [(name, (p.log() * scale + bias).softmax(0), t) for name, p, t in overconfident(8, factor=1.0)]
    one, each = (calibration.fit_temperature(sample_of(rows).rows(), kind) for kind in ("temperature", "vector"))
    best = np.mean([nll(p, t) for _, p, t in overconfident(8, factor=1.0)])
    assert each.nll_after < one.nll_after
    assert each.nll_after < best + 0.02
    assert sum(each.parameters["bias"]) == pytest.approx(0, abs=1e-9)


def test_a_class_that_is_never_shown_does_not_run_away():
    rows = [(name, p, torch.where(t == 2, 0, t)) for name, p, t in overconfident(4)]
    fitted = calibration.fit_temperature(sample_of(rows).rows(), "vector")
    assert np.isfinite(fitted.parameters["scale"] + fitted.parameters["bias"]).all()
    assert max(map(abs, fitted.parameters["bias"])) < 20


def test_the_identity_gives_back_the_tensor_itself():
    p = torch.rand(1, 2, 3, 3).softmax(1)
    assert calibration.apply_temperature(None, p) is p
    assert calibration.apply_temperature({"kind": "temperature", "parameters": {"temperature": 1.0}}, p) is p


def test_certain_pixels_stay_finite():
    p = torch.tensor([1.0, 0.0])[None, :, None, None]
    after = calibration.apply_temperature({"kind": "temperature", "parameters": {"temperature": 4.0}}, p)
    assert after.isfinite().all()
    assert after[0, 0] > 0.99
