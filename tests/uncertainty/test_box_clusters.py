"""What is said of a cluster of boxes: closed forms of its mean, spread and agreement, and laws of both fusions."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.images import boxes as box_ops
from pipeline.uncertainty import measures
from pipeline.uncertainty.box_clusters import MemberBoxes
from pipeline.uncertainty.box_fusion import bsas
from tests.support.fusion_cases import BOTH, member, same, some_members, suppressed


@BOTH
def test_the_mean_and_spread_of_three_in_closed_form(fuse):
    boxes = np.array([[0, 0, 40, 40], [2, 1, 41, 44], [1, 3, 42, 39]], np.float64)
    weights = np.array([0.8, 0.6, 0.5])
    found = fuse([member([box.tolist()], [w]) for box, w in zip(boxes, weights, strict=True)], 0.5)
    wanted = np.average(boxes, 0, weights)
    np.testing.assert_allclose(found.boxes[0], wanted, rtol=1e-6)
    # aweights: the same estimate, sum of w d d' over (sum w - sum w^2 / sum w).
    np.testing.assert_allclose(found.covariance[0], np.cov(boxes.T, aweights=weights), rtol=1e-5)
    np.testing.assert_allclose(found.std[0], np.sqrt(np.diag(np.cov(boxes.T, aweights=weights))), rtol=1e-5)
    corners = torch.from_numpy(boxes).float()
    pairs = box_ops.iou(corners, corners)[[0, 0, 1], [1, 2, 2]]
    torch.testing.assert_close(found.overlap[0], pairs.mean())
    assert found.scores[0].item() == pytest.approx(weights.mean())


@BOTH
def test_an_absent_member_says_background_for_sure(fuse):
    p = torch.tensor([[0.6, 0.3, 0.1]])
    one = MemberBoxes(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0.9]), torch.tensor([0]), p)
    found = fuse([one, member([], []), member([], [])], 0.5)
    torch.testing.assert_close(found.probabilities, torch.tensor([[0.2, 0.1, 0.7]]))
    torch.testing.assert_close(found.expected_entropy, measures.entropy(p, 1) / 3)
    assert found.scores.item() == pytest.approx(0.3)
    assert found.votes.tolist() == [1]


@BOTH
def test_what_is_known_of_a_single_vote(fuse):
    box = member([[0, 0, 10, 10]], [0.9])
    alone, of_two = fuse([box], 0.5), fuse([box, member([], [])], 0.5)
    assert alone.covariance.eq(0).all()
    assert alone.overlap.tolist() == [1]
    assert of_two.covariance.isnan().all()
    assert of_two.std.isnan().all()
    assert of_two.overlap.isnan().all()


@BOTH
def test_the_members_own_covariances_are_added_to_that_between_them(fuse):
    a, b = member([[0, 0, 40, 40]], [0.9]), member([[2, 2, 42, 40]], [0.3])
    between = fuse([a, b], 0.5).covariance
    own = torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0]))[None]
    told = dataclasses.replace(a, covariance=own)
    torch.testing.assert_close(fuse([told, b], 0.5).covariance, between + 0.75 * own)
    assert fuse([told], 0.5).std.tolist() == [[1, 2, 3, 4]]
    assert fuse([told, member([], [])], 0.5).std.isnan().all()


@BOTH
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), copies=st.integers(1, 6), noise=st.integers(1, 8))
def test_copies_of_a_member_are_that_member_without_spread(fuse, seed: int, copies: int, noise: int):
    one = suppressed(some_members(seed, 1, 20, 3, noise)[0])
    found = fuse([one] * copies, 0.5)
    for name in ("boxes", "scores", "labels", "probabilities"):
        assert torch.equal(getattr(found, name), getattr(one, name)), name
    assert found.covariance.eq(0).all()
    assert found.votes.eq(copies).all()
    torch.testing.assert_close(found.overlap, torch.ones(len(one.scores)))
    assert torch.equal(measures.entropy(found.probabilities, -1), found.expected_entropy)


@BOTH
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(4)))
def test_the_order_of_members_does_not_matter(fuse, seed: int, order: list[int]):
    members = some_members(seed, 4)
    same(fuse(members, 0.5), fuse([members[m] for m in order], 0.5), atol=1e-4, rtol=1e-4)


@BOTH
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), shift=st.integers(-64, 64), power=st.integers(-3, 3))
def test_boxes_move_and_grow_with_the_members(fuse, seed: int, shift: int, power: int):
    members, scale = some_members(seed, 4), 2.0**power
    offset = torch.tensor([shift, -shift, shift, -shift]).float()
    moved = fuse([dataclasses.replace(m, boxes=m.boxes * scale + offset) for m in members], 0.5)
    plain = fuse(members, 0.5)
    wanted = dataclasses.replace(
        plain, boxes=plain.boxes * scale + offset, std=plain.std * scale, covariance=plain.covariance * scale**2
    )
    same(moved, wanted, atol=1e-3, rtol=1e-4)


@BOTH
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31), count=st.integers(1, 6), objects=st.integers(0, 25), iou=st.sampled_from([0.3, 0.55, 1])
)
def test_bounds(fuse, seed: int, count: int, objects: int, iou: float):
    members = some_members(seed, count, objects, 2)
    found = fuse(members, iou)
    assert ((found.votes >= 1) & (found.votes <= count)).all()
    assert (found.scores[1:] <= found.scores[:-1]).all()
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(len(found.scores)))
    total = measures.entropy(found.probabilities, -1)
    assert (found.expected_entropy <= total + 1e-6).all()
    boxes, labels = torch.cat([m.boxes for m in members]), torch.cat([m.labels for m in members])
    assert len(found.scores) <= len(boxes)
    for box, label in zip(found.boxes, found.labels, strict=True):
        near = boxes[(labels == label) & (box_ops.iou(box[None], boxes)[0] > 0)]
        assert (box >= near.amin(0)).all()
        assert (box <= near.amax(0)).all()
    known = found.votes > 1
    assert found.std[known].isfinite().all()
    assert (torch.linalg.eigvalsh(found.covariance[known]) >= -1e-3).all()
    assert ((found.overlap[known] > 0) & (found.overlap[known] <= 1)).all()
    if fuse is bsas:
        assert found.votes.sum() == len(boxes)
        assert found.scores.sum().item() == pytest.approx(sum(m.scores.sum().item() for m in members) / count, rel=1e-5)
