"""JPEGs decoded on a GPU (nvJPEG, through torchvision), and what it cannot do on the host's threads."""

import logging
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.images.decode import MAX_BYTES, MAX_PIXELS, DecodeError, Reduced, decode_many
from pipeline.images.jpeg_markers import (
    APP1,
    APP2,
    APP14,
    BASELINE_FRAME,
    END_OF_IMAGE,
    EXIF_HEADER,
    START_OF_IMAGE,
    START_OF_SCAN,
    TABLES,
    XMP_ORIENTATION,
    exif_orientation,
    header_segments,
)

log = logging.getLogger(__name__)

Pixels = Tensor | np.ndarray
"""(3, H, W) uint8 on the device, or (H, W, 3) uint8 on the host."""

_SAMPLINGS = frozenset({0x11, 0x21, 0x22, 0x12})
"""4:4:4, 4:2:2, 4:2:0 and 4:4:0."""
_TRAILER_BYTES = 64
"""Within so many last bytes the end marker must stand."""
_TRUSTED_FAILURES = 4
"""Files of which all may be bad; of more, a decoder that takes none does not work here."""


def baseline_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that every decoder reads alike; None: leave it to the host.

    That is (ITU-T T.81): baseline, 8 bit, three components in YCbCr (so JFIF, or Adobe's transform 1) in one scan,
    ordinary chroma sampling, upright by its EXIF orientation, one picture in the file, and its end marker there.
    """
    ends = data.rfind(END_OF_IMAGE, len(data) - _TRAILER_BYTES) >= 0
    if not data.startswith(START_OF_IMAGE) or len(data) > MAX_BYTES or not ends:
        return None
    size = None
    for marker, _, payload in header_segments(data):
        if marker == BASELINE_FRAME:
            size = _frame_size(payload)
        elif marker == START_OF_SCAN:
            # One scan of all three components: what is called non-interleaved has a scan for each.
            return size if payload[:1] == b"\x03" else None
        elif marker not in TABLES or _changes_colours_or_place(marker, payload):
            return None
    return None


def _frame_size(payload: bytes) -> tuple[int, int] | None:
    """Of a baseline frame header (T.81, B.2.2), if it is of the plain kind."""
    if len(payload) != 15 or payload[0] != 8 or payload[5] != 3:
        return None
    height, width = int.from_bytes(payload[1:3], "big"), int.from_bytes(payload[3:5], "big")
    names = payload[6], payload[9], payload[12]
    chroma = payload[10] == payload[13] == 0x11
    if names not in ((1, 2, 3), (0, 1, 2)) or payload[7] not in _SAMPLINGS or not chroma:
        return None
    return (height, width) if 0 < height * width <= MAX_PIXELS else None


def _changes_colours_or_place(marker: int, payload: bytes) -> bool:
    """Whether application data says that the pixels are not simply upright YCbCr of one picture."""
    if marker == APP14 and payload.startswith(b"Adobe"):
        return payload[11:12] != b"\x01"
    if marker == APP2:
        return payload.startswith(b"MPF\0")
    if marker != APP1:
        return False
    # EXIF, or else XMP, where Pillow looks too.
    turned = payload.startswith(EXIF_HEADER) and exif_orientation(payload[len(EXIF_HEADER) :]) != 1
    return turned or XMP_ORIENTATION in payload


class DeviceDecoder:
    """Decodes many files at a time on one device; what it cannot, and what fails there, on the host."""

    def __init__(self, device: torch.device | str, threads: int = 1) -> None:
        """``threads``: of the host, for the rest."""
        self.device, self.threads = torch.device(device), threads
        self._works = True

    def __call__(self, items: Sequence[bytes | None]) -> list[Pixels | DecodeError]:
        """As ``decode.decode_many``, in order; the host's verdict counts for what the device refused."""
        images: list[Pixels | DecodeError | None] = [None] * len(items)
        sizes = [None if item is None or not self._works else baseline_size(item) for item in items]
        baseline = [n for n, size in enumerate(sizes) if size is not None]
        decoded = self._decode_on_device([items[n] for n in baseline])  # type: ignore[misc]
        for n, image in zip(baseline, decoded, strict=True):
            if image is not None and tuple(image.shape) == (3, *sizes[n]):  # type: ignore[misc]
                images[n] = image
        rest = [n for n, image in enumerate(images) if image is None]
        for n, image in zip(rest, decode_many([items[n] for n in rest], self.threads), strict=True):
            assert not isinstance(image, Reduced), "nobody asked for less than the whole"
            images[n] = image
        self._give_up_if_useless([images[n] for n in baseline])
        return images  # type: ignore[return-value]

    def _decode_on_device(self, files: list[bytes]) -> list[Tensor | None]:
        """None in the place of what the device refused: it gives all or nothing, so halves are tried."""
        if not files:
            return []
        from torchvision.io import ImageReadMode, decode_jpeg  # a second to import, for nothing without a GPU

        # Deprecated in favour of a package that has no such function for torch 2.11. Not by ``catch_warnings``,
        # which is not safe in threads; asked for anew each time, since test runners reset the filters.
        warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)
        try:
            tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
            return list(decode_jpeg(tensors, mode=ImageReadMode.RGB, device=self.device))
        except RuntimeError:
            if len(files) == 1:
                return [None]
            half = len(files) // 2
            return self._decode_on_device(files[:half]) + self._decode_on_device(files[half:])

    def _give_up_if_useless(self, images: list[Pixels | DecodeError | None]) -> None:
        """Give the device up, with one warning, if it took none of many files that the host could read."""
        if self._works and len(images) > _TRUSTED_FAILURES and all(isinstance(image, np.ndarray) for image in images):
            self._works = False
            log.warning(
                "%s decodes no JPEGs here (none of %d, all of which the host decoded): decoding goes on, "
                "slower, on the host; set stream.decode to host to be rid of this message",
                self.device, len(images),
            )  # fmt: skip
