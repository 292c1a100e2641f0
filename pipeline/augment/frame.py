"""Framing on the CPU: decoded images and labels into one canvas; and the way back to an image's own size."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from pipeline import boxes as box_ops
from pipeline.augment.geometry import sampling_theta
from pipeline.augment.settings import InputSettings
from pipeline.boxes import Placement
from pipeline.schema import VOID


class Frame(TypedDict):
    """The fields of a Batch that framing makes."""

    images: Tensor
    masks: Tensor | None
    boxes: Tensor | None
    labels: Tensor | None
    crowd: Tensor | None
    matrices: Tensor
    sizes: Tensor


def frame(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None] | None,
    boxes: Sequence[np.ndarray | None] | None,
    labels: Sequence[np.ndarray | None] | None,
    crowd: Sequence[np.ndarray | None] | None,
    input: InputSettings,
    *,
    train: bool,
    offsets: np.ndarray | None = None,
    multiple: int = 32,
    threads: int = 1,
) -> Frame:
    """Lay N images of any size into one canvas.

    ``letterbox`` and ``stretch`` resize with antialiasing on uint8 (masks: nearest); an image that fits
    already is copied untouched. ``crop`` never resizes. In training its canvas is a window half as large
    again as ``input.size``, so that a rotation finds real pixels in its corners, and ``offsets`` spreads
    the centre of that window evenly over the image; otherwise the canvas is the whole image, padded on the
    right and at the bottom to a multiple of ``multiple``. Outside the image: the mean colour, and VOID.

    Args:
        images: N arrays (H, W, 3) uint8, upright.
        masks: N arrays (H, W) uint8; an entry None gives all VOID. None: the batch has no masks.
        boxes: N arrays (B, 4) in source pixels; an entry None has no boxes. None: the batch has none.
        labels: N arrays (B,); needed with ``boxes``.
        crowd: N arrays (B,) bool; None or an entry None: no crowds.
        input: The network's input.
        train: Whether ``crop`` takes windows (then ``Augment`` must cut ``input.size`` out of them).
        offsets: (N, 2) in [0, 1), down and right (see ``crop_offsets``); None centres the windows.
        multiple: Of the network's stride.
        threads: Images resized at the same time.
    """
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    canvas = _canvas(sizes, input, train, multiple)
    places = [
        _place(size, canvas, input, train, None if offsets is None else offsets[n]) for n, size in enumerate(sizes)
    ]
    # Channels last in memory, as decoders write and as the uint8 resize is fastest; N C H W in shape.
    fill = torch.tensor([round(255 * value) for value in input.mean], dtype=torch.uint8)
    out = fill.expand(len(sizes), *canvas, 3).contiguous()
    _paste_all(out, images, places, threads, nearest=False)
    out_masks = None
    if masks is not None:
        out_masks = torch.full((len(sizes), *canvas), VOID, dtype=torch.uint8)
        _paste_all(out_masks[..., None], masks, places, threads, nearest=True)
    matrices = [box_ops.placement_matrix(size, place) for size, place in zip(sizes, places, strict=True)]
    moved = _pad_boxes(boxes, labels, crowd, matrices, canvas)
    stacked = torch.stack(matrices).float() if matrices else torch.zeros(0, 3, 3)
    size_tensor = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
    return {
        "images": out.permute(0, 3, 1, 2).contiguous(),
        "masks": out_masks,
        "boxes": moved[0],
        "labels": moved[1],
        "crowd": moved[2],
        "matrices": stacked,
        "sizes": size_tensor,
    }


def _canvas(sizes: list[tuple[int, int]], input: InputSettings, train: bool, multiple: int) -> tuple[int, int]:
    if input.fit != "crop":
        return input.size
    if train:
        # An even margin: the centre is cut out by whole pixels, so an image that nothing moves stays exact.
        return input.size[0] + 2 * -(-input.size[0] // 4), input.size[1] + 2 * -(-input.size[1] // 4)
    largest = [max((size[axis] for size in sizes), default=input.size[axis]) for axis in (0, 1)]
    return -(-largest[0] // multiple) * multiple, -(-largest[1] // multiple) * multiple


def _place(
    size: tuple[int, int],
    canvas: tuple[int, int],
    input: InputSettings,
    train: bool,
    offset: np.ndarray | None,
) -> Placement:
    if input.fit == "letterbox":
        return box_ops.letterbox_placement(size, canvas)
    if input.fit == "stretch":
        return Placement(*canvas, 0, 0)
    if not train:
        return Placement(*size, 0, 0)
    starts = []
    for axis in (0, 1):
        slack = size[axis] - input.size[axis]
        share = 0.5 if offset is None else float(offset[axis])
        # Of the centre: anywhere inside the image, or centred over an image smaller than the input.
        centre = int(share * (slack + 1)) if slack >= 0 else -(-slack // 2)
        starts.append((canvas[axis] - input.size[axis]) // 2 - centre)
    return Placement(*size, *starts)


def _paste_all(
    canvases: Tensor,
    images: Sequence[np.ndarray | None],
    places: list[Placement],
    threads: int,
    nearest: bool,
) -> None:
    """Write N images (h, w) or (h, w, C) into ``canvases`` (N, H, W, C); None leaves a canvas as it is."""

    def paste(n: int) -> None:
        image = images[n]
        if image is not None:
            planes = torch.from_numpy(np.require(image, requirements=["C", "W"]))
            _paste(canvases[n], planes.reshape(*image.shape[:2], -1), places[n], nearest)

    if threads > 1 and len(images) > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(paste, range(len(images))))
    else:
        for n in range(len(images)):
            paste(n)


def _paste(canvas: Tensor, image: Tensor, place: Placement, nearest: bool) -> None:
    """Write ``image`` (h, w, C) into ``canvas`` (H, W, C), resized to the placement and cut at the edges."""
    if image.shape[:2] != (place.height, place.width):
        planes = image.permute(2, 0, 1)[None]
        size = (place.height, place.width)
        if nearest:
            planes = interpolate(planes, size, mode="nearest-exact")
        else:
            planes = interpolate(planes, size, mode="bilinear", antialias=True, align_corners=False)
        image = planes[0].permute(1, 2, 0)
    rows = slice(max(place.top, 0), min(place.top + place.height, canvas.shape[0]))
    columns = slice(max(place.left, 0), min(place.left + place.width, canvas.shape[1]))
    canvas[rows, columns] = image[
        rows.start - place.top : rows.stop - place.top, columns.start - place.left : columns.stop - place.left
    ]


def _pad_boxes(
    boxes: Sequence[np.ndarray | None] | None,
    labels: Sequence[np.ndarray | None] | None,
    crowd: Sequence[np.ndarray | None] | None,
    matrices: list[Tensor],
    canvas: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Boxes in the canvas, padded; those wholly outside it (a training window) are left out.

    What sticks out is not cut off here: Augment needs the whole box to judge what of it is visible.
    """
    if boxes is None or labels is None:
        return None, None, None
    rows = []
    for n, matrix in enumerate(matrices):
        given, names = boxes[n], labels[n]
        crowds = None if crowd is None else crowd[n]
        count = 0 if given is None or names is None else len(given)
        box = torch.as_tensor(np.array(given, np.float64) if count else np.zeros((0, 4))).reshape(-1, 4)
        label = torch.as_tensor(np.array(names, np.int64) if count else np.zeros(0, np.int64))
        many = torch.as_tensor(np.array(crowds, bool) if count and crowds is not None else np.zeros(count, bool))
        box = box_ops.transform_boxes(box, matrix)
        seen = (box[:, 2] > 0) & (box[:, 3] > 0) & (box[:, 0] < canvas[1]) & (box[:, 1] < canvas[0])
        rows.append((box[seen].float(), label[seen], many[seen]))
    longest = max([1, *(len(label) for _, label, _ in rows)])
    out = torch.zeros(len(rows), longest, 4)
    out_labels = torch.full((len(rows), longest), -1, dtype=torch.int64)
    out_crowd = torch.zeros(len(rows), longest, dtype=torch.bool)
    for n, (box, label, many) in enumerate(rows):
        out[n, : len(box)], out_labels[n, : len(box)], out_crowd[n, : len(box)] = box, label, many
    return out, out_labels, out_crowd


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
    host = matrices.detach().to("cpu", torch.float64)
    out = []
    for n, (height, width) in enumerate(sizes.tolist()):
        place = _upright_placement(host[n], (height, width), (maps.shape[-2], maps.shape[-1]))
        if place is None:
            theta = sampling_theta(torch.linalg.inv(host[n])[None], (maps.shape[-2], maps.shape[-1]), (height, width))
            grid = affine_grid(theta.to(maps), [1, 1, height, width], align_corners=False)
            values = grid_sample(maps[n : n + 1], grid, padding_mode="border", align_corners=False)
        else:
            values = maps[n : n + 1, :, place.top : place.top + place.height, place.left : place.left + place.width]
            if (place.height, place.width) != (height, width):
                values = interpolate(values, (height, width), mode="bilinear", align_corners=False)
        out.append(values[0])
    return out


def _upright_placement(matrix: Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> Placement | None:
    """The whole pixels of the canvas that hold the image, where the matrix puts it into such a rectangle."""
    corners = box_ops.transform_boxes(torch.tensor([[0.0, 0.0, size[1], size[0]]], dtype=matrix.dtype), matrix)[0]
    left, top, right, bottom = (round(value) for value in corners.tolist())
    place = Placement(bottom - top, right - left, top, left)
    inside = left >= 0 and top >= 0 and right <= canvas[1] and bottom <= canvas[0] and min(place[:2]) > 0
    # 1e-3 pixels: what float32 matrices of large images lose, and nothing that could be seen.
    if not inside or not torch.allclose(box_ops.placement_matrix(size, place), matrix, rtol=1e-5, atol=1e-3):
        return None
    return place


def unframe_boxes(boxes: Tensor, matrices: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (N, B, 4) in the network's frame back to each image's own pixels, clipped to it.

    Args:
        boxes: (N, B, 4).
        matrices: (N, 3, 3) affine, source -> frame, as in Batch.
        sizes: (N, 2) height and width of the source images.
    """
    inverse = box_ops.invert_affine(matrices.to(boxes.device, torch.float64)).to(boxes.dtype)
    return box_ops.clip(box_ops.transform_boxes(boxes, inverse), sizes.to(boxes.device))
