"""torchvision's detectors (BSD-3) behind the common interface: FCOS, RetinaNet, SSDLite and Faster R-CNN.

torchvision builds the network, and its published state dicts load into ``module.network`` as they are. What it
puts around the network is left out: no resizing or normalisation of its own (a batch comes normalised and of
one size), no loss, no threshold or suppression. Its background class is hidden: K classes, from 0 on, are
K outputs of FCOS and RetinaNet and K + 1 of the others, whose background is moved from the first place to the
last. Nothing is ever downloaded: see ``pipeline.models.transfer`` for weights.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Settings
from pipeline.errors import nearest
from pipeline.models.anchor_free import FIRST_DISTANCE
from pipeline.models.csp import timm_levels
from pipeline.models.layers import check_input, norm_layer
from pipeline.models.outputs import DetectionOutput, SoftmaxOutput
from pipeline.models.two_stage import TwoStageModule, features_of

Arch = Literal[
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssdlite320_mobilenet_v3_large",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
]
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
TIMM = "tu-"
"""Before the names of timm's networks, as segmentation_models_pytorch writes them."""
_LOSS_OF_FAMILY = {"fcos": "aligned", "retinanet": "aligned", "ssdlite320": "softmax", "fasterrcnn": "two_stage"}
_STRIDE = 32


class Torchvision(Settings):
    """Settings of the detector; torchvision is imported by ``build`` only."""

    task: ClassVar[Literal["segmentation", "detection"]] = "detection"

    arch: Arch = "fcos_resnet50_fpn"
    """torchvision's name. SSDLite's anchors are relative to the image, and were tuned for 320x320 pixels; those
    of the others are in pixels, from 32 on (FCOS has none)."""
    backbone: str | None = None
    """In place of the arch's own, under a feature pyramid: ``tu-<timm name>``, such as ``tu-tf_efficientnet_lite0``,
    or mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small (torchvision's own names, so that its files fit by
    name). Not for SSDLite. Published detectors do not load into such a mixture."""
    width: int = Field(default=256, ge=64, le=1024, multiple_of=32)
    """Channels of pyramid and head, of a ``backbone`` chosen here; torchvision's own have 256. The heads' group
    norm has 32 groups."""
    norm: Literal["batch", "group", "frozen"] = "batch"
    """``batch`` learns; ``group`` does not mix images, for small batches; ``frozen`` never changes what was loaded
    as the backbone's scale, shift and statistics, which is how torchvision trained its published detectors: for
    loaded weights alone, as random ones are not normalised by it. A timm backbone keeps its own: here ``batch``."""
    locations: Literal["edge", "centre"] = "edge"
    """Where anchors lie, but for SSDLite's: ``edge``, at multiples of the stride from 0 on, is torchvision's, and
    what published weights want. ``centre``, half-way between, loses no row at the image's edge, and mirrored
    views fall onto the same places, so that test-time augmentation is averaged by location."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.backbone is None:
            if self.width != 256:
                raise ValueError(f"width is of another backbone's pyramid, found {self.width}; set backbone too")
            return self
        if self.family == "ssdlite320":
            raise ValueError(f"backbone is not for SSDLite, found '{self.backbone}'; leave it out, or set another arch")
        if self.backbone.startswith(TIMM):
            if self.norm != "batch":
                raise ValueError(
                    f"norm is not for a timm backbone, found {self.norm}; set it to batch, or see transfer"
                )
        elif self.backbone not in MOBILENETS:
            raise ValueError(
                f"backbone '{self.backbone}' is no tu-<timm name> and no MobileNet.{nearest(self.backbone, MOBILENETS)}"
            )
        return self

    @property
    def family(self) -> str:
        """What the name begins with: fcos, retinanet, ssdlite320 or fasterrcnn."""
        return self.arch.partition("_")[0]

    @property
    def losses(self) -> tuple[str, ...]:
        """The loss that fits ``arch``."""
        return (_LOSS_OF_FAMILY[self.family],)

    def build(self, num_classes: int) -> nn.Module:
        """The network with random weights; forward (N, 3, H, W) -> DetectionOutput, SoftmaxOutput or ProposalOutput."""
        if self.backbone is None:
            network = _torchvision_network(self, num_classes)
        else:
            network = _network_on_backbone(self, num_classes)
        body = network.backbone.features if self.family == "ssdlite320" else network.backbone.body
        if self.norm == "frozen":
            _replace_norms(body, _frozen)
        elif self.norm == "group":
            _replace_norms(network, lambda norm: norm_layer("group", norm.num_features))
        if self.family == "fasterrcnn":
            network.rpn.anchor_generator = Anchors(network.rpn.anchor_generator, self.locations)
            return TwoStageModule(network, _STRIDE)
        return OneStageModule(self, network, body)

    def outputs(self, num_classes: int) -> int:
        """Classes, without the background."""
        return num_classes


class Places(NamedTuple):
    """Where the locations of all levels are, one after another."""

    anchors: Tensor
    """(L, 4) float32 xyxy pixels."""
    centres: Tensor
    """(L, 2) float32 x, y pixels."""
    strides: Tensor
    """(L,) float32 pixels to the next one, the larger of both axes."""


class Anchors(nn.Module):
    """Anchors of a feature pyramid, in float32 whatever the features' type; no parameters.

    Where sides are no multiples of the coarsest stride its grid is rounded up; like torchvision, the locations are
    then set closer, to span the image: ``side // cells`` apart (``edge``) or ``side / cells`` (``centre``).
    """

    def __init__(self, generator: Any, where: Literal["edge", "centre"]) -> None:
        super().__init__()
        self.cells: list[Tensor] = generator.cell_anchors
        """For each level its (A, 4) anchors, centred on 0."""
        self.where = where

    def forward(self, images: Any, features: list[Tensor]) -> list[Tensor]:
        """The call that torchvision makes: an ImageList and the levels' features -> (L, 4) for each image."""
        anchors = self.at(images.tensors.shape[-2:], features).anchors
        return [anchors for _ in images.image_sizes]

    def at(self, size: Sequence[int], features: Sequence[Tensor]) -> Places:
        """Anchors of images of ``size`` (H, W), ordered by level (fine to coarse), row, column, anchor."""
        levels = [self._level(size, feature, cells) for feature, cells in zip(features, self.cells, strict=True)]
        return Places(*(torch.cat(parts) for parts in zip(*levels, strict=True)))

    def _level(self, size: Sequence[int], feature: Tensor, cells: Tensor) -> Places:
        # Coordinates of the locations along y, then along x.
        lines = []
        steps = []
        for side, count in zip(size, feature.shape[-2:], strict=True):
            if self.where == "edge":
                step, first = side // count, 0.0
            else:
                step, first = side / count, 0.5
            lines.append((torch.arange(count, device=feature.device, dtype=torch.float32) + first) * step)
            steps.append(float(step))
        y, x = torch.meshgrid(*lines, indexing="ij")
        centres = torch.stack([x, y], -1).reshape(-1, 1, 2)
        anchors = centres.repeat(1, 1, 2) + cells.to(centres)
        centres = centres.expand(-1, len(cells), 2).reshape(-1, 2)
        return Places(anchors.reshape(-1, 4), centres, torch.full_like(centres[:, 0], max(steps)))


class OneStageModule(nn.Module):
    """FCOS, RetinaNet or SSDLite: images (N, 3, H, W) -> outputs at each anchor, in train and eval alike.

    FCOS gives its centre-ness logit as the quality: the loss teaches it to be the box's IoU, and published weights
    say how central a location is; either ranks boxes. torchvision ranks by the root of class score times
    quality, which is the same order.
    """

    def __init__(self, settings: Torchvision, network: Any, body: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.stride = _STRIDE
        self.family = settings.family
        self._body = [body]  # in a list: the network has it already, under torchvision's name
        if self.family != "ssdlite320":
            self.anchors = Anchors(network.anchor_generator, settings.locations)
        if self.family == "fcos":
            # Zero distances, which torchvision begins with, overlap nothing that the assignment could rank by.
            nn.init.constant_(network.head.regression_head.bbox_reg.bias, FIRST_DISTANCE)

    def forward(self, images: Tensor) -> DetectionOutput | SoftmaxOutput:
        """(N, 3, H, W) -> DetectionOutput (FCOS, RetinaNet) or SoftmaxOutput (SSDLite)."""
        check_input(images, self.stride)
        features = list(features_of(self.network.backbone, images).values())
        head_outputs = self.network.head(features)
        logits, codes = head_outputs["cls_logits"], head_outputs["bbox_regression"].float()
        if self.family == "ssdlite320":
            places = self._default_boxes(images, features)
            return SoftmaxOutput(logits.roll(-1, -1), self._decode(codes, places.anchors), *places[1:])
        places = self.anchors.at(images.shape[-2:], features)
        if self.family == "fcos":
            boxes = self.network.box_coder.decode(codes, places.anchors)
            return DetectionOutput(logits, boxes, head_outputs["bbox_ctrness"].squeeze(-1), *places[1:])
        return DetectionOutput(logits, self._decode(codes, places.anchors), None, *places[1:])

    @property
    def backbone(self) -> list[nn.Module]:
        """The parts that see the image first, without pyramid and extra levels."""
        return self._body

    def _decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        """Offsets from anchors, (N, L, 4) and (L, 4), to boxes (N, L, 4) xyxy pixels."""
        boxes = self.network.box_coder.decode_single(codes.flatten(0, 1), anchors.repeat(len(codes), 1))
        return boxes.unflatten(0, codes.shape[:2])

    def _default_boxes(self, images: Tensor, features: list[Tensor]) -> Places:
        """Anchors of SSD, which lie half-way between the edges of their cells."""
        from torchvision.models.detection.image_list import ImageList

        size = (images.shape[-2], images.shape[-1])
        # torchvision looks at shape, type and device of the grids alone: float32 even under autocast.
        grids = [feature.new_empty((1, 1, *feature.shape[-2:]), dtype=torch.float32) for feature in features]
        (anchors,) = self.network.anchor_generator(ImageList(images[:1], [size]), grids)
        strides = [
            torch.full(
                (count * grid.shape[-2] * grid.shape[-1],),
                max(n / m for n, m in zip(size, grid.shape[-2:], strict=True)),
            )
            for grid, count in zip(grids, self.network.anchor_generator.num_anchors_per_location(), strict=True)
        ]
        return Places(anchors, (anchors[:, :2] + anchors[:, 2:]) / 2, torch.cat(strides).to(anchors))


class Pyramid(nn.Module):
    """A backbone's levels under torchvision's feature pyramid, with the names of its ``BackboneWithFPN``."""

    def __init__(self, body: nn.Module, channels: list[int], width: int, extra: Any) -> None:
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(channels, width, extra)
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> the levels (N, width, h_i, w_i), fine to coarse, as "0", "1"..., then the extra ones."""
        features = self.body(images)
        levels = features.values() if isinstance(features, dict) else features
        return self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(levels)))


def _torchvision_network(settings: Torchvision, num_classes: int) -> Any:
    """The network of that name as torchvision builds it, with random weights."""
    from torchvision.models import detection

    # SSD and Faster R-CNN have an output for the background; FCOS and RetinaNet do without.
    background = settings.family in ("ssdlite320", "fasterrcnn")
    maker = getattr(detection, settings.arch)
    return maker(weights=None, weights_backbone=None, num_classes=num_classes + background)


def _network_on_backbone(settings: Torchvision, num_classes: int) -> Any:
    """The arch's pyramid and head on another backbone."""
    from torchvision.models import detection
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    name, width = str(settings.backbone), settings.width
    two_stage = settings.family == "fasterrcnn"
    # The levels that torchvision's own networks of the family have.
    strides = (4, 8, 16, 32) if two_stage else (8, 16, 32)
    if name.startswith(TIMM):
        body, channels = timm_levels(name[len(TIMM) :], strides)
    else:
        body, channels = _mobilenet(name, strides)
    extra = LastLevelMaxPool() if two_stage else LastLevelP6P7(width, width)
    pyramid = Pyramid(body, channels, width, extra)
    if two_stage:
        return detection.FasterRCNN(pyramid, num_classes + 1)
    if settings.family == "fcos":
        return detection.FCOS(pyramid, num_classes)
    # Nine anchors a location, and group norm in the head, as in retinanet_resnet50_fpn_v2.
    head = RetinaNetHead(width, 9, num_classes, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    return detection.RetinaNet(pyramid, num_classes, head=head)


def _mobilenet(name: str, strides: Sequence[int]) -> tuple[nn.Module, list[int]]:
    """A torchvision MobileNet that gives the last features at each stride, and their channels."""
    from torchvision import models
    from torchvision.models._utils import IntermediateLayerGetter

    blocks: Any = getattr(models, name)(weights=None).features
    # The last block before the next one that halves the sides has seen most of its level.
    halving_blocks = [at for at, block in enumerate(blocks) if getattr(block, "_is_cn", False)]
    ends = [at - 1 for at in halving_blocks] + [len(blocks) - 1]
    last_blocks: dict[int, int] = dict(zip((2, 4, 8, 16, 32), ends, strict=True))
    returned_layers = {str(last_blocks[stride]): str(level) for level, stride in enumerate(strides)}
    channels = [blocks[last_blocks[stride]].out_channels for stride in strides]
    return IntermediateLayerGetter(blocks, returned_layers), channels


def _frozen(norm: nn.BatchNorm2d) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(norm.num_features, norm.eps)


def _replace_norms(module: nn.Module, make: Any) -> None:
    """Replace every batch norm below ``module`` by what ``make`` makes of it, in place."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, make(child))
        else:
            _replace_norms(child, make)
