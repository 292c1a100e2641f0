"""Plain JPEGs by libjpeg-turbo, without Pillow's way around it: the same pixels, sooner.

Everything that is not plain, and everything that the library refuses or doubts, is left to Pillow, whose verdict
counts. simplejpeg lets go of the interpreter's lock while it decodes.
"""

from typing import Final

import numpy as np
import simplejpeg

from pipeline.images.buffer_pool import Buffers
from pipeline.images.jpeg_markers import START_OF_IMAGE, count_scans

MIN_REDUCTION_MARGIN: Final = 1.5
"""An image is decoded at a reduced size that is at least this many times what is wanted of it: then resizing it further
differs from resizing the whole by 0.4 of 255 in the mean, with 1.0 by 0.8 (measured on photographs)."""
_REDUCTIONS: Final = (8, 4, 2)
"""What the inverse DCT can leave out at no cost (libjpeg-turbo, scaled decoding)."""
_COLOURS: Final = ("YCbCr", "Gray")
MAX_SCANS: Final = 100
"""A progressive JPEG has about ten; each takes the time of a whole image, so a small file can ask for minutes."""


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG of three colours or of grey; None: another kind of file, or a broken one."""
    if not data.startswith(START_OF_IMAGE) or count_scans(data) > MAX_SCANS:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (int(height), int(width)) if colours in _COLOURS else None


def reduction(size: tuple[int, int], target: tuple[int, int]) -> int:
    """1, 2, 4 or 8: by how much an image of ``size`` may be reduced while it is decoded.

    Args:
        size: Height and width.
        target: Height and width to which it will be resized.
    """
    for factor in _REDUCTIONS:
        if all(-(-full // factor) >= MIN_REDUCTION_MARGIN * small for full, small in zip(size, target, strict=True)):
            return factor
    return 1


def decode(data: bytes, size: tuple[int, int], factor: int = 1, buffers: Buffers | None = None) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB as the file has it, not turned; None: leave it to Pillow.

    Args:
        data: The file.
        size: Its ``plain_size``.
        factor: Its ``reduction``; H and W are those of the file divided by it, rounded up.
        buffers: Where the memory comes from.
    """
    height, width = (-(-length // factor) for length in size)
    buffer = None if buffers is None else buffers.take(height, width, 3)
    min_size = (0, 0) if factor == 1 else (height, width)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=min_size[0], min_width=min_size[1], buffer=buffer)
    except ValueError:  # truncated, or odd enough for a warning
        return None
    return pixels if pixels.shape == (height, width, 3) else None
