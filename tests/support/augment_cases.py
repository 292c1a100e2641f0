"""Small batches for the tests of augmentation."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import AugmentSettings, crop_offsets
from pipeline.augment.pixels import resample, sampling_grid
from pipeline.images import affine
from pipeline.images.batch import Batch
from pipeline.images.frame_labels import FramedLabels, frame_labels
from pipeline.images.host_frames import paste_images
from pipeline.images.input_settings import InputSettings
from pipeline.images.layout import lay_out

EVERYTHING = AugmentSettings(
    hflip=0.5, vflip=0.5, quarter_turns=0.5, rotate=25, translate=0.1, scale=(0.7, 1.4), shear=8,
    brightness=0.1, contrast=0.2, saturation=0.3, hue=0.1, blur=0.5, noise=0.5, erase=0.5,
)  # fmt: skip


class Frame(FramedLabels):
    """The fields of a Batch that framing makes."""

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
    """N decoded images of any size in one canvas, with their labels, by the steps that collating takes."""
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    layout = lay_out(sizes, input, train=train, offsets=offsets, multiple=multiple)
    labels_in_canvas = frame_labels(sizes, layout, masks, boxes, labels, crowd, threads)
    return {"images": paste_images(images, layout, input, threads), **labels_in_canvas}


def letterbox(size: tuple[int, int], target: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """3x3 float64 matrix from an image of ``size`` (H, W) to a letterboxed canvas ``target`` (H, W); its inverse."""
    matrix = affine.placement_matrix(size, affine.letterbox_placement(size, target))
    return matrix, affine.invert_affine(matrix)


def warp(images: Tensor, masks: Tensor | None, matrices: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Images (N, 3, H, W) float32 and masks (N, H, W) moved by (N, 3, 3) matrices, canvas -> output of ``size``."""
    theta = affine.sampling_theta(affine.invert_affine(matrices), (images.shape[-2], images.shape[-1]), size)
    return resample(images, masks, sampling_grid(theta.float(), size))


def smooth_images(count: int, height: int, width: int, seed: int = 0) -> list[np.ndarray]:
    """uint8 pictures without sharp edges and with values well inside 0..255."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    out = []
    for _ in range(count):
        phases = random.uniform(0, 6, (3, 2))
        planes = [128 + 60 * np.sin(x / 7 + a) * np.cos(y / 9 + b) for a, b in phases]
        out.append(np.stack(planes, -1).astype(np.uint8))
    return out


def make_batch(
    count: int = 6, size: tuple[int, int] = (40, 40), fit: str = "letterbox", seed: int = 0, image_hw=None
) -> tuple[Batch, InputSettings]:
    """A training batch of smooth images, random masks and two boxes each, one of them a crowd."""
    height, width = image_hw or size
    random = np.random.default_rng(seed)
    given_boxes = []
    for _ in range(count):
        points = np.sort(random.uniform(2, min(height, width) - 2, (2, 2, 2)), axis=1)
        given_boxes.append(points.reshape(2, 4))
    masks = [random.integers(0, 5, (height, width)).astype(np.uint8) for _ in range(count)]
    input = InputSettings.parse({"size": size, "fit": fit}, "test")
    crowd = [np.array([False, True])] * count
    labels, offsets = [np.array([1, 2])] * count, crop_offsets(seed, np.zeros(count), np.arange(count))
    images = smooth_images(count, height, width, seed)
    return batch_of(frame(images, masks, given_boxes, labels, crowd, input, train=True, offsets=offsets)), input


def painted_batch(
    count: int, size: tuple[int, int], fit: str, seed: int
) -> tuple[Batch, InputSettings, dict[int, Tensor]]:
    """Images of different shapes, no one resized, with rectangles of one colour each at whole pixels.

    The class id in the mask, the label of the box and the colour (by the returned table) tell each apart.
    """
    random = np.random.default_rng(seed)
    input = InputSettings.parse({"size": size, "fit": fit}, "test")
    images, masks, boxes, labels, colours = [], [], [], [], {}
    for n in range(count):
        height, width = size
        if fit == "crop":
            height, width = height + int(random.integers(0, 40)), width + int(random.integers(0, 40))
        elif n % 3 == 1:
            height = int(random.integers(height // 2, height))
        elif n % 3 == 2:
            width = int(random.integers(width // 2, width))
        image, mask = np.full((height, width, 3), 100 + n, np.uint8), np.zeros((height, width), np.uint8)
        each = []
        for k, (row, column) in enumerate((r, c) for r in (0, 1) for c in (0, 1)):
            half = np.array([width // 2, height // 2])
            ends = np.sort(random.choice(min(half), (2, 2)), axis=0) + half * [column, row]
            x1, y1, x2, y2 = *ends[0], *(ends[1] + 1)
            label = 4 * n + k + 1
            colours[label] = torch.tensor(random.choice([0, 60, 180, 240], 3)).float()
            image[y1:y2, x1:x2], mask[y1:y2, x1:x2] = colours[label].numpy(), label
            each.append([x1, y1, x2, y2])
        images.append(image)
        masks.append(mask)
        boxes.append(np.array(each, np.float64))
        labels.append(np.arange(4 * n + 1, 4 * n + 5))
    offsets = crop_offsets(seed, np.zeros(count), np.arange(count))
    return (
        batch_of(frame(images, masks, boxes, labels, None, input, train=True, offsets=offsets)),
        input,
        colours,
    )


def values_of(drawn: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in drawn.items()}


def unit(batch: Batch, input: InputSettings) -> Tensor:
    """Normalised images back on the 0..1 scale."""
    mean, std = torch.tensor(input.mean)[:, None, None], torch.tensor(input.std)[:, None, None]
    return batch.images * std + mean


def rows(batch: Batch, index: list[int]) -> Batch:
    changed = {
        field.name: value[index]
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return dataclasses.replace(batch, image_ids=[batch.image_ids[n] for n in index], **changed)


def present(tensor: Tensor | None) -> Tensor:
    """A label tensor that this batch is known to have."""
    assert tensor is not None
    return tensor


def batch_of(parts: Frame, positions: list[int] | None = None) -> Batch:
    """A batch of framed images in epoch 0."""
    count = len(parts["images"])
    keys = torch.arange(count) if positions is None else torch.tensor(positions)
    ids = [f"{n}.png" for n in range(count)]
    return Batch(ids, epochs=torch.zeros(count, dtype=torch.int64), positions=keys, **parts)
