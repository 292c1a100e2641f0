"""Two-stage detectors: proposals from the image, then a class and a box for each (Ren et al. 2015, 1506.01497).

Which proposals learn is drawn at random by the targets, so the module is asked with them, and gives the terms of
its own loss; ``pipeline.losses.two_stage`` weighs and divides them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pipeline.errors import InputError
from pipeline.images import boxes as box_ops
from pipeline.models.layers import check_input

_SMALLEST = 1e-3
"""Shortest side in pixels of a box that is taught: a box coder takes logarithms of it."""
_NAMES = {
    "loss_box_reg": "box_reg",
    "loss_classifier": "cls",
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "rpn_box",
}
"""torchvision's names of the loss terms -> ours."""


class ProposalOutput(NamedTuple):
    """N images, P proposals (of the image that has most; the others are padded), K classes."""

    probs: Tensor
    """(N, P, K + 1) float32 class vectors, the last "none of these"; padding is none of these for certain."""
    boxes: Tensor
    """(N, P, 4) float32 xyxy in input pixels, clipped to the image: the box of the proposal's best class; padding 0."""
    centres: Tensor
    """(N, P, 2) float32 x, y of the proposals in input pixels; padding lies at -1, outside of any image."""
    strides: Tensor
    """(P,) zeros: proposals lie anywhere."""
    terms: dict[str, Tensor] | None
    """Loss term -> its sum over images, a scalar: torchvision's mean over its sample, times N. None: no targets."""

    fixed = False  # pyright: ignore[reportGeneralTypeIssues]

    def probabilities(self) -> Tensor:
        """(N, P, K + 1) float32 class vectors, the last "none of these"."""
        return self.probs

    def scores(self) -> Tensor:
        """(N, P, K) float32 class probabilities, without the background."""
        return self.probs[..., :-1]


class TwoStageModule(nn.Module):
    """torchvision's Faster R-CNN: images (N, 3, H, W), H and W multiples of ``stride`` -> ProposalOutput."""

    takes_targets = True

    def __init__(self, network: Any, stride: int) -> None:
        super().__init__()
        self.network = network
        self.stride = stride

    def forward(self, images: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None) -> ProposalOutput:
        """Proposals with their classes; with targets also the terms of the loss, in eval mode too.

        In train mode with targets there are terms alone (P is 0): boxes are not used then. Proposals are drawn
        with the global generator of the images' device: ``torch.manual_seed`` decides them. Everything behind the
        backbone is computed in float32: bfloat16 would move a proposal by pixels.

        Args:
            images: (N, 3, H, W) float32, normalised.
            boxes: (N, B, 4) float32 xyxy pixels, padded; B may be 0. Boxes without area teach nothing.
            labels: (N, B) int64 from 0 on; -1 = padding, or a region that is to be background.
        """
        from torchvision.models.detection.image_list import ImageList

        check_input(images, self.stride)
        features = features_of(self.network.backbone, images)
        with torch.autocast(images.device.type, enabled=False):
            features = {name: feature.float() for name, feature in features.items()}
            size = (images.shape[-2], images.shape[-1])
            listed = ImageList(images, [size] * len(images))
            terms = None
            if boxes is not None and labels is not None:
                terms = self._terms(listed, features, _targets(boxes.float(), labels))
            if terms is not None and self.training:
                return self._only_terms(images, terms)
            return self._proposals(listed, features)._replace(terms=terms)

    @property
    def backbone(self) -> list[nn.Module]:
        """The parts that see the image first, without the pyramid."""
        return [self.network.backbone.body]

    @property
    def _outputs(self) -> int:
        """K + 1: torchvision's box head has an output for the background."""
        return self.network.roi_heads.box_predictor.cls_score.out_features

    def _terms(self, images: Any, features: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The four sums, with gradient to every parameter behind ``features``."""
        rpn, roi_heads = self.network.rpn, self.network.roi_heads
        with _sampling(rpn, roi_heads, on=True):
            proposals, rpn_losses = rpn(images, features, targets)
            _, head_losses = roi_heads(features, proposals, images.image_sizes, targets)
        torchvision_losses = rpn_losses | head_losses
        # torchvision gives means over the images of the batch.
        return {name: torchvision_losses[theirs] * len(targets) for theirs, name in _NAMES.items()}

    def _proposals(self, images: Any, features: dict[str, Tensor]) -> ProposalOutput:
        """Proposals with their class vectors and boxes; without loss terms."""
        rpn, heads = self.network.rpn, self.network.roi_heads
        with _sampling(rpn, heads, on=False):
            proposals, _ = rpn(images, features)
        counts = [len(proposal) for proposal in proposals]
        logits, codes = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, images.image_sizes)))
        # torchvision's background is the first class; here it is the last.
        probs = logits.float().softmax(-1).roll(-1, -1)
        decoded = heads.box_coder.decode(codes.float(), proposals).reshape(*logits.shape, 4)
        # Column 0 is the background's own box, which is never trained.
        best = (probs[:, :-1].argmax(-1) + 1)[:, None, None].expand(-1, 1, 4)
        boxes = box_ops.clip(decoded.gather(1, best)[:, 0], images.image_sizes[0])
        anchors = torch.cat(proposals)
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        # Images have different numbers of proposals: padded to those of the image that has most.
        probs, boxes, centres = (
            _padded(tensor, counts, value) for tensor, value in ((probs, 0.0), (boxes, 0.0), (centres, -1.0))
        )
        count = torch.tensor(counts, device=probs.device)[:, None]
        is_padding = torch.arange(probs.shape[1], device=probs.device) >= count
        probs = torch.cat([probs[..., :-1], torch.where(is_padding, 1.0, probs[..., -1])[..., None]], -1)
        return ProposalOutput(probs, boxes, centres, probs.new_zeros(probs.shape[1]), None)

    def _only_terms(self, images: Tensor, terms: dict[str, Tensor]) -> ProposalOutput:
        """The loss terms with no proposal at all (P = 0)."""
        count = len(images)
        sizes = ((count, 0, self._outputs), (count, 0, 4), (count, 0, 2), (0,))
        probs, boxes, centres, strides = (images.new_zeros(size, dtype=torch.float32) for size in sizes)
        return ProposalOutput(probs, boxes, centres, strides, terms)


def features_of(backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The backbone's levels by torchvision's names, fine to coarse.

    Raises:
        InputError: Batch norm of one image whose coarsest level is one pixel.
    """
    try:
        return backbone(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"the model normalises over the batch where one pixel an image is left: training wants at least 2 images a "
            f"worker, found {len(images)}; raise train.batch_size or input.size, or set model.norm to group"
        ) from error


def _padded(values: Tensor, counts: list[int], value: float) -> Tensor:
    """(ΣP, c) of images one after another -> (N, P, c)."""
    return pad_sequence(list(values.split(counts)), batch_first=True, padding_value=value)


def _targets(boxes: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Targets of each image in torchvision's form: unpadded, classes from 1 on (0 is its background)."""
    real = (labels >= 0) & ((boxes[..., 2:] - boxes[..., :2]) > _SMALLEST).all(-1)
    return [{"boxes": boxes[n, real[n]], "labels": labels[n, real[n]] + 1} for n in range(len(boxes))]


@contextlib.contextmanager
def _sampling(rpn: Any, roi_heads: Any, *, on: bool) -> Iterator[None]:
    """Whether the two sample and give losses: their own flags alone, so norms and dropout stay as they are.

    While sampling, no proposal is dropped for its score: of a batch without boxes that could leave none, and
    torchvision's mean over none is not a number.
    """
    before = rpn.training, roi_heads.training, rpn.score_thresh
    rpn.training, roi_heads.training = on, on
    rpn.score_thresh = 0.0 if on else before[2]
    try:
        yield
    finally:
        rpn.training, roi_heads.training, rpn.score_thresh = before
