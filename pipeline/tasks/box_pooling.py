"""From what members say at their locations to the boxes of a pool: by location, or by clustering.

By location: members that predict at the same places are averaged there, class vectors and boxes alike, and
suppressed once; the spread of a box is that of the members at its location. It is exact, needs no overlap
threshold, and its doubt covers all locations. By clustering (``pipeline.uncertainty.box_fusion``): each member is
suppressed by itself, and boxes that overlap are one object; for members of different kinds, for two-stage detectors,
and for views whose locations do not fall onto each other.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.images import affine
from pipeline.images import boxes as box_ops
from pipeline.tasks.pooled_boxes import KeptBoxes, PooledImages
from pipeline.uncertainty import measures
from pipeline.uncertainty.box_clusters import MemberBoxes
from pipeline.uncertainty.box_fusion import FUSIONS
from pipeline.uncertainty.tta import View

MEASURED_FROM = 0.01
"""Metrics look at boxes down to this score, whatever is written: average precision needs them."""
_CANDIDATES = 1000
"""Best-scoring locations of an image that enter suppression."""
_MIN_WEIGHT = 1e-6
_SAME_PLACE = 0.01
"""Pixels within which two locations are one."""


@dataclass
class Prediction:
    """One member's prediction on one view, at L locations of N images, in the network's frame."""

    probabilities: Tensor
    """(N, L, K + 1), the last "none of these"."""
    scores: Tensor
    """(N, L, K) what boxes are ranked by."""
    boxes: Tensor
    """(N, L, 4) x1, y1, x2, y2, not clipped."""
    inside: Tensor
    """(N, L) bool: the location lies in the image, not in the padding around it."""
    area: Tensor
    """(N, 1, 4) where in the frame the image lies."""
    centres: Tensor
    """(L, 2), or (N, L, 2) where not ``fixed``: x, y of the locations."""
    strides: Tensor
    """(L,) pixels between neighbours at the location's level."""
    fixed: bool = True
    """Whether location l is the same place in all images and members."""
    size: tuple[int, int] = (0, 0)
    """Height and width of the frame."""


@dataclass(frozen=True)
class SuppressionRule:
    """How boxes are chosen."""

    score_threshold: float
    """A member votes for a location from this score on."""
    nms_iou: float
    max_boxes: int

    def suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Indices that are left of one image, the best first.

        One image at a time: offsets between images cost precision, so the answer would depend on the batch.
        """
        best = scores.sort(descending=True, stable=True).indices[:_CANDIDATES]
        kept = box_ops.batched_nms(boxes[best], scores[best], labels[best], self.nms_iou)
        return best[kept[: self.max_boxes]]


def same_locations(prediction: Prediction, views: Sequence[View]) -> bool:
    """Whether the locations of all ``views`` of a frame fall onto those of the plain one, ``prediction``.

    Mirrored locations do where they lie half-way between the edges of their cells. Several anchors at one place
    keep their order when mirrored; a quarter turn would exchange the tall and the wide ones.
    """
    if not prediction.fixed:
        return False
    centres, size = prediction.centres.double().cpu(), prediction.size
    crowded = len(_keys(centres, prediction.strides).unique(dim=0)) < len(centres)
    for view in views:
        if view.scale != 1.0 or (crowded and view.turns % 2):
            return False
        # A quarter turn of a frame that is not square gives another grid: that it is as symmetric as the plain one
        # is seen by the half turn and the mirror image.
        turned = view.turns % 2 and size[0] != size[1]
        for symmetry in (View(turns=2), View(flip=True)) if turned else (view,):
            moved = _move_points(centres, symmetry.matrix(size, size))
            if _order(moved, centres, prediction.strides, prediction.strides) is None:
                return False
    return True


class LocationPool:
    """Running means over members at each location."""

    def __init__(self, rule: SuppressionRule) -> None:
        self.rule = rule
        self._probabilities = measures.RunningMean()
        self._expected_entropy = measures.RunningMean()
        self._scores = measures.RunningMean()
        self._boxes = measures.RunningSpread()
        self._votes = torch.zeros(())
        self._first: Prediction | None = None

    def add(self, member: Prediction) -> None:
        """Add a prediction; its locations are put into the order of the first one's."""
        if self._first is None:
            # Only where its locations are: keeping its probabilities would cost the memory of one more member.
            empty = torch.zeros(0)
            self._first = dataclasses.replace(member, probabilities=empty, scores=empty, boxes=empty)
        member = _aligned(member, self._first)
        self._probabilities.add(member.probabilities)
        self._expected_entropy.add(measures.entropy(member.probabilities, -1))
        self._scores.add(member.scores)
        best = member.scores.amax(-1)
        # A member that sees no object has no opinion on where its edges are: boxes are weighted by score.
        self._boxes.add(member.boxes, best.clamp(min=_MIN_WEIGHT))
        self._votes = self._votes + (best >= self.rule.score_threshold).int()

    def result(self) -> PooledImages:
        """The means over the members added so far, suppressed once."""
        first = self._first
        assert first is not None, "the pool of no members; add at least one"
        total = measures.entropy(self._probabilities.mean, -1)
        mutual = measures.mutual_information(total, self._expected_entropy.mean)
        # Locations in the padding around an image say nothing about it.
        entropy_sum = torch.where(first.inside, total, 0).sum(1, dtype=torch.float64)
        mutual_sum = torch.where(first.inside, mutual, 0).sum(1, dtype=torch.float64)
        kept = [self._suppressed(n, first, total[n], mutual[n]) for n in range(len(total))]
        return PooledImages(self._probabilities.count, kept, entropy_sum, mutual_sum)

    def _suppressed(self, n: int, first: Prediction, total: Tensor, mutual: Tensor) -> KeptBoxes:
        """What is left of image ``n``; entropy ``total`` and mutual information ``mutual``: (L,)."""
        scores, labels = self._scores.mean[n].max(-1)
        boxes = _clipped(self._boxes.mean[n], first.area[n])
        eligible = first.inside[n] & (boxes[:, 2:] > boxes[:, :2]).all(1)
        at = (eligible & (scores >= min(self.rule.score_threshold, MEASURED_FROM))).nonzero()[:, 0]
        # By the boxes before clipping, which must not change what overlaps what.
        at = at[self.rule.suppress(self._boxes.mean[n, at], scores[at], labels[at])]
        return KeptBoxes(
            boxes[at], labels[at], scores[at], self._probabilities.mean[n, at], total[at], mutual[at],
            self._votes[n, at], self._boxes.std[n, at],
        )  # fmt: skip


class ClusterPool:
    """Boxes of members, each suppressed by itself, that are one object where they overlap."""

    def __init__(
        self, rule: SuppressionRule, kind: str, iou: float, calibrate: Callable[[int, Tensor], Tensor]
    ) -> None:
        self.rule = rule
        self.kind = kind
        self.iou = iou
        self.calibrate = calibrate
        self._members: list[list[MemberBoxes]] = []

    def add(self, member: Prediction) -> None:
        """Add a prediction: only its boxes are kept."""
        number = len(self._members)
        self._members.append([self._member_boxes(member, n, number) for n in range(len(member.boxes))])

    def _member_boxes(self, member: Prediction, n: int, number: int) -> MemberBoxes:
        """What suppression leaves of image ``n`` of the prediction added as the ``number``-th."""
        scores, labels = member.scores[n].max(-1)
        boxes = _clipped(member.boxes[n], member.area[n])
        eligible = member.inside[n] & (boxes[:, 2:] > boxes[:, :2]).all(1)
        at = (eligible & (scores >= min(self.rule.score_threshold, MEASURED_FROM))).nonzero()[:, 0]
        at = at[self.rule.suppress(member.boxes[n, at], scores[at], labels[at])]
        return MemberBoxes(boxes[at], self.calibrate(number, scores[at]), labels[at], member.probabilities[n, at])

    def result(self) -> PooledImages:
        """Clustered, then suppressed once more: fused boxes may overlap."""
        kept = [self._clustered([member[n] for member in self._members]) for n in range(len(self._members[0]))]
        entropy_sum = torch.stack([image.entropy.sum(dtype=torch.float64) for image in kept])
        mutual_sum = torch.stack([image.mutual_information.sum(dtype=torch.float64) for image in kept])
        return PooledImages(len(self._members), kept, entropy_sum, mutual_sum)

    def _clustered(self, members: list[MemberBoxes]) -> KeptBoxes:
        """The objects of one image, from each member's boxes in it."""
        fused = FUSIONS[self.kind](members, self.iou)
        at = self.rule.suppress(fused.boxes, fused.scores, fused.labels)
        total = measures.entropy(fused.probabilities[at], -1)
        mutual = measures.mutual_information(total, fused.expected_entropy[at])
        return KeptBoxes(
            fused.boxes[at], fused.labels[at], fused.scores[at], fused.probabilities[at], total, mutual,
            fused.votes[at], fused.std[at],
        )  # fmt: skip


def view_to_frame(
    boxes: Tensor, centres: Tensor, view: View, size: tuple[int, int], view_size: tuple[int, int]
) -> list[Tensor]:
    """Boxes (N, L, 4) and centres of a view of ``view_size`` (h, w), in the pixels of the frame of ``size``."""
    inverse = affine.invert_affine(view.matrix(size, view_size))
    moved = affine.transform_boxes(boxes.double(), inverse.to(boxes.device)).to(boxes.dtype)
    return [moved, _move_points(centres.double(), inverse.to(centres.device)).to(centres.dtype)]


def _aligned(member: Prediction, first: Prediction) -> Prediction:
    """``member`` with its locations in the order of those of ``first``."""
    if member.centres.shape == first.centres.shape and bool(
        ((member.centres - first.centres).abs() < _SAME_PLACE).all()
    ):
        return member
    order = _order(member.centres, first.centres, member.strides, first.strides)
    assert order is not None, "only predictions with the same locations can be pooled there: see same_locations"
    order = order.to(member.boxes.device)
    moved = {name: getattr(member, name)[:, order] for name in ("probabilities", "scores", "boxes", "inside")}
    return dataclasses.replace(member, **moved, centres=first.centres, strides=first.strides)


def _order(centres: Tensor, target: Tensor, strides: Tensor, target_strides: Tensor) -> Tensor | None:
    """Indices that put ``centres`` (L, 2) into the order of ``target`` (L, 2); None where they are other places."""
    if centres.shape != target.shape:
        return None
    keys, target_keys = _keys(centres, strides), _keys(target, target_strides)
    # Both sorted the same way: the k-th of one is the k-th of the other, or they are not the same places.
    sorted_rows, sorted_target_rows = _lexicographic(keys), _lexicographic(target_keys)
    if not torch.equal(keys[sorted_rows], target_keys[sorted_target_rows]):
        return None
    order = torch.empty_like(sorted_rows)
    order[sorted_target_rows] = sorted_rows
    return order


def _keys(centres: Tensor, strides: Tensor) -> Tensor:
    """(L, 3) int64 stride, y, x in hundredths of a pixel."""
    rows = torch.cat([strides.double().cpu()[:, None], centres.double().cpu().flip(-1)], 1)
    return (rows / _SAME_PLACE).round().long()


def _lexicographic(keys: Tensor) -> Tensor:
    """(L,) stable order of rows, the first column first."""
    order = torch.arange(len(keys))
    for column in range(keys.shape[1] - 1, -1, -1):
        order = order[keys[order, column].argsort(stable=True)]
    return order


def _move_points(points: Tensor, matrix: Tensor) -> Tensor:
    """(..., 2) by an affine 3x3."""
    return points @ matrix[:2, :2].T.to(points.device) + matrix[:2, 2].to(points.device)


def _clipped(boxes: Tensor, area: Tensor) -> Tensor:
    """(L, 4) boxes within ``area`` (1, 4); turned over where they lie beside it."""
    return torch.cat([torch.maximum(boxes[:, :2], area[:, :2]), torch.minimum(boxes[:, 2:], area[:, 2:])], 1)
