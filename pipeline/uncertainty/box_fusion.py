"""Boxes of any members that are one object where they overlap, with the doubt of the object: one image at a time.

Boxes of all members are taken in order of score, the best first, and each joins the cluster of its class that it
overlaps most, or opens one; overlap is with the running score-weighted mean box of the cluster. ``wbf`` lets a
member add several boxes to one cluster, ``bsas`` at most one. Suppression before and after is the caller's.

Of a cluster that k of M members see: the box is the score-weighted mean; the class vector is ``1/M Σ_m p_m``, in
which an absent member says "none of these" for sure; a member with several boxes there counts once, with its own
mean box and the class vector of its best one. Everything is computed on the CPU in float64: one copy there, one
back, whatever the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pipeline.images import boxes as box_ops
from pipeline.uncertainty import measures

Rule = Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"]
_MIN_WEIGHT = 1e-6
"""Boxes with a score of 0 still have a mean."""


@dataclass(frozen=True)
class MemberBoxes:
    """What one member says of one image: B boxes, K classes; no box at all is fine."""

    boxes: Tensor
    """(B, 4) float32."""
    scores: Tensor
    """(B,) in 0..1."""
    labels: Tensor
    """(B,) int64."""
    probabilities: Tensor
    """(B, K + 1), the last "none of these"."""
    covariance: Tensor | None = None
    """(B, 4, 4) square pixels, the member's own doubt of its edges; None: it says none."""


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
    """(G,) int64 members that see it, 1 to M."""
    std: Tensor
    """(G, 4) pixels, the roots of the covariance's diagonal."""
    covariance: Tensor
    """(G, 4, 4) square pixels: between members, plus the mean of what they say themselves (law of total variance).
    Of one member: its own, or 0. NaN where one of several members alone sees the object: not known."""
    expected_entropy: Tensor
    """(G,) nats, ``1/M Σ_m H[p_m]``; that of an absent member is 0."""
    overlap: Tensor
    """(G,) mean IoU of all pairs of members that see it; 1 of one member, NaN where one of several sees it alone."""


def wbf(
    members: Sequence[MemberBoxes],
    iou: float = 0.55,
    weights: Sequence[float] | None = None,
    rule: Rule = "avg",
    skip: float = 0.0,
) -> Clusters:
    """Weighted boxes fusion (Solovyev, Wang & Gabruseva 2021, arXiv 1910.13302).

    With s the scores times their member's weight w, T boxes in a cluster and N members, the cluster's score is
    ``avg``: ``mean(s) min(T, N) / Σ_N w``; ``max``: ``max(s) / max_N w``; ``box_and_model_avg``:
    ``Σ s / Σ_T w * (Σ w of members present) / Σ_N w``; ``absent_model_aware_avg``:
    ``Σ s / (Σ_T w + Σ w of members absent)``. Boxes, and their covariance, are weighted by s.

    Args:
        members: Of one image.
        iou: Overlap above which a box joins.
        weights: Positive, one a member; None: all 1.
        rule: How scores are joined.
        skip: Boxes with a lower score are left out.

    Raises:
        ValueError: No member, an unknown rule, or weights that do not fit.
    """
    every = [1.0] * len(members) if weights is None else list(weights)
    if len(every) != len(members) or not all(weight > 0 for weight in every):
        raise ValueError(f"wbf wants one positive weight a member, and got {every} for {len(members)} members")
    if rule not in get_args(Rule):
        raise ValueError(f"wbf has no rule '{rule}'; there are {', '.join(get_args(Rule))}")
    rows = _Rows(members, np.array(every), skip)
    rows.assign(lambda overlap, _: int(overlap.argmax()) if overlap.max() > iou else None)
    return rows.clusters(_score(rows, rule))


def bsas(members: Sequence[MemberBoxes], iou: float = 0.7) -> Clusters:
    """Basic sequential clustering with at most one box of a member (Miller et al. 2019, arXiv 1809.06006).

    The cluster's score is the mean over all members, 0 for those that do not see it.

    Args:
        members: Of one image.
        iou: Overlap from which a box joins.

    Raises:
        ValueError: No member.
    """
    rows = _Rows(members, np.ones(len(members)), 0.0)

    def choose(overlap: np.ndarray, taken: np.ndarray) -> int | None:
        free = np.where(taken, -1.0, overlap)
        best = int(free.argmax())
        return best if free[best] >= iou else None

    rows.assign(choose)
    return rows.clusters(rows.sums(rows.scores) / len(members))


FUSIONS: dict[str, Callable[[Sequence[MemberBoxes], float], Clusters]] = {"wbf": wbf, "bsas": bsas}
"""By the name of ``predict.fuse``: (members, iou)."""
DEFAULT_IOU = {"wbf": 0.55, "bsas": 0.7}
"""Where ``predict.cluster_iou`` says none: those of the papers' authors."""


class _Rows:
    """Boxes of all members in order of score; ties by member, then by index."""

    def __init__(self, members: Sequence[MemberBoxes], weights: np.ndarray, skip: float) -> None:
        if not members:
            raise ValueError("the boxes of no members; give at least one")
        self.device, self.members = members[0].boxes.device, len(members)
        self.weights = weights
        within = any(each.covariance is not None for each in members)
        numbers = torch.cat([_table(each, within) for each in members]).cpu().numpy()
        owner = np.repeat(np.arange(len(members)), [len(each.boxes) for each in members])
        scores = numbers[:, 4]
        # What is no number overlaps nothing, and would make its cluster's mean none.
        keep = np.isfinite(numbers[:, :5]).all(1) & (scores >= skip)
        order = np.flatnonzero(keep)
        order = order[np.argsort(-(scores * weights[owner])[order], kind="stable")]
        numbers, self.owner = numbers[order], owner[order]
        classes = members[0].probabilities.shape[1]
        self.boxes, self.labels = numbers[:, :4], numbers[:, 5].astype(np.int64)
        self.probabilities = numbers[:, 6 : 6 + classes]
        self.within = numbers[:, 6 + classes :] if within else None
        self.scores = numbers[:, 4] * weights[self.owner]
        self.mass = np.maximum(self.scores, _MIN_WEIGHT)
        self.cluster = np.zeros(len(order), np.int64)
        self.count = 0

    def assign(self, choose: Callable[[np.ndarray, np.ndarray], int | None]) -> None:
        """Number the clusters by their best box; ``choose(overlaps, clusters that have this member)`` says which."""
        for label in np.unique(self.labels):
            at = np.flatnonzero(self.labels == label)
            self.cluster[at] = at[self._sequence(at, choose)]
        opened, self.cluster = np.unique(self.cluster, return_inverse=True)
        self.count = len(opened)

    def _sequence(self, at: np.ndarray, choose: Callable[[np.ndarray, np.ndarray], int | None]) -> np.ndarray:
        """Which of the boxes ``at`` (one class, sorted) opened the cluster of each of them."""
        mean, area, mass = np.empty((len(at), 4)), np.empty(len(at)), np.empty(len(at))
        taken = np.zeros((len(at), self.members), bool)
        opener, cluster, count = np.empty(len(at), np.int64), np.empty(len(at), np.int64), 0
        for n, row in enumerate(at):
            box, owner = self.boxes[row], self.owner[row]
            own = _area(box)
            found = choose(_overlap(mean[:count], area[:count], box, own), taken[:count, owner]) if count else None
            if found is None:
                found, count = count, count + 1
                mean[found], mass[found], opener[found] = box, self.mass[row], n
            else:
                mass[found] += self.mass[row]
                # A running mean of equal boxes is exactly that box.
                mean[found] += (box - mean[found]) * (self.mass[row] / mass[found])
            area[found] = _area(mean[found])
            taken[found, owner] = True
            cluster[n] = found
        return opener[cluster]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(G,) sums of (n,) values by cluster."""
        return np.bincount(self.cluster, values, self.count)

    def clusters(self, scores: np.ndarray) -> Clusters:
        """All that is said of the clusters, given their scores (G,)."""
        votes = _Votes(self)
        order = np.argsort(-scores, kind="stable")
        labels = np.zeros(self.count, np.int64)
        labels[self.cluster] = self.labels
        boxes, covariance = votes.moments()
        probabilities, expected = votes.pool()
        std = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))

        def out(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.from_numpy(values[order]).to(dtype).to(self.device)

        return Clusters(
            out(boxes), out(scores), out(labels, torch.int64), out(probabilities), out(votes.count, torch.int64),
            out(std), out(covariance), out(expected), out(votes.overlap()),
        )  # fmt: skip


class _Votes:
    """One row for each member that sees a cluster, sorted by cluster, then by member."""

    def __init__(self, rows: _Rows) -> None:
        self.rows = rows
        key, self.first, row = np.unique(
            rows.cluster * rows.members + rows.owner, return_index=True, return_inverse=True
        )
        self.cluster = key // rows.members
        self.count = np.bincount(self.cluster, minlength=rows.count)
        self.start = np.cumsum(self.count) - self.count
        # Rows are sorted by score, so a member's first is its best.
        self.boxes, self.mass = _means(rows.boxes, rows.mass, row, self.first)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean boxes (G, 4) and their covariance (G, 4, 4).

        Between members: ``Σ w d dᵀ / (Σw - Σw² / Σw)``, d the distance from the mean: without bias for weights that
        have nothing to do with d, and ``1 / (k - 1) Σ d dᵀ`` where they are equal.
        """
        rows, cluster = self.rows, self.cluster
        boxes, total = _means(self.boxes, self.mass, cluster, self.start)
        away = self.boxes - boxes[cluster]
        products = (self.mass[:, None, None] * away[:, :, None] * away[:, None, :]).reshape(-1, 16)
        freedom = total - np.bincount(cluster, self.mass**2, rows.count) / total
        alone = self.count < 2
        covariance = _sums(products, cluster, rows.count) / np.where(alone, 1.0, freedom)[:, None]
        covariance[alone] = np.nan if rows.members > 1 else 0.0
        if rows.within is not None:
            covariance += _means(rows.within[self.first], self.mass, cluster, self.start)[0]
        return boxes, covariance.reshape(-1, 4, 4)

    def pool(self) -> tuple[np.ndarray, np.ndarray]:
        """Class vectors (G, K + 1) and expected entropies (G,); an absent member is surely "none of these"."""
        said = self.rows.probabilities[self.first]
        # float32, as the entropy of the pool will be: so copies of a member have no mutual information at all.
        entropies = measures.entropy(torch.from_numpy(said).float(), -1).double().numpy()
        both = np.concatenate([said, entropies[:, None]], 1)
        share = (self.count / self.rows.members)[:, None]
        means = share * _means(both, np.ones(len(both)), self.cluster, self.start)[0]
        means[:, -2] += 1 - share[:, 0]
        return means[:, :-1], means[:, -1]

    def overlap(self) -> np.ndarray:
        """(G,) mean pairwise IoU."""
        total = np.zeros(self.rows.count)
        for step in range(1, int(self.count.max(initial=0))):
            one = np.flatnonzero(self.cluster[step:] == self.cluster[:-step])
            a, b = torch.from_numpy(self.boxes[one]), torch.from_numpy(self.boxes[one + step])
            pairs = box_ops.iou(a[:, None], b[:, None])[:, 0, 0].numpy()
            total += np.bincount(self.cluster[one], pairs, self.rows.count)
        alone = np.nan if self.rows.members > 1 else 1.0
        return np.where(self.count > 1, total / np.maximum(self.count * (self.count - 1) / 2, 1), alone)


def _score(rows: _Rows, rule: Rule) -> np.ndarray:
    """(G,) by one of the rules of ``wbf``."""
    members, total, weights = rows.members, rows.sums(rows.scores), rows.weights
    if rule == "max":
        best = np.zeros(rows.count)
        np.maximum.at(best, rows.cluster, rows.scores)
        return best / weights.max()
    if rule == "avg":
        boxes = rows.sums(np.ones(len(rows.scores)))
        return total / boxes * np.minimum(boxes, members) / weights.sum()
    seen = np.unique(rows.cluster * members + rows.owner)
    present = np.bincount(seen // members, weights[seen % members], rows.count)
    spent = rows.sums(weights[rows.owner])
    if rule == "box_and_model_avg":
        return total / spent * present / weights.sum()
    return total / (spent + weights.sum() - present)


def _table(member: MemberBoxes, within: bool) -> Tensor:
    """(B, 6 + K + 1) float64: box, score, label, class vector; and 16 columns of covariance if any member has one."""
    columns = [member.boxes, member.scores[:, None], member.labels[:, None], member.probabilities]
    if within:
        own = member.covariance
        columns.append(member.boxes.new_zeros(len(member.boxes), 16) if own is None else own.reshape(-1, 16))
    return torch.cat([column.detach().double() for column in columns], 1)


def _sums(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """(groups, D) sums of (n, D) by group."""
    out = np.zeros((groups, values.shape[1]))
    np.add.at(out, group, values)
    return out


def _means(values: np.ndarray, mass: np.ndarray, group: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means (G, D) and sums of weights (G,); measured from each group's ``first``, so equal ones stay."""
    total = np.bincount(group, mass, len(first))
    origin = values[first]
    return origin + _sums(mass[:, None] * (values - origin[group]), group, len(first)) / total[:, None], total


def _area(box: np.ndarray) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _overlap(boxes: np.ndarray, areas: np.ndarray, box: np.ndarray, area: float) -> np.ndarray:
    """(c,) IoU of boxes (c, 4) with one box; numpy, because a call of torch costs several times as much."""
    side = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    shared = np.maximum(side[:, 0], 0) * np.maximum(side[:, 1], 0)
    return shared / np.maximum(areas + area - shared, 1e-300)
