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
    padded = _pad_boxes(boxes, labels, crowd, matrices, layout.canvas)
    return {
        "masks": out_masks,
        "boxes": padded[0],
        "labels": padded[1],
        "crowd": padded[2],
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
    labelled = list(zip(boxes, labels, [None] * len(boxes) if crowd is None else crowd, strict=True))
    counts = [0 if moved is None or classes is None else len(moved) for moved, classes, _ in labelled]
    boxed_rows = [n for n, count in enumerate(counts) if count]
    row_of_box = np.repeat(np.arange(len(labelled)), counts)
    # All of the batch at once: a loop over images holds the interpreter's lock, and with it the decoding threads.
    moved = torch.from_numpy(_concatenated([labelled[n][0] for n in boxed_rows], np.float64).reshape(-1, 4))
    if len(row_of_box):
        moved = affine.transform_boxes(moved[:, None], torch.stack(matrices)[row_of_box])[:, 0]
    classes = _concatenated([labelled[n][1] for n in boxed_rows], np.int64)
    is_crowd = _concatenated(
        [np.zeros(counts[n], bool) if labelled[n][2] is None else labelled[n][2] for n in boxed_rows], bool
    )
    in_canvas = ((moved[:, 2:] > 0).all(1) & (moved[:, 0] < canvas[1]) & (moved[:, 1] < canvas[0])).numpy()
    row = row_of_box[in_canvas]
    num_kept = np.bincount(row, minlength=len(labelled))
    column = np.arange(len(row)) - (np.cumsum(num_kept) - num_kept)[row]
    longest = max([1, *num_kept.tolist()])
    out_boxes = torch.zeros(len(labelled), longest, 4)
    out_labels = torch.full((len(labelled), longest), -1, dtype=torch.int64)
    out_crowd = torch.zeros(len(labelled), longest, dtype=torch.bool)
    out_boxes[row, column] = moved[in_canvas].float()
    out_labels[row, column], out_crowd[row, column] = (
        torch.from_numpy(classes[in_canvas]),
        torch.from_numpy(is_crowd[in_canvas]),
    )
    return out_boxes, out_labels, out_crowd


def _concatenated(arrays: Sequence[np.ndarray | None], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *(np.asarray(array, kind).ravel() for array in arrays)])
