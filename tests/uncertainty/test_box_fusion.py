"""Weighted boxes fusion against the published values; both clusterings against hand-made cases and laws."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.images import boxes as box_ops
from pipeline.uncertainty import measures
from pipeline.uncertainty.box_clusters import Clusters, MemberBoxes
from pipeline.uncertainty.box_fusion import DEFAULT_IOU, FUSIONS, Rule, bsas, wbf

BOTH = pytest.mark.parametrize("fuse", FUSIONS.values(), ids=FUSIONS)


def member(boxes: list, scores: list, labels: list | None = None, classes: int = 2) -> MemberBoxes:
    """A member sure of its labels."""
    names = torch.tensor(labels or [0] * len(scores), dtype=torch.int64)
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return MemberBoxes(corners, torch.tensor(scores, dtype=torch.float32), names, torch.eye(classes + 1)[names])


def some_members(seed: int, members: int, objects: int = 12, classes: int = 2, noise: int = 4) -> list[MemberBoxes]:
    """Members that see most of the same objects, some boxes of their own, in whole pixels; all scores differ."""
    generator = torch.Generator().manual_seed(seed)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator).float()

    corner, side, label = whole(120, objects, 2), 16 + whole(30, objects, 2), whole(classes, objects).long()
    scores = (1 + torch.randperm(members * objects, generator=generator)) / (members * objects + 1)
    out = []
    for own in scores.split(objects):
        low = corner + whole(noise, objects, 2)
        boxes = torch.cat([low, low + side + whole(noise, objects, 2)], 1)
        seen = (torch.rand(objects, generator=generator) < 0.8).nonzero()[:, 0]
        vectors = (2 * torch.randn(objects, classes + 1, generator=generator)).softmax(1)
        out.append(MemberBoxes(boxes[seen], own[seen], label[seen], vectors[seen]))
    return out


def suppressed(one: MemberBoxes, iou: float = 0.0) -> MemberBoxes:
    """Without two overlapping boxes of one class, the best first."""
    at = box_ops.batched_nms(one.boxes, one.scores, one.labels, iou)
    return MemberBoxes(one.boxes[at], one.scores[at], one.labels[at], one.probabilities[at])


def same(a: Clusters, b: Clusters, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    for field in dataclasses.fields(Clusters):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        torch.testing.assert_close(
            mine, other, atol=atol, rtol=rtol, equal_nan=True, msg=lambda m, n=field.name: f"{n}: {m}"
        )


README = [
    member(
        [[0, 0.51, 0.81, 0.91], [0.1, 0.31, 0.71, 0.61], [0.01, 0.32, 0.83, 0.93], [0.02, 0.53, 0.11, 0.94],
         [0.03, 0.24, 0.12, 0.35]],
        [0.9, 0.8, 0.2, 0.4, 0.7], [0, 1, 0, 1, 1],
    ),
    member(
        [[0.04, 0.56, 0.84, 0.92], [0.12, 0.33, 0.72, 0.64], [0.38, 0.66, 0.79, 0.95], [0.08, 0.49, 0.21, 0.89]],
        [0.5, 0.8, 0.7, 0.3], [1, 1, 1, 0],
    ),
]  # fmt: skip
"""The example of ZFTurbo/Weighted-Boxes-Fusion's README; the expected values are what ensemble-boxes 1.0.9 gives."""


@pytest.mark.parametrize(
    ("rule", "scores", "labels"),
    [
        ("avg", [0.8, 0.7333, 0.4667, 0.2667, 0.2333, 0.1667, 0.1], [1, 0, 1, 1, 1, 1, 0]),
        ("max", [0.9, 0.8, 0.7, 0.4, 0.35, 0.25, 0.15], [0, 1, 1, 1, 1, 1, 0]),
        ("box_and_model_avg", [0.8, 0.4667, 0.3667, 0.2667, 0.2333, 0.1667, 0.1], [1, 1, 0, 1, 1, 1, 0]),
        ("absent_model_aware_avg", [0.8, 0.4667, 0.44, 0.2667, 0.2333, 0.1667, 0.1], [1, 1, 0, 1, 1, 1, 0]),
    ],
)
def test_weighted_boxes_fusion_gives_the_published_values(rule: Rule, scores: list[float], labels: list[int]):
    found = wbf(README, 0.5, [2, 1], rule, 1e-4)
    torch.testing.assert_close(found.scores, torch.tensor(scores), atol=6e-5, rtol=0)
    assert found.labels.tolist() == labels
    for label, box in ((1, [0.1067, 0.3167, 0.7133, 0.62]), (0, [0.0018, 0.4755, 0.8136, 0.9136])):
        torch.testing.assert_close(found.boxes[labels.index(label)], torch.tensor(box), atol=6e-5, rtol=0)


def test_one_member_with_two_boxes_in_a_cluster_has_one_vote():
    found = wbf(README, 0.5, [2, 1], skip=1e-4)
    assert found.votes.tolist() == [2, 1, 1, 1, 1, 1, 1]
    # The second: two boxes, but nothing is known of the spread between members.
    assert found.std[1].isnan().all()
    assert found.probabilities[1].tolist() == [0.5, 0, 0.5]


def test_bsas_takes_at_most_one_box_of_a_member():
    twice = member([[0, 0, 10, 10], [0, 0, 10, 9]], [0.9, 0.8])
    assert wbf([twice], 0.5).votes.tolist() == [1]
    found = bsas([twice, member([[0, 0, 10, 10]], [0.5])], 0.5)
    assert found.votes.tolist() == [2, 1]
    torch.testing.assert_close(found.scores, torch.tensor([0.7, 0.4]))


def test_a_box_joins_the_cluster_that_it_overlaps_most():
    apart = member([[0, 0, 10, 10], [3, 0, 13, 10]], [0.9, 0.8])
    for fuse in (wbf, bsas):
        found = fuse([apart, member([[2, 0, 12, 10]], [0.4])], 0.55)
        assert found.votes.tolist() == [2, 1]
        torch.testing.assert_close(found.boxes[0], torch.tensor([8 / 3, 0, 38 / 3, 10]))
        torch.testing.assert_close(found.scores, torch.tensor([0.6, 0.45]))


@pytest.mark.parametrize(("fuse", "joins"), [(wbf, False), (bsas, True)])
def test_at_the_threshold_itself(fuse, joins: bool):
    found = fuse([member([[0, 0, 10, 10]], [0.9]), member([[0, 0, 5, 10]], [0.8])], 0.5)
    assert len(found.scores) == (1 if joins else 2)


def test_overlap_is_with_the_running_box():
    """The third overlaps the first by 0.52, but the mean of the first two by 0.66: it joins."""
    row = [member([[x, 0, x + 100, 100]], [0.9 - x / 1000]) for x in (0, 20, 31)]
    for fuse in (wbf, bsas):
        assert fuse(row, 0.6).votes.tolist() == [3]
        assert len(fuse([row[0], row[2]], 0.6).votes) == 2


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


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_both_agree_on_boxes_that_lie_apart(seed: int, count: int):
    far = torch.arange(12)[:, None] * torch.tensor([300.0, 0, 300, 0])
    members = []
    for m in some_members(seed, count):
        low = m.boxes - m.boxes[:, [0, 1, 0, 1]]
        members.append(dataclasses.replace(m, boxes=low + far[: len(low)] + 1))
    single = [dataclasses.replace(m, labels=m.labels * 0) for m in members]
    same(wbf(single, 0.1), bsas(single, 0.1))


def brute(members: list[MemberBoxes], iou: float) -> list[tuple[int, list[tuple[int, int]]]]:
    """(label, [(member, index)...]) of the clusters of bsas, one box at a time."""
    every = [(-float(m.scores[i]), n, i) for n, m in enumerate(members) for i in range(len(m.scores))]
    clusters: list[tuple[int, list[tuple[int, int]]]] = []
    for _, n, i in sorted(every):
        label, best, found = int(members[n].labels[i]), iou, None
        for cluster in clusters:
            if cluster[0] != label or n in [m for m, _ in cluster[1]]:
                continue
            boxes = torch.stack([members[m].boxes[j] for m, j in cluster[1]]).double()
            w = torch.stack([members[m].scores[j] for m, j in cluster[1]]).double()
            mean = (boxes * w[:, None]).sum(0, keepdim=True) / w.sum()
            overlap = box_ops.iou(mean, members[n].boxes[i][None].double()).item()
            if overlap > best:
                best, found = overlap, cluster
        if found is None:
            clusters.append((label, [(n, i)]))
        else:
            found[1].append((n, i))
    return clusters


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_bsas_equals_a_loop(seed: int, count: int):
    members = some_members(seed, count, noise=8)
    # No ratio of small whole numbers: at the threshold itself rounding would decide.
    found, wanted = bsas(members, math.sqrt(0.4)), brute(members, math.sqrt(0.4))
    scores = [sum(float(members[m].scores[i]) for m, i in rows) / count for _, rows in wanted]
    order = sorted(range(len(wanted)), key=lambda g: -scores[g])
    np.testing.assert_allclose(found.scores, [scores[g] for g in order], rtol=1e-5)
    assert sorted(found.votes.tolist()) == sorted(len(rows) for _, rows in wanted)
    assert sorted(found.labels.tolist()) == sorted(label for label, _ in wanted)


@BOTH
def test_ties_go_to_the_first_member_and_the_first_box(fuse):
    a, b = member([[0, 0, 10, 10], [50, 0, 60, 10]], [0.5, 0.5]), member([[90, 0, 99, 10], [0, 0, 10, 10]], [0.5, 0.5])
    found = fuse([a, b], 0.5)
    assert found.boxes[:, 0].tolist() == [0, 50, 90]
    same(found, fuse([a, b], 0.5), atol=0, rtol=0)


@BOTH
def test_nothing_seen_and_no_number(fuse):
    none = fuse([member([], []), member([], [])], 0.5)
    assert (none.boxes.shape, none.probabilities.shape, none.covariance.shape) == ((0, 4), (0, 3), (0, 4, 4))
    assert (none.labels.dtype, none.votes.dtype, none.boxes.dtype) == (torch.int64, torch.int64, torch.float32)
    broken = member([[0, 0, 10, 10], [math.nan, 0, 10, 10], [0, 0, 9, 9]], [0.9, 0.8, math.nan])
    assert fuse([broken], 0.5).boxes.tolist() == [[0, 0, 10, 10]]
    zero = member([[0, 0, 10, 10]], [0.0])
    assert fuse([zero, zero], 0.5).boxes.tolist() == [[0, 0, 10, 10]]
    with pytest.raises(ValueError, match="no members"):
        fuse([], 0.5)


def test_the_thresholds_of_the_papers_are_the_defaults():
    assert set(DEFAULT_IOU) == set(FUSIONS)
    members = some_members(3, 4)
    for name, fuse in (("wbf", wbf), ("bsas", bsas)):
        same(fuse(members), FUSIONS[name](members, DEFAULT_IOU[name]), atol=0, rtol=0)


def test_skipped_boxes_and_wrong_arguments():
    assert len(wbf(README, 0.5, skip=0.5).scores) == 5
    for weights in ([1], [1, 0], [1, -2]):
        with pytest.raises(ValueError, match="one positive weight a member"):
            wbf(README, 0.5, weights)
    with pytest.raises(ValueError, match="no rule 'mean'; there are avg, max"):
        wbf(README, 0.5, rule="mean")  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH
def test_on_a_gpu_the_same(fuse):
    members = some_members(0, 4)
    moved = [MemberBoxes(*(each.cuda() for each in (m.boxes, m.scores, m.labels, m.probabilities))) for m in members]
    found = fuse(moved, 0.5)
    assert found.boxes.is_cuda
    back = Clusters(**{field.name: getattr(found, field.name).cpu() for field in dataclasses.fields(Clusters)})
    same(back, fuse(members, 0.5), atol=0, rtol=0)
