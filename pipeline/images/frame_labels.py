"""Labels of images in the canvases that the images were laid out in: masks, boxes, matrices."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from pipeline.images import affine
from pipeline.images.decode import Size
from pipeline.images.host_frames import in_threads, paste_nearest
from pipeline.images.layout import Layout
from pipeline.schema import VOID


class FramedLabels(TypedDict):
    """The fields of a Batch that framing makes, but for the images."""

    masks: Tensor | None
    boxes: Tensor | None
    labels: Tensor | None
    crowd: Tensor | None
    matrices: Tensor
    sizes: Tensor


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
                paste_nearest(
                    out_masks[n], torch.from_numpy(np.require(mask, requirements=["C", "W"])), layout.places[n]
                )

        in_threads(paste, len(sizes), threads)
    matrices = [affine.placement_matrix(size, place) for size, place in zip(sizes, layout.places, strict=True)]
    moved = _pad_boxes(boxes, labels, crowd, matrices, layout.canvas)
    return {
        "masks": out_masks,
        "boxes": moved[0],
        "labels": moved[1],
        "crowd": moved[2],
        "matrices": torch.stack(matrices).float() if matrices else torch.zeros(0, 3, 3),
        "sizes": torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
    }


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
        box = affine.transform_boxes(box[:, None], torch.stack(matrices)[which])[:, 0]
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
