"""The loss of one-stage detectors with a background class: cross entropy with hard negatives, and GIoU.

After SSD (Liu et al. 2016, https://arxiv.org/abs/1512.02325, section 2.2), whose negatives are mined, three to a
positive. Which location answers for which object is decided as for the other one-stage detectors, by class
score and overlap of what is predicted (``pipeline.losses.assign``), not by the anchors' overlap: outputs carry no
anchors, and a fresh network predicts about its anchors, so it begins with the best of them.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.images.boxes import giou
from pipeline.losses.assign import Assignment, assign
from pipeline.losses.base import BoxLoss, Term, objects

_EPS = 1e-6


class SoftmaxLoss(BoxLoss):
    """Terms ``cls`` and ``box``, each (weight, sum, count of objects); see ``__call__``."""

    terms: ClassVar[tuple[str, ...]] = ("box", "cls")

    cls_weight: float = Field(default=1.0, ge=0)
    box_weight: float = Field(default=2.0, ge=0)
    negatives: float = Field(default=3.0, gt=0)
    """Hardest background locations for each positive one, of each image by itself."""
    topk: int = Field(default=4, ge=1)
    """Locations an object may take."""
    alpha: float = Field(default=0.5, ge=0)
    """Exponent of the class probability in the alignment."""
    beta: float = Field(default=4.0, ge=0)
    """Exponent of the IoU in the alignment."""

    def counts(self, labels: Tensor, crowd: Tensor | None) -> dict[str, Tensor]:
        """Objects."""
        number = objects(labels, crowd).sum().float()
        return {name: number.clone() for name in self.terms}

    def __call__(self, output: Any, boxes: Tensor, labels: Tensor, crowd: Tensor | None) -> dict[str, Term]:
        """Sums over objects, of float32 whatever the output's type.

        - cls: Σ over objects of the mean cross entropy of its locations, and Σ over images of the cross entropy of
          its ``negatives`` times as many hardest negatives, weighted as the image's positives are on average: an
          object weighs 1, its negatives 3. An image without objects has as many negatives as one with one location
          and learns from them, where SSD passes it over. Locations inside a crowd box are no negatives.
        - box: Σ over objects of the mean of ``1 - GIoU`` over its locations.

        A batch without objects gives finite sums with gradient and count 0.

        Args:
            output: A SoftmaxOutput of ``pipeline.models``: logits (N, L, K + 1), the background last.
            boxes: (N, B, 4) xyxy pixels, padded; B may be 0.
            labels: (N, B) int64; -1 = padding.
            crowd: (N, B) bool, or None for no crowds.
        """
        object_counts = self.counts(labels, crowd)
        if boxes.shape[1] == 0:
            # One padding box, so that reductions over boxes are defined.
            boxes = boxes.new_zeros((boxes.shape[0], 1, 4))
            labels = labels.new_full((labels.shape[0], 1), -1)
            crowd = None
        log_probs = output.logits.float().log_softmax(-1)
        assigned = assign(
            # The assignment takes the sigmoid of it.
            log_probs[..., :-1].detach().exp().logit(eps=_EPS),
            output.boxes,
            output.centres,
            output.strides,
            boxes,
            labels,
            objects(labels, crowd),
            topk=self.topk,
            alpha=self.alpha,
            beta=self.beta,
        )
        background = log_probs.shape[-1] - 1
        classes = torch.where(assigned.positive, labels.clamp(min=0).gather(1, assigned.box), background)
        entropy = -log_probs.gather(2, classes[..., None])[..., 0]
        not_negative = assigned.positive
        if crowd is not None:
            not_negative = not_negative | _in_crowd(output.centres, boxes, crowd & (labels >= 0))
        weight = assigned.share + self._hard_negative_weights(entropy.detach(), assigned, not_negative)
        predicted = output.boxes.float()
        matched = boxes.float().gather(1, assigned.box[..., None].expand(-1, -1, 4))
        # Elsewhere than at positives any well-formed pair does: the share there is 0.
        overlap = giou(predicted, torch.where(assigned.positive[..., None], matched, predicted.detach()))
        return {
            "cls": (self.cls_weight, (entropy * weight).sum(), object_counts["cls"]),
            "box": (self.box_weight, ((1 - overlap) * assigned.share).sum(), object_counts["box"]),
        }

    def _hard_negative_weights(self, entropy: Tensor, assigned: Assignment, ignored: Tensor) -> Tensor:
        """(N, L) weights of the hardest negatives, 0 elsewhere; of equally hard ones the first."""
        positives = assigned.positive.sum(-1, keepdim=True)
        num_negatives = (self.negatives * positives.clamp(min=1)).floor()
        order = entropy.masked_fill(ignored, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rank = torch.zeros_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        negative_weight = torch.where(positives > 0, assigned.share.sum(-1, keepdim=True) / positives.clamp(min=1), 1.0)
        return ((rank < num_negatives) & ~ignored) * negative_weight


def _in_crowd(centres: Tensor, boxes: Tensor, crowd: Tensor) -> Tensor:
    """(N, L) bool: locations (L, 2) inside a crowd box; ``crowd`` (N, B)."""
    x, y = centres[:, 0], centres[:, 1]
    x1, y1, x2, y2 = boxes.float().unsqueeze(-1).unbind(dim=2)
    return ((x > x1) & (x < x2) & (y > y1) & (y < y2) & crowd[..., None]).any(1)
