"""The loss of YOLO v1 (Redmon et al. 2016, https://arxiv.org/abs/1506.02640, equation 3), as sums over images."""

from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.images.boxes import area, iou
from pipeline.losses.base import BoxLoss, Term, objects


class Cells(Protocol):
    """What YOLO v1 gives; see ``pipeline.models.yolo_v1.YoloOutput``: S cells, L = S b locations, K classes."""

    @property
    def places(self) -> Tensor:
        """(N, L, 4) x and y in cells from the cell's corner, roots of width and height in ``unit``."""
        ...

    @property
    def confidence(self) -> Tensor:
        """(N, L)."""
        ...

    @property
    def classes(self) -> Tensor:
        """(N, S, K)."""
        ...

    @property
    def boxes(self) -> Tensor:
        """(N, L, 4) xyxy pixels."""
        ...

    @property
    def centres(self) -> Tensor:
        """(L, 2) x, y pixels of each location's cell."""
        ...

    @property
    def strides(self) -> Tensor:
        """(L,) pixels a cell."""
        ...

    @property
    def unit(self) -> Tensor:
        """() pixels."""
        ...


class Owners(NamedTuple):
    """For each image and cell, which object is in it; N images, S cells."""

    taken: Tensor
    """(N, S) bool: the cell has an object."""
    boxes: Tensor
    """(N, S, 4) float32 xyxy; zeros where not taken."""
    labels: Tensor
    """(N, S) int64; 0 where not taken."""


class YoloV1Loss(BoxLoss):
    """Squared errors of place, confidence and class; see ``yolo_v1``."""

    terms: ClassVar[tuple[str, ...]] = ("coord", "confidence", "noobj", "cls")

    lambda_coord: float = Field(default=5.0, ge=0)
    """Weight of the places of responsible boxes."""
    lambda_noobj: float = Field(default=0.5, ge=0)
    """Weight of the confidence of all others, which are many more."""

    def counts(self, labels: Tensor, crowd: Tensor | None) -> dict[str, Tensor]:
        """Images, of every term: the paper sums over the image, and its weights balance those sums."""
        del crowd
        return {name: torch.full((), float(labels.shape[0]), device=labels.device) for name in self.terms}

    def __call__(self, output: Any, boxes: Tensor, labels: Tensor, crowd: Tensor | None) -> dict[str, Term]:
        """See ``yolo_v1``."""
        return yolo_v1(output, boxes, labels, crowd, self)


def yolo_v1(
    output: Cells,
    boxes: Tensor,
    labels: Tensor,
    crowd: Tensor | None = None,
    settings: YoloV1Loss | None = None,
) -> dict[str, Term]:
    """Terms ``coord``, ``confidence``, ``noobj``, ``cls``, each (weight, sum, count of images).

    An object belongs to the cell of its centre. Of several in one cell the largest is taught (of equal ones
    the first), the others not: a cell has one class vector. Responsible for it is that box of the cell which
    overlaps it most; if none does, the one nearest in x, y, width and height (root mean square, as darknet,
    the authors' code, does).

    - coord (x lambda_coord): Σ over responsible boxes of ``(x - x̂)² + (y - ŷ)² + (√w - √ŵ)² + (√h - √ĥ)²``,
      x and y in cells, w and h in ``output.unit``. The network predicts the roots themselves.
    - confidence: Σ over responsible boxes of ``(C - IoU)²``, the IoU detached.
    - noobj (x lambda_noobj): Σ over all other boxes of ``C²``, but in cells that a crowd region touches: the
      objects that it stands for may be centred there.
    - cls: Σ over cells with an object and over classes of ``(p - p̂)²``, p̂ one-hot.

    A batch without objects gives finite sums with gradient: noobj still pushes every confidence down.

    Args:
        output: Raw outputs.
        boxes: (N, B, 4) xyxy pixels, padded; B may be 0.
        labels: (N, B) int64; -1 = padding.
        crowd: (N, B) bool, or None for no crowds.
        settings: Weights; None = defaults.
    """
    settings = settings or YoloV1Loss()
    num_images, num_cells, num_classes = output.classes.shape
    boxes_per_cell = output.confidence.shape[1] // num_cells
    centres, stride = output.centres[::boxes_per_cell], output.strides[0]
    owners = cell_owners(centres, stride, boxes, labels, objects(labels, crowd))
    # One row a cell, one column a box of it: (N, S, b) and (N, S, b, 4).
    confidence = output.confidence.float().reshape(num_images, num_cells, boxes_per_cell)
    places = output.places.float().reshape(num_images, num_cells, boxes_per_cell, 4)
    predicted = output.boxes.detach().float().reshape(num_images, num_cells, boxes_per_cell, 4)
    overlap = iou(predicted, owners.boxes[:, :, None])[..., 0]
    responsible = _responsible(predicted, owners.boxes, overlap) & owners.taken[..., None]

    target_places = _target_places(owners.boxes, centres, stride, output.unit)[:, :, None]
    coord = (places - target_places).square().sum(-1)
    confidence_error = (confidence - overlap).square()
    empty = ~responsible
    if crowd is not None:
        empty = empty & ~_cells_in_crowd(centres, stride, boxes, crowd & (labels >= 0))[..., None]
    one_hot = F.one_hot(owners.labels, num_classes).float()
    cls = (output.classes.float() - one_hot).square().sum(-1)
    image_counts = settings.counts(labels, crowd)
    return {
        "coord": (settings.lambda_coord, _sum_where(responsible, coord), image_counts["coord"]),
        "confidence": (1.0, _sum_where(responsible, confidence_error), image_counts["confidence"]),
        "noobj": (settings.lambda_noobj, _sum_where(empty, confidence.square()), image_counts["noobj"]),
        "cls": (1.0, _sum_where(owners.taken, cls), image_counts["cls"]),
    }


@torch.no_grad()
def cell_owners(centres: Tensor, stride: Tensor, boxes: Tensor, labels: Tensor, real: Tensor) -> Owners:
    """Give each cell the largest of the objects whose centre lies in it; of equal ones the first.

    A centre on an edge between cells belongs to the right or lower one; one on or over the image's edge, to the
    nearest cell.

    Args:
        centres: (S, 2) x, y of the cells' centres, row by row, in pixels.
        stride: () pixels a cell.
        boxes: (N, B, 4) xyxy pixels; B may be 0.
        labels: (N, B) int64.
        real: (N, B) bool: False for padding and crowds, which own nothing.
    """
    num_cells, (num_images, num_boxes) = len(centres), labels.shape
    boxes = boxes.float()
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    last = (centres[-1] / stride).floor()
    column_row = (middle / stride).floor().clamp(min=0).minimum(last).long()
    cell = column_row[..., 1] * (last[0].long() + 1) + column_row[..., 0]
    # What owns nothing goes to one more cell behind the others, which is then cut off.
    cell = torch.where(real, cell, num_cells)
    size = area(boxes)
    largest = size.new_full((num_images, num_cells + 1), -1.0).scatter_reduce(1, cell, size, "amax")
    index = torch.arange(num_boxes, device=boxes.device).expand(num_images, num_boxes)
    index = torch.where(size == largest.gather(1, cell), index, num_boxes)
    first = index.new_full((num_images, num_cells + 1), num_boxes).scatter_reduce(1, cell, index, "amin")
    first = first[:, :num_cells]
    # One more box of zeros behind the others, for cells without an object; it also serves where B is 0.
    boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1))
    return Owners(first < num_boxes, boxes.gather(1, first[..., None].expand(-1, -1, 4)), labels.gather(1, first))


def _responsible(predicted: Tensor, owners: Tensor, overlap: Tensor) -> Tensor:
    """(N, S, b) bool, one box a cell: the highest IoU (N, S, b), or the nearest where all are 0."""
    truth = _centre_size(owners)[:, :, None]
    distance = (_centre_size(predicted) - truth).square().sum(-1)
    best = torch.where(overlap.amax(-1) > 0, overlap.argmax(-1), distance.argmin(-1))
    return F.one_hot(best, overlap.shape[-1]).bool()


def _target_places(boxes: Tensor, centres: Tensor, stride: Tensor, unit: Tensor) -> Tensor:
    """What a cell should predict for its (N, S, 4) xyxy box: x, y from its corner in cells, roots in units."""
    middle, size = _centre_size(boxes).split(2, dim=-1)
    return torch.cat([(middle - centres) / stride + 0.5, (size.clamp(min=0) / unit).sqrt()], dim=-1)


def _centre_size(boxes: Tensor) -> Tensor:
    """Xyxy -> x, y of the centre, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


@torch.no_grad()
def _cells_in_crowd(centres: Tensor, stride: Tensor, boxes: Tensor, crowd: Tensor) -> Tensor:
    """(N, S) bool: cells that share area with a crowd region; ``crowd`` (N, B) bool, B may be 0."""
    cells = torch.cat([centres - stride / 2, centres + stride / 2], dim=-1)[:, None]
    boxes = boxes.float()[:, None]
    across = torch.minimum(cells[..., 2:], boxes[..., 2:]) - torch.maximum(cells[..., :2], boxes[..., :2])
    return ((across > 0).all(-1) & crowd[:, None]).any(-1)


def _sum_where(mask: Tensor, values: Tensor) -> Tensor:
    """Sum of the chosen; all others get zero gradient, and so does a network where nothing is chosen."""
    return torch.where(mask, values, 0.0).sum()
