"""Where images go in the canvas that the network sees."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.images import affine
from pipeline.images.affine import Placement
from pipeline.images.decode import Size
from pipeline.images.input_settings import InputSettings


class Layout(NamedTuple):
    """Where each of N images goes, and in what canvas."""

    canvas: Size
    places: list[Placement]


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
    canvas = canvas_size(sizes, input, train, multiple)
    places = [
        place_image(size, canvas, input, train, None if offsets is None else offsets[n]) for n, size in enumerate(sizes)
    ]
    return Layout(canvas, places)


def shown_size(size: Size, input: InputSettings) -> Size:
    """Height and width to which an image of ``size`` is resized; its own with ``crop``."""
    place = place_image(size, input.size, input, False, None)
    return place.height, place.width


def canvas_size(sizes: Sequence[Size], input: InputSettings, train: bool, multiple: int) -> tuple[int, int]:
    """Height and width of the canvas for images of these sizes."""
    if input.fit != "crop":
        return input.size
    if train:
        # An even margin: the centre is cut out by whole pixels, so an image that nothing moves stays exact.
        return input.size[0] + 2 * -(-input.size[0] // 4), input.size[1] + 2 * -(-input.size[1] // 4)
    largest = [max((size[axis] for size in sizes), default=input.size[axis]) for axis in (0, 1)]
    return -(-largest[0] // multiple) * multiple, -(-largest[1] // multiple) * multiple


def place_image(
    size: tuple[int, int],
    canvas: tuple[int, int],
    input: InputSettings,
    train: bool,
    offset: np.ndarray | None,
) -> Placement:
    """Where one image goes; ``offset`` as for ``lay_out``."""
    if input.fit == "letterbox":
        return affine.letterbox_placement(size, canvas)
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
