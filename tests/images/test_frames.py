"""Framing on the CPU, and the way back to an image's own pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.augment import Augment, AugmentSettings
from pipeline.images import affine
from pipeline.images.input_settings import InputSettings
from pipeline.images.unframe import unframe_boxes, unframe_maps
from pipeline.schema import VOID
from tests.support.augment_cases import batch_of, frame, letterbox, present, smooth_images, unit


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_framing_an_image_that_fits_is_the_identity(fit: str):
    image = np.random.default_rng(0).integers(0, 256, (30, 44, 3)).astype(np.uint8)
    mask = np.random.default_rng(1).integers(0, 9, (30, 44)).astype(np.uint8)
    box = np.array([[1.25, 2.5, 33.125, 29.0]])
    input = InputSettings.parse({"size": (30, 44), "fit": fit}, "test")
    got = frame([image], [mask], [box], [np.array([3])], None, input, train=True)
    assert np.array_equal(got["images"][0].permute(1, 2, 0).numpy(), image)
    assert np.array_equal(present(got["masks"])[0].numpy(), mask)
    assert present(got["boxes"])[0].tolist() == box.tolist()
    assert torch.equal(got["matrices"][0], torch.eye(3))


def test_letterbox_puts_void_and_the_mean_colour_around_the_image():
    image, mask = np.full((20, 40, 3), 200, np.uint8), np.full((20, 40), 4, np.uint8)
    input = InputSettings(size=(80, 80), mean=(0.2, 0.4, 0.6))
    got = frame([image], [mask], [np.array([[0.0, 0, 40, 20]])], [np.array([0])], None, input, train=False)
    assert (present(got["masks"])[0, 20:60] == 4).all()
    assert (present(got["masks"])[0, :20] == VOID).all()
    assert (present(got["masks"])[0, 60:] == VOID).all()
    assert (got["images"][0, :, 20:60] == 200).all()
    assert got["images"][0, :, 0, 0].tolist() == [51, 102, 153]
    assert present(got["boxes"]).tolist() == [[[0, 20, 80, 60]]]
    assert got["sizes"].tolist() == [[20, 40]]


def test_shrinking_does_not_alias_and_agrees_with_the_matrix():
    """Stripes of one pixel become grey, and a bright square lands where the matrix puts its box."""
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    input = InputSettings(size=(32, 32))
    grey = frame([stripes], None, None, None, None, input, train=False)["images"].int()
    # The columns at the edge see half a filter, so the two kinds of stripe do not weigh the same there.
    assert (grey[..., 1:-1] - 128).abs().max() <= 2
    image = np.zeros((120, 200, 3), np.uint8)
    image[40:80, 100:180] = 255
    got = frame([image], None, [np.array([[100.0, 40, 180, 80]])], [np.array([0])], None, input, train=False)
    weight = got["images"][0, 0].float() / 255
    weight[:6] = weight[25:] = 0  # the mean colour around the image
    x1, y1, x2, y2 = present(got["boxes"])[0, 0].tolist()
    assert weight.sum().item() == pytest.approx((x2 - x1) * (y2 - y1), rel=0.02)
    assert (weight.sum(0) * (torch.arange(32) + 0.5)).sum() / weight.sum() == pytest.approx((x1 + x2) / 2, abs=0.05)
    assert (weight.sum(1) * (torch.arange(32) + 0.5)).sum() / weight.sum() == pytest.approx((y1 + y2) / 2, abs=0.05)


def test_resized_masks_take_the_class_at_the_centre_of_each_pixel():
    mask = np.arange(64, dtype=np.uint8).reshape(8, 8)
    input = InputSettings(size=(4, 4), fit="stretch")
    shrunk = frame([np.zeros((8, 8, 3), np.uint8)], [mask], None, None, None, input, train=False)
    assert np.array_equal(present(shrunk["masks"])[0].numpy(), mask[1::2, 1::2])
    grown = frame([np.zeros((2, 2, 3), np.uint8)], [mask[:2, :2]], None, None, None, input, train=False)
    assert np.array_equal(present(grown["masks"])[0].numpy(), mask[:2, :2].repeat(2, 0).repeat(2, 1))


def test_read_only_arrays_as_they_come_from_parquet_are_accepted_without_a_warning():
    mask = np.frombuffer(bytes(12), np.uint8).reshape(3, 4)
    image = np.frombuffer(bytes(36), np.uint8).reshape(3, 4, 3)
    got = frame([image], [mask], None, None, None, InputSettings(size=(3, 4)), train=False)
    assert present(got["masks"]).eq(0).all()


def test_training_crop_is_a_native_window_and_offsets_reach_every_corner():
    image = np.arange(60 * 80 * 3, dtype=np.uint32).reshape(60, 80, 3).astype(np.uint8)
    mask = np.random.default_rng(0).integers(0, 9, (60, 80)).astype(np.uint8)
    input = InputSettings(size=(16, 24), fit="crop")
    augment = Augment(AugmentSettings(), input)
    ends = [(0.0, 0.0, 0, 0), (0.999999, 0.999999, 44, 56), (0.0, 0.999999, 0, 56), (0.5, 0.5, 22, 28)]
    for down, right, top, left in ends:
        parts = frame([image], [mask], None, None, None, input, train=True, offsets=np.array([[down, right]]))
        assert parts["images"].shape == (1, 3, 24, 36)
        batch = batch_of(parts)
        out = augment(batch)
        window = image[top : top + 16, left : left + 24]
        assert np.array_equal((unit(out, input)[0].permute(1, 2, 0) * 255).round().numpy(), window)
        assert np.array_equal(present(out.masks)[0].numpy(), mask[top : top + 16, left : left + 24])
        assert out.matrices[0].tolist() == [[1, 0, -left], [0, 1, -top], [0, 0, 1]]


def test_training_crop_centres_an_image_smaller_than_the_input_and_moves_its_boxes():
    image = np.full((10, 12, 3), 9, np.uint8)
    input = InputSettings(size=(16, 16), fit="crop")
    box = np.array([[2.0, 3, 12, 10]])
    parts = frame([image], [np.ones((10, 12), np.uint8)], [box], [np.array([0])], None, input, train=True)
    batch = batch_of(parts)
    out = Augment(AugmentSettings(), input)(batch)
    expected = torch.full((16, 16), VOID, dtype=torch.uint8)
    expected[3:13, 2:14] = 1
    assert torch.equal(present(out.masks)[0], expected)
    assert present(out.boxes)[0].tolist() == [[4, 6, 14, 13]]


def test_evaluation_crop_is_the_whole_image_padded_to_a_common_multiple():
    images = smooth_images(1, 30, 50) + smooth_images(1, 70, 20)
    input = InputSettings(size=(16, 16), fit="crop")
    got = frame(images, None, None, None, None, input, train=False, multiple=32)
    assert got["images"].shape == (2, 3, 96, 64)
    for n, image in enumerate(images):
        height, width = image.shape[:2]
        assert np.array_equal(got["images"][n, :, :height, :width].permute(1, 2, 0).numpy(), image)
        assert torch.equal(got["matrices"][n], torch.eye(3))


def test_threads_do_not_change_the_result():
    images = smooth_images(3, 30, 50) + smooth_images(3, 70, 20)
    masks = [np.full(image.shape[:2], n, np.uint8) for n, image in enumerate(images)]
    input = InputSettings(size=(40, 40))
    one = frame(images, masks, None, None, None, input, train=False)
    three = frame(images, masks, None, None, None, input, train=False, threads=3)
    assert torch.equal(one["images"], three["images"])
    assert torch.equal(present(one["masks"]), present(three["masks"]))


def test_an_unlabelled_image_among_labelled_ones_is_void_and_has_no_boxes():
    images = smooth_images(2, 20, 20)
    boxes, labels = [np.array([[1.0, 2, 3, 4]]), None], [np.array([1]), None]
    got = frame(
        images,
        [np.zeros((20, 20), np.uint8), None],
        boxes,
        labels,
        None,
        InputSettings(size=(20, 20)),
        train=True,
    )
    assert present(got["masks"])[0].eq(0).all()
    assert present(got["masks"])[1].eq(VOID).all()
    assert present(got["labels"]).tolist() == [[1], [-1]]


def test_unframing_is_exact_where_nothing_was_resized():
    input = InputSettings(size=(16, 16), fit="crop")
    parts = frame(smooth_images(1, 30, 50) + smooth_images(1, 70, 20), None, None, None, None, input, train=False)
    maps = torch.rand(2, 4, 96, 64, generator=torch.Generator().manual_seed(0))
    back = unframe_maps(maps, parts["matrices"], parts["sizes"])
    assert torch.equal(back[0], maps[0, :, :30, :50])
    assert torch.equal(back[1], maps[1, :, :70, :20])


def test_unframing_a_letterbox_never_mixes_in_the_padding_and_keeps_a_ramp():
    input = InputSettings(size=(48, 48))
    sizes = [(30, 60), (100, 40), (48, 48)]
    parts = frame([np.zeros((*size, 3), np.uint8) for size in sizes], None, None, None, None, input, train=False)
    y, x = torch.meshgrid(torch.arange(48.0) + 0.5, torch.arange(48.0) + 0.5, indexing="ij")
    back = unframe_maps(torch.stack([x, y]).expand(3, 2, 48, 48), parts["matrices"], parts["sizes"])
    for n, (height, width) in enumerate(sizes):
        rows_in, columns_in = torch.arange(height) + 0.5, torch.arange(width) + 0.5
        matrix = parts["matrices"][n]
        expected_x = (columns_in * matrix[0, 0] + matrix[0, 2]).expand(height, width)
        expected_y = (rows_in * matrix[1, 1] + matrix[1, 2])[:, None].expand(height, width)
        edge = 3  # where a value would continue beyond the last pixel centre, it stays constant instead
        inner = (slice(edge, -edge), slice(edge, -edge))
        torch.testing.assert_close(back[n][0][inner], expected_x[inner], atol=1e-3, rtol=0)
        torch.testing.assert_close(back[n][1][inner], expected_y[inner], atol=1e-3, rtol=0)
        place = affine.letterbox_placement((height, width), (48, 48))
        assert back[n][0].min() >= place.left + 0.5 - 1e-4
        assert back[n][0].max() <= place.left + place.width - 0.5 + 1e-4


def test_unframing_undoes_a_flip():
    maps = torch.rand(1, 2, 20, 20, generator=torch.Generator().manual_seed(0))
    flip = torch.tensor([[[-1.0, 0, 20], [0, 1, 0], [0, 0, 1]]])
    back = unframe_maps(maps.flip(-1), flip, torch.tensor([[20, 20]]))
    torch.testing.assert_close(back[0], maps[0], atol=1e-5, rtol=0)


@given(height=st.integers(5, 900), width=st.integers(5, 900), seed=st.integers(0, 99))
def test_boxes_come_back_to_where_they_were(height: int, width: int, seed: int):
    random = np.random.default_rng(seed)
    boxes = np.sort(random.uniform(0, 1, (3, 2, 2)), 1).reshape(3, 4) * [width, height, width, height]
    matrix, _ = letterbox((height, width), (256, 320))
    framed = affine.transform_boxes(torch.from_numpy(boxes).float(), matrix)
    back = unframe_boxes(framed[None], matrix.float()[None], torch.tensor([[height, width]]))
    assert np.abs(back[0].numpy() - boxes).max() < 1e-3 * max(1, max(height, width) / 100)
