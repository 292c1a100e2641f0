"""What a JPEG file says of itself, read in one place: its markers, and the EXIF orientation in them.

Sources: ITU-T T.81, annex B (markers), and CIPA DC-008 (EXIF, a TIFF directory inside an APP1 segment).
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

START_OF_IMAGE: Final = b"\xff\xd8"
END_OF_IMAGE: Final = b"\xff\xd9"
BASELINE_FRAME: Final = 0xC0
START_OF_SCAN: Final = 0xDA
APP1: Final = 0xE1
"""EXIF and XMP."""
APP2: Final = 0xE2
"""The index of a file that holds several pictures, among others."""
APP14: Final = 0xEE
"""Adobe's note on the colours."""
TABLES: Final = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Huffman and quantisation tables, restart interval, comment, application data."""

EXIF_HEADER: Final = b"Exif\0\0"
XMP_ORIENTATION: Final = b"tiff:Orientation"
ORIENTATION_TAG: Final = 0x0112
"""EXIF's number for the orientation."""

_FILL_BYTE: Final = 0xFF
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD8)})
_BYTE_ORDERS: Final = {b"II*\0": "little", b"MM\0*": "big"}


class Segment(NamedTuple):
    """One marker segment of a file's header."""

    marker: int
    start: int
    """Where its 0xFF lies in the file."""
    payload: bytes
    """What follows marker and length; shorter than announced where the file ends."""


def header_segments(data: bytes) -> Iterator[Segment]:
    """The segments from the start of the file to the header of its first scan, that one included.

    Ends early where the file does, or where something else than a marker follows a segment.
    """
    at = len(START_OF_IMAGE)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        # Any number of fill bytes may stand before a marker (T.81, B.1.1.2), and some markers stand alone.
        if marker == _FILL_BYTE:
            at += 1
            continue
        if marker in _WITHOUT_LENGTH:
            at += 2
            continue
        # The length counts its own two bytes. A hostile one below 2 gives an empty payload.
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        payload = data[at + 4 : at + 2 + length]
        yield Segment(marker, at, payload)
        if marker == START_OF_SCAN:
            return
        at += 4 + len(payload)


def first_scan(data: bytes) -> int:
    """Where the first scan begins, behind all that a file says of itself; the file's length where none is found."""
    return next((part.start for part in header_segments(data) if part.marker == START_OF_SCAN), len(data))


def count_scans(data: bytes) -> int:
    """Passes over the image that a JPEG asks for; the marker cannot occur in compressed data (T.81, B.1.1.5)."""
    return data.count(bytes([0xFF, START_OF_SCAN]))


def may_be_turned(data: bytes) -> bool:
    """Whether the file may hold an EXIF orientation, in EXIF or in XMP."""
    end = first_scan(data)
    return any(data.find(word, 0, end) >= 0 for word in (EXIF_HEADER, XMP_ORIENTATION))


def exif_orientation(tiff: bytes) -> int:
    """EXIF orientation out of a TIFF header and its first directory; 1 where there is none, 0 where it is odd.

    Args:
        tiff: An EXIF segment's payload behind ``EXIF_HEADER``.
    """
    order = _BYTE_ORDERS.get(tiff[:4])
    if order is None:
        return 0

    def number(at: int, length: int) -> int:
        return int.from_bytes(tiff[at : at + length], order)  # type: ignore[arg-type]

    # The header says where the first directory is: a count, then entries of 12 bytes (tag, type, count, value).
    directory = number(4, 4)
    entries = [directory + 2 + 12 * n for n in range(number(directory, 2))]
    if entries and entries[-1] + 12 > len(tiff):
        return 0
    return next((number(entry + 8, 2) for entry in entries if number(entry, 2) == ORIENTATION_TAG), 1)
