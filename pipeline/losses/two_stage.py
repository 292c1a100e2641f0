"""The loss of two-stage detectors (Ren et al. 2015, https://arxiv.org/abs/1506.01497): the model samples by targets."""

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from pipeline.losses.base import BoxLoss, Term


class TwoStageLoss(BoxLoss):
    """Weighs the terms that the model gives of itself: ``output.terms``, sums over images.

    - objectness, rpn_box: mean binary cross entropy of the sampled anchors, and smooth L1 of the positive ones.
    - cls, box_reg: mean cross entropy of the sampled proposals, and smooth L1 of those that are objects.

    Each image's sample is about equally large, so the mean over images is that over samples; where images have
    fewer anchors than a sample, workers with smaller ones weigh a little more.
    """

    terms: ClassVar[tuple[str, ...]] = ("box_reg", "cls", "objectness", "rpn_box")
    takes_targets: ClassVar[bool] = True

    objectness_weight: float = Field(default=1.0, ge=0)
    rpn_box_weight: float = Field(default=1.0, ge=0)
    cls_weight: float = Field(default=1.0, ge=0)
    box_reg_weight: float = Field(default=1.0, ge=0)

    def counts(self, labels: Tensor, crowd: Tensor | None) -> dict[str, Tensor]:
        """Images, with or without objects."""
        del crowd
        number = labels.new_tensor(labels.shape[0]).float()
        return {name: number.clone() for name in self.terms}

    def __call__(self, output: Any, boxes: Tensor, labels: Tensor, crowd: Tensor | None) -> dict[str, Term]:
        """Each term's (weight, sum over images, images); ``output`` is a ``pipeline.models`` ProposalOutput."""
        del boxes
        assert output.terms is not None, "the model was asked without targets"
        number = self.counts(labels, crowd)
        return {name: (getattr(self, f"{name}_weight"), output.terms[name], number[name]) for name in self.terms}
