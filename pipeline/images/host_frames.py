"""Decoded images and masks into their canvases, on the CPU."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.images.affine import Placement
from pipeline.images.buffer_pool import Buffers
from pipeline.images.decode import Reduced, Size, pool
from pipeline.images.input_settings import InputSettings
from pipeline.images.layout import Layout, canvas_size, place_image, shown_size


class Paster:
    """Puts images into canvases of one size as they are decoded, in any order, from any thread.

    For frames whose size no image decides (``fits``); they are those of ``lay_out`` and ``paste_images``.

    Args:
        count: N images.
        input: The network's input.
        train: As for ``lay_out``.
        offsets: (N, 2), as for ``lay_out``.
        buffers: Where memory comes from.
    """

    def __init__(
        self,
        count: int,
        input: InputSettings,
        *,
        train: bool,
        offsets: np.ndarray | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        self.input, self.train, self.offsets, self.buffers = input, train, offsets, buffers
        self.canvas = canvas_size([], input, train, 1)
        self.frames = _empty((count, *self.canvas, 3), buffers)
        """(N, H, W, 3) uint8, not initialised where no image was put."""
        self._background = _background_row(input, self.canvas[1])

    @staticmethod
    def fits(input: InputSettings, train: bool) -> bool:
        """Whether all frames have one size, whatever the images."""
        return train or input.fit != "crop"

    def target_size(self, size: Size) -> Size:
        """Height and width to which an image of ``size`` is resized; its own with ``crop``."""
        return shown_size(size, self.input)

    def __call__(self, number: int, image: np.ndarray | Reduced) -> Reduced:
        """Put the image into its canvas; returns that (H, W, 3), and the image's size."""
        pixels, size = image if isinstance(image, Reduced) else (image, (image.shape[0], image.shape[1]))
        offset = None if self.offsets is None else self.offsets[number]
        place = place_image(size, self.canvas, self.input, self.train, offset)
        _place_on_background(self.frames[number], pixels, place, self._background, self.buffers)
        return Reduced(self.frames[number].numpy(), size)

    def images(self, rows: Sequence[int]) -> Tensor:
        """(n, 3, H, W) uint8 of those rows, channels last in memory."""
        whole = self.frames if len(rows) == len(self.frames) else self.frames[list(rows)]
        return whole.permute(0, 3, 1, 2)


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
    frames, background = _empty((len(images), *layout.canvas, 3), buffers), _background_row(input, layout.canvas[1])
    in_threads(
        lambda n: _place_on_background(frames[n], images[n], layout.places[n], background, buffers),
        len(images),
        threads,
    )
    return frames.permute(0, 3, 1, 2)


def paste_nearest(canvas: Tensor, mask: Tensor, place: Placement) -> None:
    """Write ``mask`` (h, w) into ``canvas`` (H, W), resized to the placement and cut at the edges."""
    if mask.shape != (place.height, place.width):
        mask = interpolate(mask[None, None], (place.height, place.width), mode="nearest-exact")[0, 0]
    rows, columns = _covered(place, canvas)
    canvas[rows, columns] = mask[_source_slice(rows, place.top), _source_slice(columns, place.left)]


def in_threads(work: Callable[[int], None], count: int, threads: int) -> None:
    """``work`` of 0 to ``count`` - 1."""
    if threads > 1 and count > 1:
        list(pool(threads).map(work, range(count)))
    else:
        for n in range(count):
            work(n)


def _empty(shape: tuple[int, ...], buffers: Buffers | None) -> Tensor:
    return torch.from_numpy(np.empty(shape, np.uint8) if buffers is None else buffers.take(*shape))


def _background_row(input: InputSettings, width: int) -> Tensor:
    """(W, 3) of the mean colour."""
    return torch.tensor([round(255 * value) for value in input.mean], dtype=torch.uint8).repeat(width).view(-1, 3)


def _place_on_background(
    out: Tensor, pixels: np.ndarray, place: Placement, line: Tensor, buffers: Buffers | None
) -> None:
    image = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
    _fill_around(out, place, line)
    _paste(out, image, place, buffers)


def _covered(place: Placement, canvas: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a canvas (H, W, ...) that a placement covers."""
    rows = slice(max(place.top, 0), min(place.top + place.height, canvas.shape[0]))
    return rows, slice(max(place.left, 0), min(place.left + place.width, canvas.shape[1]))


def _fill_around(canvas: Tensor, place: Placement, background: Tensor) -> None:
    """Write the (W, 3) ``line`` wherever a placement leaves the canvas (H, W, 3) bare."""
    rows, columns = _covered(place, canvas)
    if (rows.start, columns.start, rows.stop, columns.stop) == (0, 0, *canvas.shape[:2]):
        return
    canvas[: rows.start] = background
    canvas[rows.stop :] = background
    canvas[rows, : columns.start] = background[: columns.start]
    canvas[rows, columns.stop :] = background[columns.stop :]


def _paste(canvas: Tensor, image: Tensor, place: Placement, buffers: Buffers | None) -> None:
    """Write ``image`` (h, w, 3) into ``canvas`` (H, W, 3), resized to the placement and cut at the edges."""
    rows, columns = _covered(place, canvas)
    target = canvas[rows, columns]
    if image.shape[:2] == (place.height, place.width):
        target.copy_(image[_source_slice(rows, place.top), _source_slice(columns, place.left)])
        return
    whole = target.shape[:2] == (place.height, place.width)
    if whole and target.is_contiguous():
        _resize(image, target)
        return
    resized = _empty((place.height, place.width, 3), buffers)
    _resize(image, resized)
    target.copy_(resized[_source_slice(rows, place.top), _source_slice(columns, place.left)])


def _source_slice(inside: slice, start: int) -> slice:
    return slice(inside.start - start, inside.stop - start)


def _resize(image: Tensor, out: Tensor) -> None:
    """Bilinear with antialiasing from (h, w, 3) uint8 into ``out`` (H, W, 3), contiguous both.

    By the operator behind ``interpolate``, since that one always makes its result anew.
    """
    source, target = image.permute(2, 0, 1)[None], out.permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bilinear2d_aa.out(source, list(target.shape[2:]), False, out=target)
