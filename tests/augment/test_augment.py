"""Augmentation as a whole: purity, colour, effects, settings, and the evidence that Kornia ran."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia import augmentation, enhance
from torch import Tensor

from pipeline.augment import PRESETS, Augment, AugmentSettings, draw_parameters
from pipeline.augment.effects import normal
from pipeline.config import parse_sets
from pipeline.errors import InputError
from pipeline.images.input_settings import InputSettings
from tests.support.augment_cases import EVERYTHING, batch_of, frame, make_batch, present, rows, unit, values_of

COLOURS = {
    "brightness": (
        AugmentSettings(brightness=0.15),
        lambda x, v: enhance.adjust_brightness(x, v["brightness"]),
    ),
    "contrast": (AugmentSettings(contrast=0.2), lambda x, v: enhance.adjust_contrast(x, v["contrast"])),
    "saturation": (
        AugmentSettings(saturation=0.4),
        lambda x, v: enhance.adjust.adjust_saturation_with_gray_subtraction(x, v["saturation"]),
    ),
    "all three": (
        AugmentSettings(brightness=0.1, contrast=0.1, saturation=0.3),
        lambda x, v: enhance.adjust.adjust_saturation_with_gray_subtraction(
            enhance.adjust_contrast(enhance.adjust_brightness(x, v["brightness"]), v["contrast"]),
            v["saturation"],
        ),
    ),
}


@pytest.mark.parametrize("name", list(COLOURS))
def test_colour_equals_kornias_adjust_functions(name: str):
    wanted, adjust = COLOURS[name]
    batch, input = make_batch(8)
    source = batch.images.float() / 255
    values = {
        key: value.float()
        for key, value in values_of(draw_parameters(wanted, 2, batch.epochs, batch.positions)).items()
    }
    theirs = adjust(source, values)
    assert theirs.min() > 0
    assert theirs.max() < 1
    got = unit(Augment(wanted, input, seed=2)(batch), input)
    torch.testing.assert_close(got, theirs, atol=1e-5, rtol=0)
    assert (got - source).abs().max() > 0.02


def test_colour_is_cut_off_at_black_and_white():
    batch, input = make_batch(8)
    out = unit(Augment(AugmentSettings(brightness=0.9, contrast=0.9), input, seed=2)(batch), input)
    assert out.min() == pytest.approx(0, abs=1e-6)
    assert out.max() == pytest.approx(1, abs=1e-6)


def test_hue_turns_the_colour_differences_and_keeps_luma():
    batch, input = make_batch(8)
    wanted = AugmentSettings(hue=0.04)
    source = (batch.images.float() / 255).double()
    angle = torch.from_numpy(2 * np.pi * draw_parameters(wanted, 2, batch.epochs, batch.positions)["hue"])[
        :, None, None
    ]
    red, green, blue = source.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    u, v = 0.492 * (blue - luma), 0.877 * (red - luma)
    u, v = u * torch.cos(angle) - v * torch.sin(angle), u * torch.sin(angle) + v * torch.cos(angle)
    red, blue = luma + v / 0.877, luma + u / 0.492
    expected = torch.stack([red, (luma - 0.299 * red - 0.114 * blue) / 0.587, blue], 1)
    assert expected.min() > 0
    assert expected.max() < 1
    got = unit(Augment(wanted, input, seed=2)(batch), input).double()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert (got - source).abs().max() > 0.01


@settings(max_examples=15)
@given(index=st.permutations(range(8)), count=st.integers(1, 8))
def test_no_image_depends_on_its_batch(index: list[int], count: int):
    batch, input = make_batch(8, (24, 24))
    augment = Augment(EVERYTHING, input, seed=11)
    whole, part = augment(batch), augment(rows(batch, index[:count]))
    expected = rows(whole, index[:count])
    torch.testing.assert_close(part.images, expected.images, atol=1e-5, rtol=0)
    for name in ("masks", "labels", "crowd", "boxes", "matrices"):
        assert torch.equal(getattr(part, name), getattr(expected, name)), name


def test_draw_is_a_pure_function_of_its_keys():
    epochs, positions = np.repeat([0, 1, 2], 40), np.tile(np.arange(40), 3)
    whole = draw_parameters(EVERYTHING, 7, epochs, positions)
    for n in (0, 41, 119):
        alone = draw_parameters(EVERYTHING, 7, epochs[n : n + 1], positions[n : n + 1])
        assert all(np.array_equal(alone[name][0], whole[name][n]) for name in whole)
    assert len(np.unique(whole["angle"])) == 120
    assert not np.intersect1d(draw_parameters(EVERYTHING, 8, epochs, positions)["angle"], whole["angle"]).size


def test_switching_one_op_off_leaves_the_draws_of_the_others():
    positions = np.arange(50)
    fewer = EVERYTHING.model_copy(update={"hflip": 0.0, "erase": 0.0})
    first, second = (
        draw_parameters(EVERYTHING, 7, positions * 0, positions),
        draw_parameters(fewer, 7, positions * 0, positions),
    )
    assert not second["hflip"].any()
    assert all(np.array_equal(first[name], second[name]) for name in first if name not in ("hflip", "erase"))


def test_draws_are_spread_evenly_and_not_related():
    positions = np.arange(20_000)
    drawn = draw_parameters(EVERYTHING, 0, positions * 0, positions)
    columns = np.stack(
        [drawn[name] for name in ("angle", "shear", "brightness", "contrast", "hue", "hflip")]
        + [*drawn["translate"].T, np.log(drawn["scale"])]
    ).astype(float)
    assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 0.03
    assert drawn["hflip"].mean() == pytest.approx(0.5, abs=0.02)
    assert np.histogram(drawn["angle"], 10, (-25, 25))[0] == pytest.approx(2000, abs=200)
    assert np.bincount(drawn["turns"], minlength=4) / 20_000 == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6], abs=0.02)
    assert np.abs(np.corrcoef(columns[0, :-1], columns[0, 1:])[0, 1]) < 0.03


def test_draws_never_change_between_versions():
    """A resumed run must go on with the same parameters: these values are part of the contract."""
    drawn = draw_parameters(AugmentSettings(rotate=90, hue=0.5), 1, [0, 3], [5, 2**40])
    assert drawn["angle"].tolist() == pytest.approx(ANGLES)
    assert drawn["hue"].tolist() == pytest.approx(HUES)


ANGLES = [-69.48616516896331, -38.4782624423888]
HUES = [0.45188235700803736, 0.07994941331524119]


def test_noise_is_normal_and_differs_by_key():
    values = normal(torch.tensor([1, 2, -5], dtype=torch.int32), 30_001).double()
    assert values.shape == (3, 30_001)
    assert values.mean(1).abs().max() < 0.02
    assert values.std(1).numpy() == pytest.approx(1, abs=0.02)
    assert ((values.abs() < 1.959964).double().mean(1)).numpy() == pytest.approx(0.95, abs=0.006)
    correlation = torch.corrcoef(torch.cat([values[:, :-1], values[:, 1:]]))
    assert (correlation - torch.eye(6)).abs().max() < 0.02


def test_effects_leave_geometry_alone_and_touch_only_their_images():
    batch, input = make_batch(8)
    plain = Augment(AugmentSettings(), input, seed=4)(batch)
    for name in ("blur", "noise", "erase"):
        wanted = AugmentSettings.parse({name: 0.5}, "test")
        amount = draw_parameters(wanted, 4, batch.epochs, batch.positions)[name].reshape(8, -1).any(1)
        out = Augment(wanted, input, seed=4)(batch)
        changed = (out.images != plain.images).flatten(1).any(1).numpy()
        assert changed.tolist() == amount.tolist()
        assert 0 < amount.sum() < 8
        assert torch.equal(present(out.masks), present(plain.masks))
        assert torch.equal(present(out.boxes), present(plain.boxes))


def test_blur_of_an_image_does_not_depend_on_how_blurred_the_others_are():
    """On one bright pixel, where the size of the kernel would show."""
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    input = InputSettings(size=(41, 41))
    batch = batch_of(frame([image] * 8, None, None, None, None, input, train=True))
    wanted = AugmentSettings(blur=1.0, blur_sigma=(0.3, 5.0))
    augment = Augment(wanted, input, seed=1)
    whole = augment(batch)
    sigma = draw_parameters(wanted, 1, batch.epochs, batch.positions)["blur"]
    assert sigma.max() > 2 * sigma.min()
    for n in range(8):
        alone = augment(rows(batch, [n]))
        torch.testing.assert_close(alone.images[0], whole.images[n], atol=1e-6, rtol=0)
        spot = unit(whole, input)[n, 0].double()
        assert spot.sum().item() == pytest.approx(1, abs=1e-3)
        spread = (spot.sum(0) * (torch.arange(41) - 20) ** 2).sum().sqrt()
        assert spread.item() == pytest.approx(sigma[n], rel=0.05, abs=0.02)


def test_noise_has_the_strength_that_was_drawn():
    batch, input = make_batch(2, (200, 200))
    wanted = AugmentSettings(noise=1.0, noise_std=0.1)
    std = draw_parameters(wanted, 4, batch.epochs, batch.positions)["noise"]
    added = unit(Augment(wanted, input, 4)(batch), input) - batch.images.float() / 255
    assert added.flatten(2).std(-1).numpy() == pytest.approx(np.repeat(std[:, None], 3, 1), rel=0.03)


def test_erased_share_is_within_the_wanted_range():
    batch, input = make_batch(20, (100, 100))
    out = Augment(AugmentSettings(erase=1.0, erase_area=(0.1, 0.2)), input, 4)(batch)
    share = (out.images == 0).all(1).float().mean((1, 2))
    assert share.min() > 0.08
    assert share.max() < 0.22
    assert share.std() > 0.01


def test_evaluation_preset_only_normalises():
    batch, input = make_batch()
    out = Augment(None, input)(batch)
    torch.testing.assert_close(unit(out, input), batch.images.float() / 255, atol=1e-6, rtol=0)
    assert out.masks is batch.masks
    assert out.boxes is batch.boxes
    assert out.matrices is batch.matrices


def test_report_says_what_kornia_did_and_where():
    batch, input = make_batch()
    augment = Augment(EVERYTHING, input)
    assert augment.report()["device"] is None
    augment(batch)
    augment(batch)
    report = augment.report()
    assert report["device"] == "cpu"
    assert report["ops"] == {
        "RandomHorizontalFlip": 2,
        "RandomVerticalFlip": 2,
        "RandomRotation90": 2,
        "RandomAffine": 2,
        "filter2d_separable": 2,
    }
    assert report["kornia"].count(".") == 2


def test_kornias_classes_give_the_matrices(monkeypatch):
    """With Kornia's flip replaced by the identity, nothing is flipped."""
    batch, input = make_batch()

    def stay(self, image: Tensor, params, flags) -> Tensor:
        return torch.eye(3, dtype=image.dtype).expand(len(image), 3, 3)

    monkeypatch.setattr(augmentation.RandomHorizontalFlip, "compute_transformation", stay)
    out = Augment(AugmentSettings(hflip=1.0), input)(batch)
    torch.testing.assert_close(unit(out, input), batch.images.float() / 255, atol=1e-4, rtol=0)


def test_the_batch_is_left_as_it_was():
    batch, input = make_batch()
    before = {f.name: v.clone() for f in dataclasses.fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    Augment(EVERYTHING, input)(batch)
    Augment(AugmentSettings(), input)(batch)
    Augment(None, input)(batch)
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())


def test_an_op_that_would_leave_boxes_behind_is_refused_by_name():
    with pytest.raises(InputError, match=r"augment: unknown key 'elastic'.* Known: .*rotate"):
        AugmentSettings.parse(parse_sets(["elastic=0.5"]), "augment")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hflip=1.5", "less than or equal to 1"),
        ("scale=[2, 1]", "two rising numbers"),
        ("rotat=3", "Did you mean 'rotate'"),
    ],
)
def test_wrong_settings_say_what_was_wanted(text: str, message: str):
    with pytest.raises(InputError, match=message):
        AugmentSettings.parse(parse_sets([text]), "augment")


def test_input_settings():
    assert InputSettings.parse({"size": 96}, "input").size == (96, 96)
    for wrong in ({"size": [0, 5]}, {"size": [8, 8], "std": [0, 1, 1]}):
        with pytest.raises(InputError, match="positive numbers"):
            InputSettings.parse(wrong, "input")


def test_settings_survive_json_and_presets_are_valid():
    for preset in PRESETS.values():
        assert AugmentSettings.parse(preset.to_dict(), "preset") == preset
    input = InputSettings(size=(5, 7), fit="crop")
    assert InputSettings.parse(input.to_dict(), "input") == input
