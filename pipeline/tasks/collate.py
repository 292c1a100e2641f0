"""Rows of a table -> the pixels of those that can be used, and the reason of each that cannot."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.images.buffer_pool import Buffers
from pipeline.images.decode import DecodeError, Reduced

FRAME, FAULT = "frame", "fault"
"""Columns of rows that were framed elsewhere: canvas height x width x 3 bytes; null or "reason: detail"."""

Failure = tuple[int, str, str]
"""Row of the table, reason (a word of ``schema.STATUSES``), detail."""
Size = tuple[int, int]


class Usable(NamedTuple):
    """The rows of a table that have an image."""

    rows: list[int]
    """Their numbers."""
    images: list[Any]
    """Of each: (H, W, 3) uint8 array, perhaps of a fraction of its size; or (3, H, W) uint8 tensor on a device."""
    sizes: list[Size]
    """Of each: height and width of the upright source image."""
    failures: list[Failure]
    """The other rows."""


def size_of(image: np.ndarray | Tensor) -> Size:
    """Height and width."""
    shape = image.shape[1:] if isinstance(image, Tensor) else image.shape[:2]
    return shape[0], shape[1]


def usable(decoded: Sequence[np.ndarray | Reduced | Tensor | DecodeError], stored: Sequence[Size | None]) -> Usable:
    """Sort out what could not be decoded, or has another size than the one that its labels are for (None: any)."""
    out = Usable([], [], [], [])
    for row, (item, size) in enumerate(zip(decoded, stored, strict=True)):
        if isinstance(item, DecodeError):
            out.failures.append((row, item.reason, str(item)))
            continue
        found = item.size if isinstance(item, Reduced) else size_of(item)
        if size is not None and found != size:
            text = f"decodes to {found[0]}x{found[1]}, its labels are for {size[0]}x{size[1]}"
            out.failures.append((row, "corrupt", text))
            continue
        out.rows.append(row)
        out.images.append(item.pixels if isinstance(item, Reduced) else item)
        out.sizes.append(found)
    return out


def stored_sizes(table: pa.Table) -> list[Size | None]:
    """Height and width of every row, where the table has them."""
    if "height" not in table.column_names or "width" not in table.column_names:
        return [None] * table.num_rows
    pairs = zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
    return [None if height is None or width is None else (height, width) for height, width in pairs]


def framed_rows(table: pa.Table) -> Usable:
    """The rows that were framed elsewhere; their images are the frames, flat."""
    out = Usable([], [], [], [])
    frames = table[FRAME].combine_chunks()
    width = frames.type.byte_width
    flat = np.frombuffer(frames.buffers()[1], np.uint8)[frames.offset * width :][: table.num_rows * width]
    pixels = flat.reshape(table.num_rows, width)
    for row, (fault, size) in enumerate(zip(table[FAULT].to_pylist(), stored_sizes(table), strict=True)):
        if fault is not None or size is None:
            reason, _, detail = (fault or "error: no size is stored").partition(": ")
            out.failures.append((row, reason, detail))
            continue
        out.rows.append(row)
        out.images.append(pixels[row])
        out.sizes.append(size)
    return out


def unflatten(frames: Sequence[np.ndarray], canvas: Size, buffers: Buffers) -> Tensor:
    """(N, 3, *canvas) uint8, channels last in memory, out of N flat frames."""
    out = buffers.take(len(frames), *canvas, 3)
    for whole, flat in zip(out, frames, strict=True):
        whole.reshape(-1)[:] = flat
    return torch.from_numpy(out).permute(0, 3, 1, 2)
