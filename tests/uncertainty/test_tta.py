"""Views come back to where they were; windows leave no seams."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.errors import InputError
from pipeline.scoring.sliding_window import gaussian, needs_sliding_window, sliding_window_logits
from pipeline.uncertainty.tta import InferenceSettings, TtaSettings, View, inference_passes, tta_views

ALL = tta_views(TtaSettings(flips=True, turns=True))


@pytest.mark.parametrize("view", ALL)
def test_a_view_and_back_is_the_same_image(view: View):
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(view.invert(view.apply(images, 4), (8, 12)), images)


def test_the_eight_symmetries_are_all_different():
    images = torch.rand(1, 1, 4, 4)
    seen = [view.apply(images, 1) for view in ALL]
    assert len(ALL) == 8
    assert ALL[0] == View()
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_flips_alone_are_left_right_up_down_and_both():
    images = torch.rand(1, 1, 4, 6)
    seen = [view.apply(images, 1) for view in tta_views(TtaSettings(flips=True))]
    wanted = [images, images.flip(-1), images.flip(-2), images.flip(-1, -2)]
    assert len(seen) == 4
    assert all(any(torch.equal(each, one) for one in seen) for each in wanted)


def test_scales_keep_multiples_and_come_back_to_the_frame():
    smooth = torch.linspace(0, 1, 64).expand(1, 1, 64, 64).contiguous()
    for view in tta_views(TtaSettings(scales=(1.0, 0.75, 1.5))):
        seen = view.apply(smooth, 16)
        assert {side % 16 for side in seen.shape[-2:]} == {0}
        back = view.invert(seen, (64, 64))
        assert back.shape == smooth.shape
        assert (back - smooth)[..., 4:-4].abs().max() < 0.02


def test_the_plain_view_comes_first_and_passes_multiply():
    settings = InferenceSettings.parse({"tta": {"flips": True, "scales": [0.5, 1.0]}, "dropout_passes": 3}, "x")
    passes = list(inference_passes(settings))
    assert [number for number, _ in passes] == list(range(4 * 2 * 3))
    assert passes[0][1] == View()


@pytest.mark.parametrize("scales", [[], [0.5], [1.0, 1.0], [1.0, 9.0]])
def test_odd_scales_are_refused(scales: list[float]):
    with pytest.raises(InputError, match=r"scales.*1\.0 among them"):
        TtaSettings.parse({"scales": scales}, "predict.tta")


@pytest.mark.parametrize(
    ("windows", "canvas", "wanted"),
    [
        ("never", (999, 999), False),
        ("always", (65, 10), True),
        ("always", (64, 64), False),
        ("large", (999, 999), False),
        ("large", (3000, 3000), True),
    ],
)
def test_when_windows_are_used(windows: str, canvas: tuple[int, int], wanted: bool):
    settings = InferenceSettings.parse({"windows": windows}, "x")
    assert needs_sliding_window(settings, canvas, (64, 64)) is wanted


def test_windows_of_a_pointwise_model_are_the_whole_image():
    model = nn.Conv2d(3, 2, 1)
    images = torch.rand(2, 3, 70, 45)
    with torch.no_grad():
        found = sliding_window_logits(model, images, (32, 32), overlap=0.4)
        torch.testing.assert_close(found, model(images), rtol=1e-5, atol=1e-5)


def test_windows_of_a_network_leave_seams_on_less_than_one_percent_of_the_pixels():
    torch.manual_seed(0)
    module = models.parse({"name": "unet", "width": 4, "depth": 3}, "x").build(2).eval()
    images = nn.functional.interpolate(torch.rand(1, 3, 24, 24), (192, 192), mode="bicubic")
    with torch.no_grad():
        for head in module.heads:
            nn.init.normal_(head.weight)
        whole: Tensor = module(images)
        # Decide in the middle, where a seam would show first.
        whole -= whole.mean((2, 3), keepdim=True)
        seen = sliding_window_logits(module, images, (64, 64))
        seen -= seen.mean((2, 3), keepdim=True)
    assert 0.2 < (whole.argmax(1) == 0).float().mean() < 0.8
    assert (whole.argmax(1) != seen.argmax(1)).float().mean() < 0.01


def test_the_window_is_a_gaussian_around_its_centre():
    weight = gaussian((16, 8))
    assert weight.shape == (16, 8)
    assert torch.equal(weight, weight.flip(0, 1))
    assert weight.max() == weight[7, 3]
    assert weight.min() == pytest.approx(1e-3)
