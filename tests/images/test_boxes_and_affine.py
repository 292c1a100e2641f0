"""Box geometry against closed forms, counted pixels and torchvision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from pipeline.images import affine
from pipeline.images import boxes as box_ops
from tests.support.augment_cases import letterbox


def some_boxes(count: int, seed: int, extent: float = 50.0) -> Tensor:
    """(count, 4) boxes with positive area inside a square of ``extent`` pixels."""
    points = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * extent
    low, high = points.amin(1), points.amax(1)
    return torch.cat([low, high + 0.5], 1)


def pixels(box: list[int], size: int = 40) -> np.ndarray:
    """The mask of an integer box under the convention: columns x1 to x2 - 1."""
    mask = np.zeros((size, size), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def test_iou_counts_pixels():
    a, b = [3, 4, 13, 24], [8, 10, 30, 20]
    expected = (pixels(a) & pixels(b)).sum() / (pixels(a) | pixels(b)).sum()
    got = box_ops.iou(torch.tensor([a]).float(), torch.tensor([b]).float())
    assert got.item() == pytest.approx(expected, abs=1e-7)


def test_iou_and_giou_agree_with_torchvision():
    a, b = some_boxes(7, 0), some_boxes(5, 1)
    torch.testing.assert_close(box_ops.iou(a, b), box_iou(a, b))
    torch.testing.assert_close(box_ops.giou(a[:5], b), generalized_box_iou(a[:5], b).diagonal())


def test_iou_broadcasts_over_a_batch():
    a, b = (
        torch.stack([some_boxes(4, 2), some_boxes(4, 3)]),
        torch.stack([some_boxes(3, 4), some_boxes(3, 5)]),
    )
    got = box_ops.iou(a, b)
    assert got.shape == (2, 4, 3)
    torch.testing.assert_close(got[1], box_iou(a[1], b[1]))


def test_iou_of_boxes_without_area_is_zero_and_giou_has_a_finite_gradient():
    empty = torch.zeros(2, 4, requires_grad=True)
    assert box_ops.iou(empty, empty).eq(0).all()
    box_ops.giou(empty, torch.zeros(2, 4)).sum().backward()
    assert empty.grad is not None
    assert empty.grad.isfinite().all()


def test_empty_lists():
    none = torch.zeros(0, 4)
    assert box_ops.iou(none, some_boxes(3, 0)).shape == (0, 3)
    assert affine.transform_boxes(none, torch.eye(3)).shape == (0, 4)
    assert box_ops.nms(none, torch.zeros(0), 0.5).shape == (0,)


def test_nms_keeps_the_best_of_each_group():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    scores = torch.tensor([0.6, 0.9, 0.5])
    assert box_ops.nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert box_ops.batched_nms(boxes, scores, torch.tensor([0, 1, 0]), 0.5).tolist() == [1, 0, 2]


def test_clip_to_one_size_and_to_a_size_each():
    boxes = torch.tensor([[-5.0, 2, 30, 50]])
    assert box_ops.clip(boxes, (20, 25)).tolist() == [[0, 2, 25, 20]]
    got = box_ops.clip(boxes.expand(2, 1, 4), torch.tensor([[20, 25], [60, 10]]))
    assert got.tolist() == [[[0, 2, 25, 20]], [[0, 2, 10, 50]]]


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    out_h=st.integers(8, 600),
    out_w=st.integers(8, 600),
)
def test_letterbox_fits_touches_and_inverts(height: int, width: int, out_h: int, out_w: int):
    place = affine.letterbox_placement((height, width), (out_h, out_w))
    assert place.top >= 0
    assert place.left >= 0
    assert place.top + place.height <= out_h
    assert place.left + place.width <= out_w
    assert place.height == out_h or place.width == out_w
    forward, inverse = letterbox((height, width), (out_h, out_w))
    torch.testing.assert_close(forward @ inverse, torch.eye(3, dtype=torch.float64))
    whole = affine.transform_boxes(torch.tensor([[0.0, 0, width, height]], dtype=torch.float64), forward)
    expected = [place.left, place.top, place.left + place.width, place.top + place.height]
    assert whole[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_letterbox_of_the_same_size_is_the_identity():
    forward, inverse = letterbox((48, 64), (48, 64))
    assert torch.equal(forward, torch.eye(3, dtype=torch.float64))
    assert torch.equal(inverse, forward)


def test_transform_by_the_identity_is_exact():
    boxes = some_boxes(50, 7, 1e4)
    assert torch.equal(affine.transform_boxes(boxes, torch.eye(3)), boxes)


@given(angle=st.floats(-180, 180), scale=st.floats(0.2, 5), shear=st.floats(-1, 1), seed=st.integers(0, 99))
def test_transform_is_the_hull_of_the_four_corners(angle: float, scale: float, shear: float, seed: int):
    turn = math.radians(angle)
    matrix = torch.tensor(
        [
            [scale * math.cos(turn), shear - scale * math.sin(turn), 3.5],
            [scale * math.sin(turn), scale * math.cos(turn), -7.25],
            [0, 0, 1],
        ],
        dtype=torch.float64,
    )
    boxes = some_boxes(4, seed).double()
    corners = boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]
    moved = corners @ matrix[:2, :2].T + matrix[:2, 2]
    expected = torch.cat([moved.amin(1), moved.amax(1)], 1)
    torch.testing.assert_close(affine.transform_boxes(boxes, matrix), expected)


def test_inverse_of_affine_matrices():
    generator = torch.Generator().manual_seed(3)
    matrices = torch.eye(3, dtype=torch.float64).repeat(6, 1, 1)
    matrices[:, :2] += 0.4 * torch.rand(6, 2, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(affine.invert_affine(matrices), torch.linalg.inv(matrices))
