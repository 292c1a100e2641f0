"""Framing on the CPU: decoded images and labels into one canvas."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline import boxes as box_ops
from pipeline.augment.settings import InputSettings
from pipeline.boxes import Placement
from pipeline.buffers import Buffers
from pipeline.decode import Size, pool
from pipeline.schema import VOID


class Layout(NamedTuple):
    """Where each of N images goes, and in what canvas."""

    canvas: Size
    places: list[Placement]


class FramedLabels(TypedDict):
    """The fields of a Batch that framing makes, but for the images."""

    masks: Tensor | None
    boxes: Tensor | None
    labels: Tensor | None
    crowd: Tensor | None
    matrices: Tensor
    sizes: Tensor


class Frame(FramedLabels):
    """All of them."""

    images: Tensor


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
    """Lay N images of any size, with their labels, into one canvas: ``lay_out``, and all that it is for."""
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    layout = lay_out(sizes, input, train=train, offsets=offsets, multiple=multiple)
    framed = frame_labels(sizes, layout, masks, boxes, labels, crowd, threads)
    return {"images": paste_images(images, layout, input, threads), **framed}


def lay_out(
    sizes: Sequence[Size],
    input: InputSettings,
    *,
    train: bool,
    offsets: np.ndarray | None = None,
    multiple: int = 32,
) -> Layout:
    """Where N images go in one canvas.

    ``letterbox`` and ``stretch`` resize with antialiasing on uint8 (masks: nearest); an image that fits
    already is copied untouched. ``crop`` never resizes. In training its canvas is a window half as large
    again as ``input.size``, so that a rotation finds real pixels in its corners, and ``offsets`` spreads
    the centre of that window evenly over the image; otherwise the canvas is the whole image, padded on the
    right and at the bottom to a multiple of ``multiple``. Outside the image: the mean colour, and VOID.

    Args:
        sizes: Height and width of each source image.
        input: The network's input.
        train: Whether ``crop`` takes windows (then ``Augment`` must cut ``input.size`` out of them).
        offsets: (N, 2) in [0, 1), down and right (see ``crop_offsets``); None centres the windows.
        multiple: Of the network's stride.
    """
    canvas = _canvas(sizes, input, train, multiple)
    places = [
        _place(size, canvas, input, train, None if offsets is None else offsets[n]) for n, size in enumerate(sizes)
    ]
    return Layout(canvas, places)


def shown_size(size: Size, input: InputSettings) -> Size:
    """Height and width to which an image of ``size`` is resized; its own with ``crop``."""
    place = _place(size, input.size, input, False, None)
    return place.height, place.width


def paste_images(
    images: Sequence[np.ndarray],
    layout: Layout,
    input: InputSettings,
    threads: int = 1,
    buffers: Buffers | None = None,
) -> Tensor:
    """N images, resized as laid out, in one canvas each.

    Args:
        images: N arrays (H, W, 3) uint8, upright; they may have been decoded at a fraction of their size.
        layout: Made from their whole sizes.
        input: Whose mean colour lies outside the images.
        threads: Images resized at the same time.
        buffers: Where memory comes from.

    Returns:
        (N, 3, H, W) uint8 of the canvas, channels last in memory, as decoders write and resizing is fastest.
    """
    shape = (len(images), *layout.canvas, 3)
    out = torch.from_numpy(np.empty(shape, np.uint8) if buffers is None else buffers.take(*shape))
    fill = torch.tensor([round(255 * value) for value in input.mean], dtype=torch.uint8)
    line = fill.repeat(layout.canvas[1]).view(-1, 3)

    def paste(n: int) -> None:
        image = torch.from_numpy(np.require(images[n], requirements=["C", "W"]))
        _fill_around(out[n], layout.places[n], line)
        _paste(out[n], image, layout.places[n], buffers)

    _each(paste, len(images), threads)
    return out.permute(0, 3, 1, 2)


def frame_labels(
    sizes: Sequence[Size],
    layout: Layout,
    masks: Sequence[np.ndarray | None] | None,
    boxes: Sequence[np.ndarray | None] | None,
    labels: Sequence[np.ndarray | None] | None,
    crowd: Sequence[np.ndarray | None] | None,
    threads: int = 1,
) -> FramedLabels:
    """Labels of N images in their canvases.

    Args:
        sizes: Height and width of each source image.
        layout: Where the images go.
        masks: N arrays (H, W) uint8; an entry None gives all VOID. None: the batch has no masks.
        boxes: N arrays (B, 4) in source pixels; an entry None has no boxes. None: the batch has none.
        labels: N arrays (B,); needed with ``boxes``.
        crowd: N arrays (B,) bool; None or an entry None: no crowds.
        threads: Masks resized at the same time.
    """
    out_masks = None
    if masks is not None:
        out_masks = torch.full((len(sizes), *layout.canvas), VOID, dtype=torch.uint8)

        def paste(n: int) -> None:
            mask = masks[n]
            if mask is not None:
                _paste_nearest(
                    out_masks[n], torch.from_numpy(np.require(mask, requirements=["C", "W"])), layout.places[n]
                )

        _each(paste, len(sizes), threads)
    matrices = [box_ops.placement_matrix(size, place) for size, place in zip(sizes, layout.places, strict=True)]
    moved = _pad_boxes(boxes, labels, crowd, matrices, layout.canvas)
    return {
        "masks": out_masks,
        "boxes": moved[0],
        "labels": moved[1],
        "crowd": moved[2],
        "matrices": torch.stack(matrices).float() if matrices else torch.zeros(0, 3, 3),
        "sizes": torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
    }


def _canvas(sizes: Sequence[Size], input: InputSettings, train: bool, multiple: int) -> tuple[int, int]:
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


def _each(work: Callable[[int], None], count: int, threads: int) -> None:
    if threads > 1 and count > 1:
        list(pool(threads).map(work, range(count)))
    else:
        for n in range(count):
            work(n)


def _inside(place: Placement, canvas: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a canvas (H, W, ...) that a placement covers."""
    rows = slice(max(place.top, 0), min(place.top + place.height, canvas.shape[0]))
    return rows, slice(max(place.left, 0), min(place.left + place.width, canvas.shape[1]))


def _fill_around(canvas: Tensor, place: Placement, line: Tensor) -> None:
    """Write the (W, 3) ``line`` wherever a placement leaves the canvas (H, W, 3) bare."""
    rows, columns = _inside(place, canvas)
    canvas[: rows.start] = line
    canvas[rows.stop :] = line
    canvas[rows, : columns.start] = line[: columns.start]
    canvas[rows, columns.stop :] = line[columns.stop :]


def _paste(canvas: Tensor, image: Tensor, place: Placement, buffers: Buffers | None) -> None:
    """Write ``image`` (h, w, 3) into ``canvas`` (H, W, 3), resized to the placement and cut at the edges."""
    rows, columns = _inside(place, canvas)
    part = canvas[rows, columns]
    if image.shape[:2] == (place.height, place.width):
        part.copy_(image[_cut(rows, place.top), _cut(columns, place.left)])
        return
    whole = part.shape[:2] == (place.height, place.width)
    if whole and part.is_contiguous():
        _resize(image, part)
        return
    shape = place.height, place.width, 3
    resized = torch.from_numpy(np.empty(shape, np.uint8) if buffers is None else buffers.take(*shape))
    _resize(image, resized)
    part.copy_(resized[_cut(rows, place.top), _cut(columns, place.left)])


def _cut(inside: slice, start: int) -> slice:
    return slice(inside.start - start, inside.stop - start)


def _resize(image: Tensor, out: Tensor) -> None:
    """Bilinear with antialiasing from (h, w, 3) uint8 into ``out`` (H, W, 3), contiguous both.

    By the operator behind ``interpolate``, since that one always makes its result anew.
    """
    source, wanted = image.permute(2, 0, 1)[None], out.permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bilinear2d_aa.out(source, list(wanted.shape[2:]), False, out=wanted)


def _paste_nearest(canvas: Tensor, mask: Tensor, place: Placement) -> None:
    """Write ``mask`` (h, w) into ``canvas`` (H, W), resized to the placement and cut at the edges."""
    if mask.shape != (place.height, place.width):
        mask = interpolate(mask[None, None], (place.height, place.width), mode="nearest-exact")[0, 0]
    rows, columns = _inside(place, canvas)
    canvas[rows, columns] = mask[_cut(rows, place.top), _cut(columns, place.left)]


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
    each = list(zip(boxes, labels, [None] * len(boxes) if crowd is None else crowd, strict=True))
    counts = [0 if box is None or label is None else len(box) for box, label, _ in each]
    some = [n for n, count in enumerate(counts) if count]
    which = np.repeat(np.arange(len(each)), counts)
    # All of the batch at once: a loop over images holds the interpreter's lock, and with it the decoding threads.
    box = torch.from_numpy(_joined([each[n][0] for n in some], np.float64).reshape(-1, 4))
    if len(which):
        box = box_ops.transform_boxes(box[:, None], torch.stack(matrices)[which])[:, 0]
    label = _joined([each[n][1] for n in some], np.int64)
    many = _joined([np.zeros(counts[n], bool) if each[n][2] is None else each[n][2] for n in some], bool)
    seen = ((box[:, 2:] > 0).all(1) & (box[:, 0] < canvas[1]) & (box[:, 1] < canvas[0])).numpy()
    row = which[seen]
    left = np.bincount(row, minlength=len(each))
    place = np.arange(len(row)) - (np.cumsum(left) - left)[row]
    longest = max([1, *left.tolist()])
    out = torch.zeros(len(each), longest, 4)
    out_labels = torch.full((len(each), longest), -1, dtype=torch.int64)
    out_crowd = torch.zeros(len(each), longest, dtype=torch.bool)
    out[row, place] = box[seen].float()
    out_labels[row, place], out_crowd[row, place] = torch.from_numpy(label[seen]), torch.from_numpy(many[seen])
    return out, out_labels, out_crowd


def _joined(arrays: Sequence[np.ndarray | None], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *(np.asarray(array, kind).ravel() for array in arrays)])
