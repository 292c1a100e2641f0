"""Encoded bytes -> upright RGB uint8: one function for everybody, with limits on hostile files."""

import io
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import one_line
from pipeline.images import jpeg
from pipeline.images.buffer_pool import Buffers
from pipeline.images.jpeg_markers import ORIENTATION_TAG, START_OF_IMAGE, count_scans, may_be_turned

IMAGE_SUFFIXES: tuple[str, ...] = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"
)  # fmt: skip
MAX_BYTES = 256 * 2**20
"""Largest encoded image."""
MAX_PIXELS = 100_000_000
"""Largest image; below the size at which Pillow itself refuses (2 x 89 million)."""

_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")
"""Only what images are kept in: Pillow would also run Ghostscript on an EPS. JPEG includes MPO."""
_SLICE_IMAGES = 8
"""Images that a thread takes at once."""


class DecodeError(ValueError):
    """An image that cannot be used. ``reason`` is a word of ``schema.STATUSES``; ``str`` gives the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class ImageInfo:
    """Size of the upright image in pixels, and the EXIF orientation (1 to 8) that makes it upright."""

    height: int
    width: int
    orientation: int = 1


Size = tuple[int, int]
"""Height and width in pixels."""


class Reduced(NamedTuple):
    """An image decoded at a fraction of its size."""

    pixels: np.ndarray
    """(h, w, 3) uint8, upright."""
    size: Size
    """Of the whole upright image."""


def probe(data: bytes) -> ImageInfo:
    """Size and orientation from the header alone.

    Raises:
        DecodeError: No image, of no supported format, or beyond the limits.
    """
    return _image_info(_open(data))


def decode(data: bytes) -> np.ndarray:
    """The upright image as (H, W, 3) uint8 RGB, writable and contiguous.

    Grey is repeated, palettes are looked up, alpha is dropped (the colours stay as stored; nothing is
    composited), CMYK, YCbCr and Lab are converted, 16 bits become 8 by x / 257 rounded. Of several frames
    the first is taken. EXIF orientation is applied here and nowhere else.

    Raises:
        DecodeError: Corrupt, truncated, unsupported, or beyond the limits.
    """
    plain_jpeg = _decode_plain_jpeg(data, None, None)
    return _decode_by_pillow(data) if plain_jpeg is None else plain_jpeg.pixels


def _decode_plain_jpeg(
    data: bytes, target_size: Callable[[Size], Size] | None, buffers: Buffers | None
) -> Reduced | None:
    """The image by libjpeg-turbo, upright; None: the file is for Pillow.

    Args:
        data: The file.
        target_size: As for ``decode_many``; None decodes the whole.
        buffers: Where the memory comes from.
    """
    size = jpeg.plain_size(data) if len(data) <= MAX_BYTES else None
    if size is None or size[0] * size[1] > MAX_PIXELS:
        return None
    orientation = _image_info(_open(data)).orientation if may_be_turned(data) else 1
    upright = size if orientation < 5 else (size[1], size[0])
    factor = 1 if target_size is None else jpeg.reduction(upright, target_size(upright))
    pixels = jpeg.decode(data, size, factor, buffers)
    if pixels is None:
        return None
    return Reduced(np.ascontiguousarray(apply_orientation(pixels, orientation)), upright)


def _decode_by_pillow(data: bytes) -> np.ndarray:
    image = _open(data)
    orientation = _image_info(image).orientation
    try:
        pixels = _rgb(image)
    except DecodeError:
        raise
    except MemoryError:  # perhaps no fault of the image
        raise DecodeError("error", "MemoryError: the decoded image does not fit into this process's memory") from None
    except Exception as error:  # hostile bytes make decoders raise almost anything
        raise DecodeError("corrupt", f"image cannot be decoded: {one_line(error)}") from None
    return np.ascontiguousarray(apply_orientation(pixels, orientation))


def decode_many(
    items: Sequence[bytes | None],
    threads: int,
    target_size: Callable[[Size], Size] | None = None,
    buffers: Buffers | None = None,
    then: Callable[[int, np.ndarray | Reduced], Reduced] | None = None,
) -> list[np.ndarray | Reduced | DecodeError]:
    """``decode`` of each item, in order; a failure takes the place of its image. None is "missing".

    Args:
        items: Encoded images.
        threads: Images decoded at a time.
        target_size: Size of an upright image -> the size to which it will be resized. A JPEG much larger than that is
            decoded at 1/2, 1/4 or 1/8 of its size, and comes as ``Reduced``.
        buffers: Where the memory of JPEGs comes from.
        then: Given an item's number and image, in the thread that decoded it and while it is in that core's cache;
            what it returns takes the image's place.
    """

    def decode_one(number: int) -> np.ndarray | Reduced | DecodeError:
        data = items[number]
        try:
            if data is None:
                return DecodeError("missing", "no image bytes")
            plain_jpeg = _decode_plain_jpeg(data, target_size, buffers)
            image = _decode_by_pillow(data) if plain_jpeg is None else plain_jpeg
        except DecodeError as error:
            return error
        if isinstance(image, Reduced) and image.pixels.shape[:2] == image.size:
            image = image.pixels
        return image if then is None else then(number, image)

    count = len(items)
    if threads <= 1 or count <= 1:
        return [decode_one(number) for number in range(count)]
    # Some at a time: handing over a single one costs a twentieth of decoding it.
    step = max(1, min(_SLICE_IMAGES, count // (2 * threads)))
    slices = [range(start, min(start + step, count)) for start in range(0, count, step)]
    return [
        item
        for part in pool(threads).map(lambda part: [decode_one(number) for number in part], slices)
        for item in part
    ]


def pool(threads: int) -> ThreadPoolExecutor:
    """Threads of this process for pixels, made once."""
    return _pool(threads, os.getpid())


@lru_cache(maxsize=8)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "pixels")


def decode_map(data: bytes) -> np.ndarray:
    """A label image as stored; nothing is scaled or turned.

    Returns:
        (H, W) integers for grey, palette (the indices) and 1-bit (0 and 1) files, else (H, W, 3) uint8 RGB.

    Raises:
        DecodeError: As ``decode``.
    """
    image = _open(data)
    try:
        if image.mode == "LA":
            image = image.getchannel("L")
        if image.mode in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N"):
            pixels = np.array(image)
            return pixels.astype(np.uint8) if pixels.dtype == bool else pixels
        return np.array(image.convert("RGB"))
    except Exception as error:  # as in decode
        raise DecodeError("corrupt", f"label image cannot be decoded: {one_line(error)}") from None


def _open(data: bytes) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise DecodeError("error", f"image file has {len(data)} bytes; at most {MAX_BYTES} are read")
    if data.startswith(START_OF_IMAGE) and (num_scans := count_scans(data)) > jpeg.MAX_SCANS:
        raise DecodeError("error", f"JPEG of {num_scans} scans; at most {jpeg.MAX_SCANS} are decoded")
    _silence_pillow()
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        fault = "empty file" if not data else "not an image of a supported format"
        raise DecodeError("corrupt", fault) from None
    except Image.DecompressionBombError:
        raise DecodeError("error", f"image has more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # as in decode
        raise DecodeError("corrupt", f"image header cannot be read: {one_line(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        found_size = f"{image.width}x{image.height}"
        raise DecodeError("error", f"image of {found_size} has more than {MAX_PIXELS} pixels")
    return image


def _silence_pillow() -> None:
    """Ignore warnings raised in Pillow (doubtful EXIF, odd files): the outcome is reported per image.

    Not by ``catch_warnings``, which is not safe in threads. Asked for anew each time, since whoever resets
    the filters (a test runner) would turn a harmless warning into a corrupt image.
    """
    newest = warnings.filters[0] if warnings.filters else None
    if newest is None or newest[0] != "ignore" or getattr(newest[3], "pattern", None) != _PILLOW:
        warnings.filterwarnings("ignore", module=_PILLOW)


_PILLOW = r"PIL\."


def _image_info(image: Image.Image) -> ImageInfo:
    try:
        # The base method: PNG's own reads the whole file first, in search of a trailing EXIF chunk.
        orientation = int(Image.Image.getexif(image).get(ORIENTATION_TAG, 1))
    except Exception:  # broken EXIF is no reason to lose the image; then it counts as upright
        orientation = 1
    orientation = orientation if 1 <= orientation <= 8 else 1
    size = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
    return ImageInfo(*size, orientation)


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, not yet turned."""
    if image.mode == "RGB":
        return np.array(image)
    if image.mode.startswith("I"):
        values = np.array(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DecodeError("error", "grey values beyond 16 bits are not supported")
        grey = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise DecodeError("error", "floating-point images are not supported; convert to 8 or 16 bits")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB, Pillow paints transparent entries its own way
    return np.array(image.convert("RGB"))


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientation (CIPA DC-008, tag 0x0112): how row 0 and column 0 of the file are seen."""
    if orientation in (2, 7):
        pixels = pixels[:, ::-1] if orientation == 2 else pixels[::-1, ::-1].swapaxes(0, 1)
    elif orientation == 3:
        pixels = pixels[::-1, ::-1]
    elif orientation == 4:
        pixels = pixels[::-1]
    elif orientation == 5:
        pixels = pixels.swapaxes(0, 1)
    elif orientation == 6:
        pixels = pixels[::-1].swapaxes(0, 1)
    elif orientation == 8:
        pixels = pixels[:, ::-1].swapaxes(0, 1)
    return pixels
