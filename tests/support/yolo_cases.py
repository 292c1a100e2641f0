"""Cells, images and losses for the tests of YOLO v1."""

import torch

from pipeline.losses.yolo_v1 import YoloV1Loss, yolo_v1
from pipeline.models.yolo_v1 import UNIT_CELLS, YoloOutput, YoloV1

STRIDE = 16
UNIT = UNIT_CELLS * STRIDE  # 112 pixels: a root of 0.25 is 7 pixels, one of 0.5 is 28
SMALL = [
    YoloV1(stride=8, width=4, convs=1, norm="group"),
    YoloV1(stride=8, width=4, convs=1, norm="group", head="dense", size=(32, 48), hidden=32, boxes=3),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(height: int = 32, width: int = 48, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=generator())


def cell(*boxes: tuple[float, ...], classes: tuple[float, ...] = (0, 0)) -> list[float]:
    return [value for box in boxes for value in box] + list(classes)


def loss_of(out: YoloOutput, boxes, labels, crowd=None, **changes: float) -> dict[str, float]:
    """Weighted sums by term."""
    crowd = None if crowd is None else torch.tensor(crowd)
    terms = yolo_v1(out, torch.tensor(boxes), torch.tensor(labels), crowd, YoloV1Loss(**changes))
    return {name: weight * value.item() for name, (weight, value, _) in terms.items()}
