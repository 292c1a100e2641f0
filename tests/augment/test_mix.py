"""Mosaic and mix-up against rectangles painted at their boxes, against slices, and what rows owe to each other."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augment import Augment, AugmentSettings, draw_mix_partners
from pipeline.augment.mix import max_boxes_per_row
from pipeline.errors import InputError
from pipeline.images.batch import Batch
from pipeline.images.input_settings import InputSettings
from tests.support.augment_cases import (
    EVERYTHING,
    batch_of,
    frame,
    make_batch,
    painted_batch,
    present,
    rows,
    smooth_images,
    unit,
)

MOSAIC = AugmentSettings(mosaic=1.0, min_visible=0.0)
GEOMETRY = {
    "none": {},
    "flips and turns": {"hflip": 0.5, "vflip": 0.5, "quarter_turns": 0.7},
    "smaller": {"scale": (0.4, 0.9)},
    "larger": {"scale": (1.1, 1.7), "hflip": 0.5, "translate": 0.1},
}


def kept(batch: Batch, n: int) -> dict[int, list[float]]:
    """label -> box of row n; labels of these tests are unique within a row."""
    labels = present(batch.labels)[n]
    assert len(set(labels[labels >= 0].tolist())) == (labels >= 0).sum()
    boxes = present(batch.boxes)[n]
    return {int(label): boxes[i].tolist() for i, label in enumerate(labels) if label >= 0}


def listed(batch: Batch, *which: int) -> list[tuple[int, bool, list[float]]]:
    """(label, crowd, box) of all boxes of some rows, sorted."""
    columns = (present(batch.labels), present(batch.crowd), present(batch.boxes))
    found = [row for n in which for row in zip(*(column[n].tolist() for column in columns), strict=True)]
    return sorted(row for row in found if row[0] >= 0)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(GEOMETRY)), fit=st.sampled_from(["letterbox", "crop"]))
def test_boxes_masks_and_painted_rectangles_of_a_mosaic_agree(seed: int, name: str, fit: str):
    batch, input, colours = painted_batch(5, (48, 48), fit, seed)
    wanted = MOSAIC.model_copy(update=GEOMETRY[name])
    out = Augment(wanted, input, seed)(batch)
    images = (unit(out, input) * 255).permute(0, 2, 3, 1)
    exact = name in ("none", "flips and turns")
    for n, mask in enumerate(present(out.masks)):
        boxes = kept(out, n)
        for label, box in boxes.items():
            ys, xs = torch.where(mask == label)
            sides = np.subtract(box[2:], box[:2])
            if exact or sides.min() >= 1:
                drawn = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                assert np.abs(np.subtract(drawn, box)).max() <= (1e-3 if exact else 0.51)
            # A bilinear sample near an edge may hold some of what lies beyond it: one pixel of the canvas.
            margin = 0 if exact else 1 + int(np.ceil(max(1, wanted.scale[1])))
            x1, y1, x2, y2 = np.rint(np.add(box, [margin, margin, -margin, -margin])).astype(int)
            inner = images[n, y1 : max(y2, 0), x1 : max(x2, 0)]
            assert not inner.numel() or (inner - colours[label]).abs().max() < 2
        # Beyond all images, but for the pixels next to one, there is the mean colour.
        labelled = torch.nn.functional.max_pool2d((mask != 255).float()[None], 3, stride=1, padding=1)[0]
        beyond = images[n][labelled == 0] - 255 * torch.tensor(input.mean)
        assert not beyond.numel() or beyond.abs().max() <= 0.51
        # Nothing that can be seen lost its box (min_visible is 0).
        seen = set(mask.unique().tolist()) - {0, 255}
        assert seen <= set(boxes)
        assert not exact or seen == set(boxes)


@pytest.mark.parametrize("fit", ["letterbox", "crop"])
def test_a_mosaic_is_made_of_slices(fit: str):
    """By the plainest means: four slices an image, four clipped lists of boxes."""
    batch, input, _ = painted_batch(6, (40, 56), fit, 3)
    (height, width), canvas = input.size, batch.images.shape[-2:]
    out = Augment(MOSAIC, input, 5)(batch)
    drawn = draw_mix_partners(MOSAIC, 5, batch.epochs, batch.positions)
    margin = [(canvas[1] - width) // 2, (canvas[0] - height) // 2]
    for n in range(6):
        cx, cy = np.rint(drawn["centre"][n] * [width, height]).astype(int)
        image, mask = np.zeros((3, height, width)), np.full((height, width), 255)
        mean = np.array(input.mean)[:, None, None] * 255
        image[:] = mean
        boxes = {}
        for q, m in enumerate(drawn["sources"][n]):
            place, size = present(batch.matrices)[m], batch.sizes[m]
            left, top = (max(0, int(place[axis, 2])) for axis in (0, 1))
            right, bottom = (min(canvas[1 - axis], int(place[axis, 2] + size[1 - axis])) for axis in (0, 1))
            ax, ay = (left if q % 2 else right), (top if q >= 2 else bottom)
            xs, ys = (np.arange(width), np.arange(height))
            xs = xs[(xs >= cx) == bool(q % 2)]
            ys = ys[(ys >= cy) == bool(q >= 2)]
            xs = xs[(xs - cx + ax >= 0) & (xs - cx + ax < canvas[1])]
            ys = ys[(ys - cy + ay >= 0) & (ys - cy + ay < canvas[0])]
            at = np.ix_(ys - cy + ay, xs - cx + ax)
            mask[np.ix_(ys, xs)] = present(batch.masks)[m].numpy()[at]
            for channel in range(3):
                image[channel][np.ix_(ys, xs)] = batch.images[m, channel].numpy()[at]
            for box, label in zip(present(batch.boxes)[m], present(batch.labels)[m].tolist(), strict=True):
                x1, y1, x2, y2 = (box.numpy() + [cx - ax, cy - ay] * 2).tolist()
                x1, x2 = np.clip([x1, x2], *((cx, width) if q % 2 else (0, cx)))
                y1, y2 = np.clip([y1, y2], *((cy, height) if q >= 2 else (0, cy)))
                if label >= 0 and x1 < x2 and y1 < y2:
                    boxes[label] = [x1, y1, x2, y2]
            if m == n:
                assert out.matrices[n, :2, 2].tolist() == [cx - ax + place[0, 2], cy - ay + place[1, 2]]
        assert np.abs((unit(out, input)[n] * 255).numpy() - image).max() < 0.5
        assert (present(out.masks)[n].numpy() == mask).all()
        assert kept(out, n) == boxes
        assert margin == [0, 0] or fit == "crop"


def test_a_box_is_dropped_by_what_the_seam_leaves_of_the_whole_of_it():
    """Images of 40 x 40, of which each quadrant shows a quarter that ends at one corner of the image."""
    boxes, crowd = np.array([[10.0, 10, 30, 30], [17, 17, 23, 23], [12, 4, 28, 8]]), np.array([False, False, True])
    input = InputSettings(size=(40, 40))
    parts = frame(smooth_images(4, 40, 40), None, [boxes] * 4, [np.arange(3)] * 4, [crowd] * 4, input, train=True)
    labels = {}
    for share in (0.2, 0.26):
        wanted = AugmentSettings(mosaic=1.0, mosaic_centre=(0.5, 0.5), min_visible=share)
        out = Augment(wanted, input)(batch_of(parts))
        labels[share] = present(out.labels)[present(out.labels) >= 0]
        assert (present(out.crowd) == (present(out.labels) == 2)).all()
    # Each quadrant shows a quarter of the centred boxes. The crowd is in the upper half of its image, and so seen
    # in the lower quadrants.
    assert torch.bincount(labels[0.2], minlength=3).tolist() == [16, 16, 8]
    assert torch.bincount(labels[0.26], minlength=3).tolist() == [0, 0, 8]


def test_nothing_shows_through_at_the_seams():
    """Four images of one colour make one area of it, whatever surrounds them in their canvases."""
    input = InputSettings(size=(40, 40))
    shapes = [(40, 40, 3), (30, 40, 3), (40, 30, 3), (32, 40, 3)]
    batch = batch_of(
        frame([np.full(shape, 200, np.uint8) for shape in shapes], None, None, None, None, input, train=True)
    )
    wanted = AugmentSettings(mosaic=1.0, mosaic_centre=(0.4, 0.6), rotate=180, scale=(1.3, 1.5))
    out = unit(Augment(wanted, input, 0)(batch), input) * 255
    assert (out - 200).abs().max() < 0.01


def test_a_box_that_sticks_out_of_its_image_ends_at_the_seam():
    """A strip of 40 x 20 in the middle of its canvas: its box reaches 8 pixels beyond all its edges."""
    box = np.array([[-8.0, -8, 48, 28]])
    input = InputSettings(size=(40, 40))
    images = [np.zeros((20, 40, 3), np.uint8)] * 6
    parts = frame(images, None, [box] * 6, [np.array([n]) for n in range(6)], None, input, train=True)
    out = Augment(MOSAIC, input, 1)(batch_of(parts))
    drawn = draw_mix_partners(MOSAIC, 1, np.zeros(6), np.arange(6))
    for n, (cx, cy) in enumerate(np.rint(drawn["centre"] * 40).tolist()):
        for q, m in enumerate(drawn["sources"][n].tolist()):
            wide = [cx, 40] if q % 2 else [0, cx]
            # Of the canvas 30 rows reach outwards from the seam; the box covers 28 of them.
            high = [cy, min(40, cy + 28)] if q >= 2 else [max(0, cy - 28), cy]
            assert kept(out, n)[m] == [wide[0], high[0], wide[1], high[1]]


def test_each_pixel_is_resampled_once(monkeypatch):
    rows = Counter()
    real = torch.nn.functional.grid_sample

    def counting(images, grid, mode, **more):
        rows[mode] += len(grid)
        return real(images, grid, mode=mode, **more)

    monkeypatch.setattr("pipeline.augment.pixels.grid_sample", counting)
    batch, input = make_batch(8)
    augment = Augment(EVERYTHING.model_copy(update={"mosaic": 0.5}), input, seed=0)
    augment(batch)
    assert 0 < augment.report()["mixed"]["mosaic"] < 8
    assert rows == {"bilinear": 8, "nearest": 8}


def test_all_parts_of_an_image_are_seen_equally_often():
    """One box a cell of 5 x 5: the row takes each quadrant equally often, so each cell is seen once in four."""
    count = 300
    corners = np.stack(np.meshgrid(np.arange(5) * 4 + 1.0, np.arange(5) * 4 + 1.0), -1).reshape(-1, 2)
    boxes = np.concatenate([corners, corners + 2], 1)
    input = InputSettings(size=(20, 20))
    images = [np.zeros((20, 20, 3), np.uint8)] * count
    parts = frame(images, None, [boxes] * count, [np.arange(25)] * count, None, input, train=True)
    out = Augment(AugmentSettings(mosaic=1.0, min_visible=0.5), input, 3)(batch_of(parts))
    labels = present(out.labels)
    seen = torch.bincount(labels[labels >= 0], minlength=25) / count
    assert seen.numpy() == pytest.approx(1, abs=0.2)


def test_rows_that_are_not_mixed_owe_nothing_to_their_batch():
    batch, input = make_batch(8)
    batch.masks = None
    wanted = EVERYTHING.model_copy(update={"mosaic": 0.3, "mixup": 0.3, "blur": 0.0})
    drawn = draw_mix_partners(wanted, 4, batch.epochs, batch.positions)
    alone = np.flatnonzero(~(drawn["mosaic"] | drawn["mixup"])).tolist()
    assert 0 < len(alone) < 8
    out, plain = Augment(wanted, input, 4)(batch), Augment(EVERYTHING.model_copy(update={"blur": 0.0}), input, 4)(batch)
    assert torch.equal(out.images[alone], plain.images[alone])
    assert torch.equal(out.matrices[alone], plain.matrices[alone])
    assert all(listed(out, n) == listed(plain, n) for n in alone)
    mixed = [n for n in range(8) if n not in alone]
    assert all((out.images[n] - plain.images[n]).abs().max() > 0.05 for n in mixed)


@settings(max_examples=6)
@given(index=st.permutations(range(7)), seed=st.integers(0, 1000))
def test_the_order_of_the_batch_plays_no_part(index: list[int], seed: int):
    batch, input = make_batch(7, (24, 24), seed=seed)
    batch.masks = None
    augment = Augment(EVERYTHING.model_copy(update={"mosaic": 0.5, "mixup": 0.5}), input, seed)
    first, second, turned = augment(batch), augment(batch), augment(rows(batch, index))
    expected = rows(first, index)
    for name in ("images", "labels", "crowd", "boxes", "matrices"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
        torch.testing.assert_close(getattr(turned, name), getattr(expected, name), atol=2e-3, rtol=0)


def test_mixup_blends_what_the_rows_would_be_and_keeps_the_boxes_of_both():
    batch, input = make_batch(6)
    batch.masks = None
    for mosaic in (0.0, 0.5):
        alone = AugmentSettings(hflip=0.5, rotate=20, mosaic=mosaic)
        wanted = alone.model_copy(update={"mixup": 0.6})
        drawn = draw_mix_partners(wanted, 2, batch.epochs, batch.positions)
        assert 0 < drawn["mixup"].sum() < 6
        out, before = Augment(wanted, input, 2)(batch), Augment(alone, input, 2)(batch)
        assert torch.equal(out.matrices, before.matrices)
        for n in range(6):
            sources = [n, drawn["partner"][n]] if drawn["mixup"][n] else [n]
            ratio = drawn["ratio"][n] if len(sources) == 2 else 1.0
            expected = ratio * before.images[sources[0]] + (1 - ratio) * before.images[sources[-1]]
            torch.testing.assert_close(out.images[n], expected.float(), atol=1e-5, rtol=0)
            assert listed(out, n) == listed(before, *sources)
        assert present(out.crowd).any()


def test_masks_cannot_be_blended():
    batch, input = make_batch(3)
    with pytest.raises(InputError, match=r"augment\.mixup: 0\.1 .* masks.* set augment\.mixup to 0 .*mosaic"):
        Augment(AugmentSettings(mixup=0.1), input)(batch)


def test_two_and_three_rows_show_an_image_more_than_once():
    for count in (2, 3):
        drawn = draw_mix_partners(MOSAIC, 0, np.zeros(count), np.arange(count))
        assert all(set(each) == set(range(count)) for each in drawn["sources"].tolist())
        batch, input, _ = painted_batch(count, (32, 32), "letterbox", 0)
        assert Augment(MOSAIC, input)(batch).images.isfinite().all()


def test_images_without_boxes_and_batches_without_any():
    input = InputSettings(size=(24, 24))
    wanted = EVERYTHING.model_copy(update={"mosaic": 1.0, "mixup": 1.0, "min_visible": 0.0, "blur": 0.0})
    images, box = smooth_images(4, 24, 24), np.array([[8.0, 8, 16, 16]])
    some = [box, np.zeros((0, 4)), None, np.zeros((0, 4))]
    parts = frame(images, None, some, [np.array([k] * (k == 0)) for k in range(4)], None, input, train=True)
    out = Augment(wanted, input)(batch_of(parts))
    assert (present(out.labels) == 0).any()
    none = frame(images, None, [None] * 4, [None] * 4, None, input, train=True)
    out = Augment(wanted, input)(batch_of(none))
    assert present(out.labels).tolist() == [[-1]] * 4
    assert present(out.boxes).shape == (4, 1, 4)
    unlabelled = Augment(wanted, input)(batch_of(frame(images, None, None, None, None, input, train=True)))
    assert unlabelled.boxes is None
    assert unlabelled.images.isfinite().all()


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), count=st.integers(2, 7))
def test_lists_are_as_long_as_the_longest_and_kept_boxes_come_first(seed: int, count: int):
    batch, input, _ = painted_batch(count, (32, 32), "letterbox", seed)
    batch.masks = None
    wanted = AugmentSettings(mosaic=0.5, mixup=0.5, scale=(0.5, 1.0))
    out, drawn = Augment(wanted, input, seed)(batch), draw_mix_partners(wanted, seed, batch.epochs, batch.positions)
    found = present(out.labels) >= 0
    bound = max_boxes_per_row((present(batch.labels) >= 0).sum(1).numpy(), drawn)
    assert found.sum(1).max() <= bound
    if (drawn["mosaic"] | drawn["mixup"]).any():
        assert found.shape[1] == max(1, found.sum(1).max())
        assert (found.int().diff(dim=1) <= 0).all()
        assert (present(out.boxes)[~found] == 0).all()
        assert not present(out.crowd)[~found].any()


def test_no_shape_depends_on_numbers_of_the_device():
    """On the meta device there are shapes alone: an op that had to read a number would fail."""
    batch, input = make_batch(6)
    batch.masks = None
    wanted = EVERYTHING.model_copy(update={"mosaic": 0.5, "mixup": 0.5, "blur": 0.0, "noise": 0.0})
    drawn = draw_mix_partners(wanted, 2, batch.epochs, batch.positions)
    assert 0 < drawn["mosaic"].sum() < 6
    assert drawn["mixup"].any()
    out = Augment(wanted, input, 2)(batch.to("meta"))
    assert present(out.boxes).shape == (6, max_boxes_per_row(np.full(6, 2), drawn), 4)
    assert out.images.shape == (6, 3, 40, 40)
    assert out.box_counts is None
    counted, unknown = batch.to("cpu"), dataclasses.replace(batch.to("meta"), box_counts=None)
    assert present(counted.box_counts).tolist() == [2] * 6
    assert present(Augment(wanted, input, 2)(unknown).labels).shape == present(out.labels).shape
