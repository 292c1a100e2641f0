"""Weighted boxes fusion against the published values; both ways of clustering against hand-made cases and a loop."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.images import boxes as box_ops
from pipeline.uncertainty.box_clusters import Clusters, MemberBoxes
from pipeline.uncertainty.box_fusion import DEFAULT_IOU, FUSIONS, Rule, bsas, wbf
from tests.support.fusion_cases import BOTH, member, same, some_members

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
