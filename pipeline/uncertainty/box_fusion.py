"""Boxes of any members that are one object where they overlap, with the doubt of the object: one image at a time.

Boxes of all members are taken in order of score, the best first, and each joins the cluster of its class that it
overlaps most, or opens one; overlap is with the running score-weighted mean box of the cluster. ``wbf`` lets a
member add several boxes to one cluster, ``bsas`` at most one. Suppression before and after is the caller's.

Of a cluster that k of M members see: the box is the score-weighted mean; the class vector is ``1/M Σ_m p_m``, in
which an absent member has probability 1 of "none of these"; a member with several boxes in it counts once, with its own
mean box and the class vector of its best one. ``box_clusters`` does the grouping and the statistics.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from pipeline.uncertainty.box_clusters import Clusters, MemberBoxes, SortedBoxes

Rule = Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"]


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
    member_weights = [1.0] * len(members) if weights is None else list(weights)
    if len(member_weights) != len(members) or not all(weight > 0 for weight in member_weights):
        raise ValueError(f"wbf wants one positive weight a member, and got {member_weights} for {len(members)} members")
    if rule not in get_args(Rule):
        raise ValueError(f"wbf has no rule '{rule}'; there are {', '.join(get_args(Rule))}")
    boxes = SortedBoxes(members, np.array(member_weights), skip)
    boxes.assign(lambda overlap, _: int(overlap.argmax()) if overlap.max() > iou else None)
    return boxes.clusters(_cluster_scores(boxes, rule))


def bsas(members: Sequence[MemberBoxes], iou: float = 0.7) -> Clusters:
    """Basic sequential clustering with at most one box of a member (Miller et al. 2019, arXiv 1809.06006).

    The cluster's score is the mean over all members, 0 for those that do not see it.

    Args:
        members: Of one image.
        iou: Overlap from which a box joins.

    Raises:
        ValueError: No member.
    """
    boxes = SortedBoxes(members, np.ones(len(members)), 0.0)

    def choose(overlap: np.ndarray, has_member: np.ndarray) -> int | None:
        # A cluster that has a box of this member is out of question, however much it overlaps.
        free_overlap = np.where(has_member, -1.0, overlap)
        best = int(free_overlap.argmax())
        return best if free_overlap[best] >= iou else None

    boxes.assign(choose)
    return boxes.clusters(boxes.sums(boxes.scores) / len(members))


FUSIONS: dict[str, Callable[[Sequence[MemberBoxes], float], Clusters]] = {"wbf": wbf, "bsas": bsas}
"""By the name of ``predict.fuse``: (members, iou)."""
DEFAULT_IOU = {"wbf": 0.55, "bsas": 0.7}
"""The overlap where ``predict.cluster_iou`` names none: those of the papers' authors."""


def _cluster_scores(boxes: SortedBoxes, rule: Rule) -> np.ndarray:
    """(G,) scores of the clusters by one of the rules of ``wbf``, whose docstring has the formulas."""
    members, weights = boxes.num_members, boxes.weights
    score_sum = boxes.sums(boxes.scores)
    if rule == "max":
        best = np.zeros(boxes.count)
        np.maximum.at(best, boxes.cluster, boxes.scores)
        return best / weights.max()
    if rule == "avg":
        # A cluster with fewer boxes than members loses in proportion; more boxes than members gain nothing.
        num_boxes = boxes.sums(np.ones(len(boxes.scores)))
        return score_sum / num_boxes * np.minimum(num_boxes, members) / weights.sum()
    # The other two rules ask which members are present: each (cluster, member) once, whatever its boxes.
    votes = np.unique(boxes.cluster * members + boxes.owner)
    weight_present = np.bincount(votes // members, weights[votes % members], boxes.count)
    weight_of_boxes = boxes.sums(weights[boxes.owner])
    if rule == "box_and_model_avg":
        return score_sum / weight_of_boxes * weight_present / weights.sum()
    return score_sum / (weight_of_boxes + weights.sum() - weight_present)
