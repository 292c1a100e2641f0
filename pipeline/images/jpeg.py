"""Plain JPEGs by libjpeg-turbo, without Pillow's way around it: the same pixels, sooner.

Everything that is not plain, and everything that the library refuses or doubts, is left to Pillow, whose verdict
counts. simplejpeg lets go of the interpreter's lock while it decodes.
"""

from typing import Final

import numpy as np
import simplejpeg

from pipeline.images.buffer_pool import Buffers

GAP: Final = 1.5
"""An image is decoded at a reduced size that is at least this many times what is wanted of it: then resizing it further
differs from resizing the whole by 0.4 of 255 in the mean, with 1.0 by 0.8 (measured on photographs)."""
_REDUCTIONS: Final = (8, 4, 2)
"""What the inverse DCT can leave out at no cost (libjpeg-turbo, scaled decoding)."""
_COLOURS: Final = ("YCbCr", "Gray")
_TURNED: Final = (b"Exif\0\0", b"tiff:Orientation")
"""Where a file may say that it is not upright."""
_START_OF_SCAN: Final = 0xDA
MAX_SCANS: Final = 100
"""A progressive JPEG has about ten; each takes the time of a whole image, so a small file can ask for minutes."""


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG of three colours or of grey; None: another kind of file, or a broken one."""
    if data[:2] != b"\xff\xd8" or scans(data) > MAX_SCANS:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (int(height), int(width)) if colours in _COLOURS else None


def scans(data: bytes) -> int:
    """Passes over the image that a JPEG asks for; the marker cannot occur in compressed data (ITU T.81, B.1.1.5)."""
    return data.count(b"\xff\xda")


def may_be_turned(data: bytes) -> bool:
    """Whether the file may hold an EXIF orientation, in EXIF or in XMP."""
    end = _scan(data)
    return any(data.find(word, 0, end) >= 0 for word in _TURNED)


def _scan(data: bytes) -> int:
    """Where the first scan begins, behind all that a file says of itself (ITU T.81, B.1); its length, if it is odd."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == _START_OF_SCAN:
            return at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return len(data)


def reduction(size: tuple[int, int], wanted: tuple[int, int]) -> int:
    """1, 2, 4 or 8: by how much an image of ``size`` may be reduced while it is decoded.

    Args:
        size: Height and width.
        wanted: Height and width to which it will be resized.
    """
    for factor in _REDUCTIONS:
        if all(-(-full // factor) >= GAP * small for full, small in zip(size, wanted, strict=True)):
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
    memory = None if buffers is None else buffers.take(height, width, 3)
    least = (0, 0) if factor == 1 else (height, width)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], buffer=memory)
    except ValueError:  # truncated, or odd enough for a warning
        return None
    return pixels if pixels.shape == (height, width, 3) else None
