"""Boxes of several members grouped into clusters, and the mean, spread and agreement of each cluster.

``SortedBoxes`` holds the boxes of one image in order of score and groups them; ``_MemberVotes`` has one row for each
member in each cluster, from which the statistics follow. Everything is computed on the CPU in float64: one copy there,
one back, whatever the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.images import boxes as box_ops
from pipeline.uncertainty import measures

_MIN_WEIGHT = 1e-6
"""Least weight of a box in a mean: boxes with a score of 0 still have one."""

ChooseCluster = Callable[[np.ndarray, np.ndarray], int | None]
"""(overlaps of a box with the clusters (c,), whether each has a box of the same member (c,)) -> cluster or None."""


@dataclass(frozen=True)
class MemberBoxes:
    """The detections of one member in one image: B boxes, K classes; no box at all is fine."""

    boxes: Tensor
    """(B, 4) float32."""
    scores: Tensor
    """(B,) in 0..1."""
    labels: Tensor
    """(B,) int64."""
    probabilities: Tensor
    """(B, K + 1), the last "none of these"."""
    covariance: Tensor | None = None
    """(B, 4, 4) square pixels, the covariance of its edges that the member itself predicts; None: it predicts none."""


@dataclass(frozen=True)
class Clusters:
    """G objects of one image, the best score first, on the device of the members, float32."""

    boxes: Tensor
    """(G, 4)."""
    scores: Tensor
    """(G,)."""
    labels: Tensor
    """(G,) int64."""
    probabilities: Tensor
    """(G, K + 1)."""
    votes: Tensor
    """(G,) int64 members that see the object, 1 to M."""
    std: Tensor
    """(G, 4) pixels, the roots of the covariance's diagonal."""
    covariance: Tensor
    """(G, 4, 4) square pixels: between members, plus the mean of what they predict themselves (law of total variance).
    Of one member: its own, or 0. NaN where one of several members alone sees the object: not known."""
    expected_entropy: Tensor
    """(G,) nats, ``1/M Σ_m H[p_m]``; that of an absent member is 0."""
    overlap: Tensor
    """(G,) mean IoU of all pairs of members that see it; 1 of one member, NaN where one of several sees it alone."""


class SortedBoxes:
    """The n boxes of all members in order of weighted score, the best first; ties by member, then by index.

    Args:
        members: Of one image.
        weights: (M,) positive, by which scores are multiplied.
        min_score: Boxes with a lower score are left out.

    Raises:
        ValueError: No member.
    """

    def __init__(self, members: Sequence[MemberBoxes], weights: np.ndarray, min_score: float) -> None:
        if not members:
            raise ValueError("the boxes of no members; give at least one")
        self.device = members[0].boxes.device
        self.num_members = len(members)
        self.weights = weights
        has_covariance = any(member.covariance is not None for member in members)
        # One table of all columns, so that a GPU is waited for once.
        table = torch.cat([_box_table(member, has_covariance) for member in members]).cpu().numpy()
        owner = np.repeat(np.arange(len(members)), [len(member.boxes) for member in members])
        scores = table[:, 4]
        # What is not finite overlaps nothing, and would make its cluster's mean not finite.
        keep = np.isfinite(table[:, :5]).all(1) & (scores >= min_score)
        order = np.flatnonzero(keep)
        order = order[np.argsort(-(scores * weights[owner])[order], kind="stable")]
        table, self.owner = table[order], owner[order]
        classes = members[0].probabilities.shape[1]
        self.boxes = table[:, :4]
        self.labels = table[:, 5].astype(np.int64)
        self.probabilities = table[:, 6 : 6 + classes]
        self.member_covariance = table[:, 6 + classes :] if has_covariance else None
        self.scores = table[:, 4] * weights[self.owner]
        self.mass = np.maximum(self.scores, _MIN_WEIGHT)
        self.cluster = np.zeros(len(order), np.int64)
        """(n,) number of each box's cluster, after ``assign``."""
        self.count = 0
        """Clusters, after ``assign``."""

    def assign(self, choose: ChooseCluster) -> None:
        """Group the boxes of each class, the best first; ``choose`` says which cluster a box joins, None: a new one."""
        for label in np.unique(self.labels):
            rows = np.flatnonzero(self.labels == label)
            self.cluster[rows] = rows[self._opener_of_each(rows, choose)]
        # So far a cluster is named by the row of its best box; now they are numbered in that order, without gaps.
        openers, self.cluster = np.unique(self.cluster, return_inverse=True)
        self.count = len(openers)

    def _opener_of_each(self, rows: np.ndarray, choose: ChooseCluster) -> np.ndarray:
        """Which of the boxes ``rows`` (one class, sorted) opened the cluster of each of them."""
        # Room for the worst case, a cluster for every box; the first ``count`` places are in use.
        mean, area, mass = np.empty((len(rows), 4)), np.empty(len(rows)), np.empty(len(rows))
        has_member = np.zeros((len(rows), self.num_members), bool)
        opener, cluster = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        count = 0
        for n, row in enumerate(rows):
            box, owner = self.boxes[row], self.owner[row]
            joined = None
            if count:
                overlaps = _overlap(mean[:count], area[:count], box, _area(box))
                joined = choose(overlaps, has_member[:count, owner])
            if joined is None:
                joined, count = count, count + 1
                mean[joined], mass[joined], opener[joined] = box, self.mass[row], n
            else:
                # The next box is compared with the mean of all boxes so far, not with the first one.
                mass[joined] += self.mass[row]
                # A running mean of equal boxes is exactly that box.
                mean[joined] += (box - mean[joined]) * (self.mass[row] / mass[joined])
            area[joined] = _area(mean[joined])
            has_member[joined, owner] = True
            cluster[n] = joined
        return opener[cluster]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(G,) sums of (n,) values by cluster."""
        return np.bincount(self.cluster, values, self.count)

    def clusters(self, scores: np.ndarray) -> Clusters:
        """The clusters with all their statistics, given their scores (G,)."""
        votes = _MemberVotes(self)
        order = np.argsort(-scores, kind="stable")
        labels = np.zeros(self.count, np.int64)
        labels[self.cluster] = self.labels
        boxes, covariance = votes.moments()
        probabilities, expected_entropy = votes.pool()
        std = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))

        def to_tensor(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.from_numpy(values[order]).to(dtype).to(self.device)

        return Clusters(
            boxes=to_tensor(boxes),
            scores=to_tensor(scores),
            labels=to_tensor(labels, torch.int64),
            probabilities=to_tensor(probabilities),
            votes=to_tensor(votes.count, torch.int64),
            std=to_tensor(std),
            covariance=to_tensor(covariance),
            expected_entropy=to_tensor(expected_entropy),
            overlap=to_tensor(votes.overlap()),
        )


class _MemberVotes:
    """One row for each member that sees a cluster, sorted by cluster, then by member.

    A member with several boxes in a cluster has one vote: their mean box, and the class vector of the best of them.
    """

    def __init__(self, sorted_boxes: SortedBoxes) -> None:
        self.sorted_boxes = sorted_boxes
        key, self.best, vote = np.unique(
            sorted_boxes.cluster * sorted_boxes.num_members + sorted_boxes.owner,
            return_index=True,
            return_inverse=True,
        )
        self.cluster = key // sorted_boxes.num_members
        self.count = np.bincount(self.cluster, minlength=sorted_boxes.count)
        # Votes of a cluster lie together: here the first of each begins.
        self.start = np.cumsum(self.count) - self.count
        # Boxes are sorted by score, so the first of a member, ``best``, has its highest score.
        self.boxes, self.mass = _weighted_means(sorted_boxes.boxes, sorted_boxes.mass, vote, self.best)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean boxes (G, 4) and their covariance (G, 4, 4).

        Between members: ``Σ w d dᵀ / (Σw - Σw² / Σw)``, d the distance from the mean: without bias for weights that
        have nothing to do with d, and ``1 / (k - 1) Σ d dᵀ`` where they are equal.
        """
        num_clusters = self.sorted_boxes.count
        boxes, total = _weighted_means(self.boxes, self.mass, self.cluster, self.start)
        distance = self.boxes - boxes[self.cluster]
        products = (self.mass[:, None, None] * distance[:, :, None] * distance[:, None, :]).reshape(-1, 16)
        freedom = total - np.bincount(self.cluster, self.mass**2, num_clusters) / total
        # One vote has no freedom: of one member there is no spread, of several it is not known.
        alone = self.count < 2
        covariance = _group_sums(products, self.cluster, num_clusters) / np.where(alone, 1.0, freedom)[:, None]
        covariance[alone] = np.nan if self.sorted_boxes.num_members > 1 else 0.0
        # Law of total variance: the mean of the members' own covariances is added to that between them.
        if self.sorted_boxes.member_covariance is not None:
            own_covariance = self.sorted_boxes.member_covariance[self.best]
            covariance += _weighted_means(own_covariance, self.mass, self.cluster, self.start)[0]
        return boxes, covariance.reshape(-1, 4, 4)

    def pool(self) -> tuple[np.ndarray, np.ndarray]:
        """Class vectors (G, K + 1) and expected entropies (G,); an absent member is surely "none of these"."""
        probabilities = self.sorted_boxes.probabilities[self.best]
        # float32, as the entropy of the pool will be: so copies of a member have no mutual information at all.
        entropies = measures.entropy(torch.from_numpy(probabilities).float(), -1).double().numpy()
        columns = np.concatenate([probabilities, entropies[:, None]], 1)
        # The mean over those present, times their share, is the mean over all with 0 for the absent ones ...
        share = (self.count / self.sorted_boxes.num_members)[:, None]
        means = share * _weighted_means(columns, np.ones(len(columns)), self.cluster, self.start)[0]
        # ... whose class vector has a 1 at "none of these", and so an entropy of 0.
        means[:, -2] += 1 - share[:, 0]
        return means[:, :-1], means[:, -1]

    def overlap(self) -> np.ndarray:
        """(G,) mean IoU over all pairs of members in a cluster."""
        total = np.zeros(self.sorted_boxes.count)
        # Votes of a cluster lie together, so pairs are found by shifting: next neighbours, next but one, and so on.
        for shift in range(1, int(self.count.max(initial=0))):
            first = np.flatnonzero(self.cluster[shift:] == self.cluster[:-shift])
            boxes, shifted = torch.from_numpy(self.boxes[first]), torch.from_numpy(self.boxes[first + shift])
            overlaps = box_ops.iou(boxes[:, None], shifted[:, None])[:, 0, 0].numpy()
            total += np.bincount(self.cluster[first], overlaps, self.sorted_boxes.count)
        num_pairs = np.maximum(self.count * (self.count - 1) / 2, 1)
        alone = np.nan if self.sorted_boxes.num_members > 1 else 1.0
        return np.where(self.count > 1, total / num_pairs, alone)


def _box_table(member: MemberBoxes, has_covariance: bool) -> Tensor:
    """(B, 6 + K + 1) float64: box, score, label, class vector; and 16 columns of covariance if any member has one."""
    columns = [member.boxes, member.scores[:, None], member.labels[:, None], member.probabilities]
    if has_covariance:
        covariance = member.covariance
        if covariance is None:
            covariance = member.boxes.new_zeros(len(member.boxes), 16)
        columns.append(covariance.reshape(-1, 16))
    return torch.cat([column.detach().double() for column in columns], 1)


def _group_sums(values: np.ndarray, group: np.ndarray, num_groups: int) -> np.ndarray:
    """(num_groups, D) sums of (n, D) by group."""
    sums = np.zeros((num_groups, values.shape[1]))
    np.add.at(sums, group, values)
    return sums


def _weighted_means(
    values: np.ndarray, mass: np.ndarray, group: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means (G, D) of (n, D) values by group, weighted by mass (n,), and the sums of mass (G,).

    Measured from the values of each group's ``first`` (G,) row, so that the mean of equal values is exactly that value.
    """
    total = np.bincount(group, mass, len(first))
    origin = values[first]
    offsets = _group_sums(mass[:, None] * (values - origin[group]), group, len(first)) / total[:, None]
    return origin + offsets, total


def _area(box: np.ndarray) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _overlap(boxes: np.ndarray, areas: np.ndarray, box: np.ndarray, area: float) -> np.ndarray:
    """(c,) IoU of boxes (c, 4) with one box; numpy, because a call of torch costs several times as much."""
    side = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    shared = np.maximum(side[:, 0], 0) * np.maximum(side[:, 1], 0)
    return shared / np.maximum(areas + area - shared, 1e-300)
