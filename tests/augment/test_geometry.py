"""Geometry against Kornia's own output, and boxes against boxes drawn into masks."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia import augmentation

from pipeline.augment import Augment, AugmentSettings, draw_parameters
from pipeline.augment.geometry import Geometry, affine_parameters, visible_boxes
from pipeline.images.batch import Batch
from pipeline.images.input_settings import InputSettings
from tests.support.augment_cases import (
    EVERYTHING,
    batch_of,
    frame,
    make_batch,
    present,
    smooth_images,
    unit,
    values_of,
    warp,
)

KORNIA_OPS = {
    "hflip": ({"hflip": 1.0}, lambda v, c: augmentation.RandomHorizontalFlip(p=1.0), lambda v, c: {}),
    "vflip": ({"vflip": 1.0}, lambda v, c: augmentation.RandomVerticalFlip(p=1.0), lambda v, c: {}),
    "quarter_turns": (
        {"quarter_turns": 1.0},
        lambda v, c: augmentation.RandomRotation90((0, 3), p=1.0),
        lambda v, c: {"times": v["turns"].float()},
    ),
    "rotate": (
        {"rotate": 40.0},
        lambda v, c: augmentation.RandomRotation(40.0, p=1.0),
        lambda v, c: {"degrees": -v["angle"].float()},
    ),
    "translate": (
        {"translate": 0.2},
        lambda v, c: augmentation.RandomTranslate((-0.2, 0.2), (-0.2, 0.2), p=1.0),
        lambda v, c: {
            "translate_x": v["translate"][:, 0].float() * c[1],
            "translate_y": v["translate"][:, 1].float() * c[0],
        },
    ),
    "scale": (
        {"scale": (0.7, 1.5)},
        lambda v, c: augmentation.RandomAffine(0.0, scale=(0.7, 1.5), p=1.0),
        lambda v, c: affine_parameters(v, c, c),
    ),
    "shear": (
        {"shear": 15.0},
        lambda v, c: augmentation.RandomShear(15.0, p=1.0),
        lambda v, c: affine_parameters(v, c, c),
    ),
    "affine": (
        {"rotate": 40.0, "translate": 0.1, "scale": (0.7, 1.5), "shear": 10.0},
        lambda v, c: augmentation.RandomAffine(40.0, (0.1, 0.1), (0.7, 1.5), 10.0, p=1.0),
        lambda v, c: affine_parameters(v, c, c),
    ),
}  # fmt: skip


CASES = [(name, size) for name in KORNIA_OPS for size in [(40, 40), (33, 50)]]
# An input that is not square is turned by 180 degrees alone; that has a test of its own.
CASES.remove(("quarter_turns", (33, 50)))


@pytest.mark.parametrize(("name", "size"), CASES)
def test_single_op_equals_kornias_own_class(name: str, size: tuple[int, int]):
    changed, build, parameters = KORNIA_OPS[name]
    wanted = AugmentSettings.parse(changed, "test")
    batch, input = make_batch(5, size)
    ours = Augment(wanted, input, seed=3)
    out = ours(batch)
    values = values_of(draw_parameters(wanted, 3, batch.epochs, batch.positions))
    source = batch.images.float() / 255
    params = {key: torch.as_tensor(value).float() for key, value in parameters(values, size).items()}
    params |= {"batch_prob": torch.ones(5), "forward_input_shape": torch.tensor(source.shape)}
    theirs = build(values, size)(source, params=params)
    # Outside the image we put the mean colour and Kornia black: compare where no such pixel was mixed in.
    inside = build(values, size)(torch.ones_like(source), params=params) > 1 - 1e-5
    assert inside.float().mean() > 0.3
    difference = (unit(out, input) - theirs).abs()[inside]
    assert difference.max() < 1e-4


def test_scale_crop_equals_kornias_affine_followed_by_its_centre_crop():
    batch, input = make_batch(4, (24, 32), "crop", image_hw=(60, 70))
    wanted, canvas = AugmentSettings(scale=(1.0, 1.6)), (36, 48)
    assert batch.images.shape[-2:] == canvas
    ours = Augment(wanted, input, seed=3)
    params = affine_parameters(values_of(draw_parameters(wanted, 3, batch.epochs, batch.positions)), canvas, (24, 32))
    params |= {"batch_prob": torch.ones(4), "forward_input_shape": torch.tensor(batch.images.shape)}
    whole = augmentation.RandomAffine(0.0, scale=(1.0, 1.6), p=1.0)(batch.images.float() / 255, params=params)
    theirs = augmentation.CenterCrop((24, 32))(whole)
    assert (unit(ours(batch), input) - theirs).abs().max() < 1e-4


def test_oblong_input_is_turned_by_180_degrees():
    batch, input = make_batch(4, (24, 40))
    out = Augment(AugmentSettings(quarter_turns=1.0), input, seed=1)(batch)
    torch.testing.assert_close(unit(out, input), (batch.images.float() / 255).flip(-1, -2), atol=1e-4, rtol=0)
    assert torch.equal(present(out.masks), present(batch.masks).flip(-1, -2))


def test_flips_and_turns_move_masks_without_losing_a_pixel():
    batch, input = make_batch(8, (32, 32))
    drawn = draw_parameters(AugmentSettings(hflip=0.5, vflip=0.5, quarter_turns=0.7), 5, batch.epochs, batch.positions)
    out = Augment(AugmentSettings(hflip=0.5, vflip=0.5, quarter_turns=0.7), input, seed=5)(batch)
    for n, mask in enumerate(present(batch.masks)):
        mask = mask.flip(-1) if drawn["hflip"][n] else mask
        mask = mask.flip(-2) if drawn["vflip"][n] else mask
        assert torch.equal(present(out.masks)[n], torch.rot90(mask, int(drawn["turns"][n])))


def test_one_resampling_moves_a_pattern_as_the_matrices_say():
    """A composed op is one resampling: a linear ramp stays exact, as it would not after two with a border."""
    batch, input = make_batch(6, (40, 40))
    y, x = torch.meshgrid(torch.arange(40.0) + 0.5, torch.arange(40.0) + 0.5, indexing="ij")
    ramp = torch.stack([x, y, torch.ones(40, 40)]).expand(6, 3, 40, 40).contiguous()
    geometry = Geometry(EVERYTHING)
    matrices = geometry.matrices(
        values_of(draw_parameters(EVERYTHING, 1, batch.epochs, batch.positions)), (40, 40), (40, 40)
    )
    out, _ = warp(ramp, None, matrices, (40, 40))
    inside = out[:, 2] > 1 - 1e-6
    back = torch.linalg.inv(matrices).float() @ torch.stack([x, y, torch.ones(40, 40)]).flatten(1)
    difference = (out[:, :2] - back[:, :2].unflatten(-1, (40, 40))).abs().amax(1)
    assert inside.float().mean() > 0.3
    assert difference[inside].max() < 1e-3
    assert geometry.calls == {name: 1 for name in geometry.calls}


def test_image_and_mask_are_resampled_once_each(monkeypatch):
    rows = Counter()
    real = torch.nn.functional.grid_sample

    def counting(images, grid, mode, **more):
        rows[mode] += len(grid)
        return real(images, grid, mode=mode, **more)

    monkeypatch.setattr("pipeline.augment.pixels.grid_sample", counting)
    batch, input = make_batch()
    Augment(EVERYTHING, input, seed=0)(batch)
    assert rows == {"bilinear": len(batch), "nearest": len(batch)}


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), turn=st.sampled_from([0.0, 35.0]), shear=st.sampled_from([0.0, 12.0]))
def test_boxes_agree_with_boxes_drawn_into_the_mask(seed: int, turn: float, shear: float):
    """A box painted into a mask, warped, and measured again is the box moved by its corners."""
    wanted = AugmentSettings(
        hflip=0.5, vflip=0.5, quarter_turns=0.5, rotate=turn, shear=shear, scale=(0.8, 1.2), translate=0.05
    )
    random = np.random.default_rng(seed)
    corner, extent = random.integers(50, 80, 2), random.integers(8, 40, 2)
    box = np.concatenate([corner, corner + extent]).astype(float)
    mask = np.zeros((160, 160), np.uint8)
    mask[corner[1] : corner[1] + extent[1], corner[0] : corner[0] + extent[0]] = 1
    input = InputSettings(size=(160, 160))
    image = np.zeros((160, 160, 3), np.uint8)
    parts = frame([image], [mask], [box[None]], [np.array([0])], None, input, train=True)
    batch = batch_of(parts, [seed])
    out = Augment(wanted, input, seed=seed)(batch)
    rows, columns = torch.where(present(out.masks)[0] == 1)
    drawn = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    # Upright boxes to the nearest pixel; the corner of a turned box may fall between pixel centres.
    tolerance = 0.51 if turn == shear == 0 else 2.0
    assert (present(out.boxes)[0, 0] - drawn).abs().max() <= tolerance


def test_flipped_and_turned_boxes_are_exact():
    batch, input = make_batch(8, (32, 32))
    wanted = AugmentSettings(hflip=0.5, vflip=0.5, quarter_turns=0.7)
    drawn = draw_parameters(wanted, 5, batch.epochs, batch.positions)
    out = Augment(wanted, input, seed=5)(batch)
    for n, expected in enumerate(present(batch.boxes)):
        x1, y1, x2, y2 = expected.unbind(-1)
        if drawn["hflip"][n]:
            x1, x2 = 32 - x2, 32 - x1
        if drawn["vflip"][n]:
            y1, y2 = 32 - y2, 32 - y1
        for _ in range(int(drawn["turns"][n])):
            x1, y1, x2, y2 = y1, 32 - x2, y2, 32 - x1
        torch.testing.assert_close(present(out.boxes)[n], torch.stack([x1, y1, x2, y2], -1), atol=1e-4, rtol=0)


def test_boxes_with_too_little_left_are_dropped_with_their_labels_and_crowds_are_kept():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [12, 0, 22, 10], [16, 0, 26, 10], [16, 0, 26, 10], [30, 0, 40, 10]]])
    labels, crowd = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[False, False, False, True, True]])
    moved = visible_boxes(boxes, labels, crowd, torch.eye(3)[None], (20, 20), (20, 20), min_visible=0.5)
    assert moved[0].tolist() == [[[0, 0, 10, 10], [12, 0, 20, 10], [0, 0, 0, 0], [16, 0, 20, 10], [0, 0, 0, 0]]]
    assert moved[1].tolist() == [[1, 2, -1, 4, -1]]
    assert moved[2].tolist() == [[False, False, False, True, False]]


def test_what_was_cut_off_by_the_canvas_counts_as_invisible():
    """Zoomed out, a box beyond the canvas would lie inside the output, where no pixel shows it."""
    boxes = torch.tensor([[[-30.0, 0, 10, 20], [5, 5, 15, 15]]])
    half = torch.tensor([[[0.5, 0, 10], [0, 0.5, 10], [0, 0, 1.0]]])
    moved = visible_boxes(boxes, torch.tensor([[1, 2]]), torch.zeros(1, 2).bool(), half, (40, 40), (40, 40), 0.3)
    assert moved[1].tolist() == [[-1, 2]]


def test_images_without_boxes_and_batches_without_labels():
    image = smooth_images(1, 20, 20)[0]
    input = InputSettings(size=(20, 20))
    keys = {"epochs": torch.zeros(1, dtype=torch.int64), "positions": torch.zeros(1, dtype=torch.int64)}
    none = frame([image], None, [np.zeros((0, 4))], [np.zeros(0, np.int64)], None, input, train=True)
    out = Augment(EVERYTHING, input)(Batch(["a"], **none, **keys))
    assert (present(out.labels) == -1).all()
    assert out.masks is None
    unlabelled = Augment(EVERYTHING, input)(
        Batch(["a"], **frame([image], None, None, None, None, input, train=True), **keys)
    )
    assert unlabelled.boxes is None
    assert unlabelled.images.isfinite().all()


def test_a_batch_without_images_passes():
    input = InputSettings(size=(20, 20))
    parts = frame([], None, None, None, None, input, train=True)
    empty = Batch([], epochs=torch.zeros(0, dtype=torch.int64), positions=torch.zeros(0, dtype=torch.int64), **parts)
    assert Augment(EVERYTHING, input)(empty).images.shape == (0, 3, 20, 20)
