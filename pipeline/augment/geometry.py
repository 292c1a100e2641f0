"""Geometry: drawn parameters -> Kornia's matrices -> one affine matrix -> one resampling.

Kornia's matrices act on pixel indices, where (0, 0) is the centre of the first pixel; ours act on continuous
edges, where that centre is (0.5, 0.5). ``_to_continuous_edges`` is the one place that converts.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from pipeline.augment.settings import AugmentSettings
from pipeline.images import affine
from pipeline.images import boxes as box_ops


def _translation(x: float, y: float, like: Tensor) -> Tensor:
    matrix = torch.eye(3, device=like.device, dtype=like.dtype)
    matrix[0, 2], matrix[1, 2] = x, y
    return matrix


def _to_continuous_edges(matrix: Tensor) -> Tensor:
    """Kornia's pixel-centre matrices (N, 3, 3) as matrices of continuous edges."""
    return _translation(0.5, 0.5, matrix) @ matrix @ _translation(-0.5, -0.5, matrix)


class Geometry:
    """Kornia's augmentation classes, driven by our draw; counts what it calls."""

    def __init__(self, settings: AugmentSettings) -> None:
        """Import Kornia and make its classes; what is off in ``settings`` is never called."""
        from kornia import augmentation  # here, since predicting and reading data need no Kornia

        self.settings = settings
        self.calls: Counter[str] = Counter()
        self._hflip = augmentation.RandomHorizontalFlip(p=1.0)
        self._vflip = augmentation.RandomVerticalFlip(p=1.0)
        self._turn = augmentation.RandomRotation90(times=(0, 3), p=1.0)
        self._affine = augmentation.RandomAffine(degrees=0.0, p=1.0)

    def matrices(self, values: dict[str, Tensor], canvas: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """One matrix an image: canvas -> flips -> quarter turns -> affine -> its centre of ``size``.

        Args:
            values: The draw as floating tensors of N rows, on the device where Kornia shall run: best on the
                host, where these some 60 small operations cost less than a GPU takes to be told of them.
            canvas: Height and width of the canvas in pixels.
            size: Height and width of the output in pixels.

        Returns:
            (N, 3, 3) in the draw's type, on its device, acting on continuous edges.
        """
        angle = values["angle"]
        count, settings = angle.shape[0], self.settings
        # Kornia's matrices read the shape, type and device of the image, never its pixels.
        image = torch.empty((), device=angle.device, dtype=angle.dtype).expand(count, 3, *canvas)
        shape = {"forward_input_shape": torch.tensor([count, 3, *canvas])}
        total = torch.eye(3, device=angle.device, dtype=angle.dtype).expand(count, 3, 3)
        if settings.hflip:
            total = self._matrix_where(values["hflip"], self._kornia_matrix(self._hflip, image, shape), total) @ total
        if settings.vflip:
            total = self._matrix_where(values["vflip"], self._kornia_matrix(self._vflip, image, shape), total) @ total
        if settings.quarter_turns:
            times = values["turns"] if size[0] == size[1] else 2.0 * (values["turns"] > 0)
            total = self._kornia_matrix(self._turn, image, {"times": times.to(angle.dtype)}) @ total
        if settings.affine:
            total = self._kornia_matrix(self._affine, image, affine_parameters(values, canvas, size)) @ total
        return _translation(*centre_crop(canvas, size), total) @ _to_continuous_edges(total)

    def _kornia_matrix(self, op: Any, image: Tensor, params: dict[str, Tensor]) -> Tensor:
        self.calls[type(op).__name__] += 1
        return op.compute_transformation(image, params, op.flags)

    @staticmethod
    def _matrix_where(chosen: Tensor, matrix: Tensor, total: Tensor) -> Tensor:
        identity = torch.eye(3, device=total.device, dtype=total.dtype)
        return torch.where(chosen.bool()[:, None, None], matrix, identity)


def affine_parameters(values: dict[str, Tensor], canvas: tuple[int, int], size: tuple[int, int]) -> dict[str, Tensor]:
    """The draw as the parameters of Kornia's RandomAffine (pixels, degrees, about the canvas's centre)."""
    angle = values["angle"]
    height, width = canvas
    shift = torch.stack([values["translate"][:, 0] * size[1], values["translate"][:, 1] * size[0]], -1)
    centre = torch.stack([torch.full_like(angle, (width - 1) / 2), torch.full_like(angle, (height - 1) / 2)], -1)
    return {
        "translations": shift,
        "center": centre,
        "scale": values["scale"][:, None].expand(-1, 2),
        "angle": angle,
        "shear_x": values["shear"],
        "shear_y": torch.zeros_like(angle),
    }


def centre_crop(canvas: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Whole-pixel shift (x, y) that brings the centre of a canvas (H, W) to an output of ``size`` (H, W)."""
    return -((canvas[1] - size[1]) // 2), -((canvas[0] - size[0]) // 2)


def visible_boxes(
    boxes: Tensor,
    labels: Tensor,
    crowd: Tensor,
    matrices: Tensor,
    canvas: tuple[int, int],
    size: tuple[int, int],
    min_visible: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move boxes (N, B, 4), clip them, and drop those of which too little is left.

    Visible is what lies both on the canvas (beyond it no pixel was read) and in the output. Crowds are
    kept however little is left of them: a dropped one would turn what it excused into mistakes.

    Returns:
        Boxes, labels (-1 where dropped) and crowd; dropped boxes are all 0.
    """
    return cut_boxes(boxes, box_ops.clip(boxes, canvas), labels, crowd, matrices, size, min_visible)


def cut_boxes(
    boxes: Tensor,
    seen: Tensor,
    labels: Tensor,
    crowd: Tensor,
    matrices: Tensor,
    size: tuple[int, int],
    min_visible: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``visible_boxes`` where it is known already what is ``seen`` of the whole ``boxes``: (..., B, 4) both."""
    hull = affine.transform_boxes(seen, matrices)
    clipped = box_ops.clip(hull, size)
    visible_share = _share(seen, boxes) * _share(clipped, hull)
    keep = (labels >= 0) & (box_ops.area(clipped) > 0) & ((visible_share >= min_visible) | crowd)
    return clipped * keep[..., None], labels.where(keep, -1), crowd & keep


def _share(part: Tensor, whole: Tensor) -> Tensor:
    # A box that loses nothing must pass min_visible = 1, whatever the rounding of its area.
    area = box_ops.area(whole)
    return torch.where((part == whole).all(-1), 1.0, box_ops.area(part) / area.clamp(min=1e-12))
