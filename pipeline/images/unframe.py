"""The way back from the network's frame to an image's own size."""

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from pipeline.images import affine
from pipeline.images import boxes as box_ops
from pipeline.images.affine import Placement, sampling_theta


def unframe_maps(maps: Tensor, matrices: Tensor, sizes: Tensor) -> list[Tensor]:
    """Maps in the network's frame back onto each image's own pixels.

    Bilinear between pixel centres (``align_corners=False``); values at the image's edge continue outwards,
    so the padding around a letterboxed image is never mixed in. Exact where nothing was resized.

    Args:
        maps: (N, C, h, w) float, at the resolution of the frame.
        matrices: (N, 3, 3) affine, source -> frame, as in Batch; best on the CPU, where it is read.
        sizes: (N, 2) height and width of the source images.

    Returns:
        N tensors (C, H, W) on the device of ``maps``.
    """
    host_matrices = matrices.detach().to("cpu", torch.float64)
    unframed = []
    for n, (height, width) in enumerate(sizes.tolist()):
        place = _upright_placement(host_matrices[n], (height, width), (maps.shape[-2], maps.shape[-1]))
        if place is None:
            theta = sampling_theta(
                torch.linalg.inv(host_matrices[n])[None], (maps.shape[-2], maps.shape[-1]), (height, width)
            )
            grid = affine_grid(theta.to(maps), [1, 1, height, width], align_corners=False)
            values = grid_sample(maps[n : n + 1], grid, padding_mode="border", align_corners=False)
        else:
            values = maps[n : n + 1, :, place.top : place.top + place.height, place.left : place.left + place.width]
            if (place.height, place.width) != (height, width):
                values = interpolate(values, (height, width), mode="bilinear", align_corners=False)
        unframed.append(values[0])
    return unframed


def _upright_placement(matrix: Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> Placement | None:
    """The whole pixels of the canvas that hold the image, where the matrix puts it into such a rectangle."""
    corners = affine.transform_boxes(torch.tensor([[0.0, 0.0, size[1], size[0]]], dtype=matrix.dtype), matrix)[0]
    left, top, right, bottom = (round(value) for value in corners.tolist())
    place = Placement(bottom - top, right - left, top, left)
    inside = left >= 0 and top >= 0 and right <= canvas[1] and bottom <= canvas[0] and min(place[:2]) > 0
    # 1e-3 pixels: what float32 matrices of large images lose, and nothing that could be seen.
    if not inside or not torch.allclose(affine.placement_matrix(size, place), matrix, rtol=1e-5, atol=1e-3):
        return None
    return place


def unframe_boxes(boxes: Tensor, matrices: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (N, B, 4) in the network's frame back to each image's own pixels, clipped to it.

    Args:
        boxes: (N, B, 4).
        matrices: (N, 3, 3) affine, source -> frame, as in Batch.
        sizes: (N, 2) height and width of the source images.
    """
    inverse = affine.invert_affine(matrices.to(boxes.device, torch.float64)).to(boxes.dtype)
    return box_ops.clip(affine.transform_boxes(boxes, inverse), sizes.to(boxes.device))
