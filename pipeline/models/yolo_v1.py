"""YOLO v1 (Redmon et al. 2016, https://arxiv.org/abs/1506.02640): one look, one grid, a few boxes a cell.

The image is divided into cells; a cell predicts ``boxes`` boxes, each with a confidence, and one class vector
that its boxes share. All outputs are linear, and trained by squared error (``pipeline.losses.yolo_v1``).
"""

from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Settings
from pipeline.errors import InputError
from pipeline.models.anchor_free import grid_centres
from pipeline.models.layers import Norm, check_input, norm_layer
from pipeline.uncertainty.measures import add_background_class

SLOPE = 0.1
"""Slope of the leaky ReLU below 0 (the paper's equation 2)."""
UNIT_CELLS = 7
"""Widths and heights are in units of this many cells: the paper's whole image, which has 7x7. A unit that does not
follow the image keeps the balance of places and sizes in the loss on any grid, and lets one network serve images
of any size."""


class YoloOutput(NamedTuple):
    """N images, S cells row by row, b boxes a cell, K classes; location l = s * b + j is box j of cell s."""

    places: Tensor
    """(N, L, 4) float32 as predicted: x and y of the box's centre, in cells from its cell's top left corner,
    and the square roots of width and height, these in units of ``unit`` pixels."""
    confidence: Tensor
    """(N, L) float32 as predicted: IoU of the box with an object, 0 where there is none; not clamped."""
    classes: Tensor
    """(N, S, K) float32 as predicted: class probabilities where there is an object; not clamped."""
    boxes: Tensor
    """(N, L, 4) float32 x1, y1, x2, y2 in input pixels, not clipped; never turned over."""
    centres: Tensor
    """(L, 2) float32 x, y of each location's cell in input pixels: the same for the boxes of a cell."""
    strides: Tensor
    """(L,) float32 pixels a cell."""
    unit: Tensor
    """() float32 pixels: what widths and heights are relative to."""

    fixed = True  # pyright: ignore[reportGeneralTypeIssues]

    def probabilities(self) -> Tensor:
        """Existence is the best class's score, shared out among the classes; see ``add_background_class``."""
        return add_background_class(self.scores())

    def scores(self) -> Tensor:
        """Confidence times class probability (equation 1), each clamped to 0..1: linear outputs may leave it."""
        boxes_per_cell = self.confidence.shape[1] // self.classes.shape[1]
        classes = self.classes.float().clamp(0, 1).repeat_interleave(boxes_per_cell, dim=1)
        return self.confidence.float().clamp(0, 1)[..., None] * classes


class YoloV1(Settings):
    """Settings of the detector: ``build(num_classes)`` gives the network.

    The paper's: ``head: dense, size: [448, 448]`` and else the defaults, but VGG's stages of 3x3 convolutions
    in place of its 24 layers and 1x1 bottlenecks.
    """

    task: ClassVar[Literal["segmentation", "detection"]] = "detection"
    losses: ClassVar[tuple[str, ...]] = ("yolo_v1",)

    stride: Literal[8, 16, 32, 64, 128] = 64
    """Pixels a side of a cell: 64 divides the paper's 448 pixels into 7. A cell answers for one object, so take
    one that seldom holds two centres."""
    boxes: int = Field(default=2, ge=1, le=16)
    """Boxes a cell; they share its class vector."""
    width: int = Field(default=64, ge=1, le=512)
    """Channels of the first stage; doubled with each, up to 8 times ``width``."""
    convs: int = Field(default=2, ge=1, le=4)
    """3x3 convolutions a stage; each stage ends in 2x2 max pooling."""
    norm: Norm = "batch"
    head: Literal["dense", "convolutional"] = "convolutional"
    """``dense`` is the paper's: every cell sees the whole image, at one fixed ``size``. ``convolutional`` takes
    the same weights for all cells: a fraction of the parameters, any size, and no place to learn by heart."""
    size: tuple[int, int] | None = None
    """Height and width in pixels, of a dense head alone: that of ``input.size``."""
    hidden: int | None = Field(default=None, ge=1, le=16384)
    """Units of the layer before the last one; None = 64 times ``width`` in a dense head (the paper's 4096),
    8 times ``width`` in a convolutional one."""
    dropout: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Probability of dropping a unit before the last layer; a small network wants less."""

    @model_validator(mode="after")
    def _sized(self) -> Self:
        if self.head == "convolutional" and self.size is not None:
            raise ValueError(f"size is of a dense head alone, found {self.size}; leave it out, or set head to dense")
        if self.head == "dense" and (self.size is None or any(n < 1 or n % self.stride for n in self.size)):
            raise ValueError(
                f"a dense head wants size, the height and width of input.size, multiples of stride {self.stride}, "
                f"found {self.size}"
            )
        return self

    def build(self, num_classes: int) -> nn.Module:
        """The network with random weights; forward (N, 3, H, W) -> YoloOutput."""
        return YoloV1Module(self, num_classes)

    def outputs(self, num_classes: int) -> int:
        """Class values of a cell."""
        return num_classes


class YoloV1Module(nn.Module):
    """Images (N, 3, H, W) -> YoloOutput, in train and eval alike; H, W multiples of ``stride``."""

    def __init__(self, settings: YoloV1, num_classes: int) -> None:
        super().__init__()
        self.stride, self.boxes_per_cell, self.size = settings.stride, settings.boxes, settings.size
        widths = [settings.width * min(2**stage, 8) for stage in range(self.stride.bit_length() - 1)]
        pairs = zip([3, *widths[:-1]], widths, strict=True)
        self.stages = nn.ModuleList(_stage(a, b, settings.convs, settings.norm) for a, b in pairs)
        deep = widths[-1]
        self.neck = nn.Sequential(*[_convolution(deep, deep, settings.norm) for _ in range(2)])
        per_cell = 5 * settings.boxes + num_classes
        dense = settings.size is not None
        hidden = settings.hidden or (64 if dense else 8) * settings.width
        if settings.size is not None:
            cells = (settings.size[0] // self.stride) * (settings.size[1] // self.stride)
            first = [nn.Flatten(), nn.Linear(deep * cells, hidden), nn.LeakyReLU(SLOPE)]
            self.last: nn.Linear | nn.Conv2d = nn.Linear(hidden, cells * per_cell)
        else:
            first = [_convolution(deep, hidden, settings.norm)]
            self.last = nn.Conv2d(hidden, per_cell, 1)
        self.hidden = nn.Sequential(*first)
        self.drop = nn.Dropout(settings.dropout)
        _init_outputs(self.last, settings.boxes, num_classes)

    def forward(self, images: Tensor) -> YoloOutput:
        """(N, 3, H, W) -> YoloOutput; cells row by row."""
        check_input(images, self.stride)
        rows, columns = images.shape[-2] // self.stride, images.shape[-1] // self.stride
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            raise InputError(
                f"the model's dense head wants images of {self.size[0]}x{self.size[1]} (height x width), found "
                f"{images.shape[-2]}x{images.shape[-1]}; set input.size to that, or model.head to convolutional"
            )
        x = images
        for stage in self.stages:
            x = stage(x)
        x = self.drop(self.hidden(self.neck(x)))
        # Not in autocast: 8 bits of bfloat16 are pixels of error in a wide box.
        with torch.autocast(images.device.type, enabled=False):
            raw = self.last(x.to(self.last.weight.dtype)).float()
        if raw.ndim == 4:
            raw = raw.flatten(2).transpose(1, 2)
        return decode(raw.reshape(len(images), rows * columns, -1), rows, columns, self.stride, self.boxes_per_cell)

    @property
    def backbone(self) -> list[nn.Module]:
        """The parts that see the image first, input first."""
        return [self.stages]


def decode(raw: Tensor, rows: int, columns: int, stride: int, boxes_per_cell: int) -> YoloOutput:
    """Name the linear outputs and place the boxes; a root may be negative, its square is not.

    Args:
        raw: (N, rows * columns, 5 * boxes_per_cell + K) float32, cells row by row; first, for each box, x, y, root of
            width, root of height, confidence; then the class values.
        rows: Cells down.
        columns: Cells across.
        stride: Pixels a side of a cell.
        boxes_per_cell: Boxes that a cell predicts.
    """
    # A cell's outputs: 5 numbers for each of its boxes, then its class vector.
    boxes = raw[..., : 5 * boxes_per_cell].unflatten(-1, (boxes_per_cell, 5)).flatten(1, 2)
    classes = raw[..., 5 * boxes_per_cell :]
    places, confidence = boxes[..., :4], boxes[..., 4]
    centres = grid_centres(rows, columns, stride, raw.device).repeat_interleave(boxes_per_cell, dim=0)
    unit = torch.full_like(centres[0, 0], UNIT_CELLS * stride)
    # Places are relative to the cell's top left corner, half a stride from its centre.
    middle = centres + (places[..., :2] - 0.5) * stride
    half = places[..., 2:].square() * (unit / 2)
    return YoloOutput(
        places=places,
        confidence=confidence,
        classes=classes,
        boxes=torch.cat([middle - half, middle + half], dim=-1),
        centres=centres,
        strides=torch.full_like(centres[:, 0], stride),
        unit=unit,
    )


def _convolution(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    """3x3 convolution (no bias: the norm has one), norm, leaky ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, norm_layer(norm, outputs), nn.LeakyReLU(SLOPE, inplace=True))


def _stage(inputs: int, outputs: int, convs: int, norm: Norm) -> nn.Sequential:
    """Convolutions, then half the resolution: (N, inputs, H, W) -> (N, outputs, H / 2, W / 2)."""
    widths = [inputs, *[outputs] * convs]
    return nn.Sequential(
        *[_convolution(a, b, norm) for a, b in zip(widths[:-1], widths[1:], strict=True)], nn.MaxPool2d(2)
    )


@torch.no_grad()
def _init_outputs(last: nn.Linear | nn.Conv2d, boxes_per_cell: int, num_classes: int) -> None:
    """Boxes of a fresh network: in the middle of their cells, of different sizes, with no confidence.

    The ``boxes_per_cell`` roots are spread evenly over 0..1, so that each box of a cell starts out responsible for
    sizes of its own: the specialisation that the paper observes (2.2), in the same order in all members of an ensemble.
    """
    roots = [(j + 1) / (boxes_per_cell + 1) for j in range(boxes_per_cell)]
    cell = [value for root in roots for value in (0.5, 0.5, root, root, 0.0)] + [1 / num_classes] * num_classes
    nn.init.normal_(last.weight, std=0.1 / last.weight[0].numel() ** 0.5)
    assert last.bias is not None
    last.bias.copy_(torch.tensor(cell).repeat(len(last.bias) // len(cell)))
