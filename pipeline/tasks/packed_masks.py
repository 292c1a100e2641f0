"""Dense maps: packed and unpacked, in the network's frame and at an image's own size."""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import schema
from pipeline.errors import InputError, one_line
from pipeline.images.batch import Batch
from pipeline.images.unframe import unframe_maps
from pipeline.tasks.base import image_area


def unpack(packed: bytes, size: tuple[int, int], image_id: str) -> np.ndarray:
    """A packed mask as (H, W) uint8, or an InputError that names the image."""
    try:
        values = schema.unpack_map(packed, *size)
        return np.frombuffer(values, np.uint8).reshape(size).copy()  # writable, as torch wants it
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        reason = one_line(error)
        raise InputError(
            f"mask of image '{image_id}' is not {size[0]}x{size[1]} packed pixels ({reason}); ingest it again"
        ) from None


def pack(values: Tensor) -> bytes:
    """(H, W) whole numbers from 0 to 255, packed."""
    return schema.pack_map(values.to("cpu", torch.uint8).contiguous().numpy().tobytes())


def own_size(maps: Tensor, matrices: Tensor, sizes: Tensor, n: int) -> Tensor:
    """Image n's maps (C, H, W) at its own size, from (N, C, h, w) in the frame."""
    return unframe_maps(maps[n : n + 1], matrices[n : n + 1], sizes[n : n + 1])[0]


def valid_area(batch: Batch, like: Tensor) -> Tensor:
    """(N, h, w) bool: pixels of the frame whose centre lies in the image."""
    area = image_area(batch).to(like.device)[:, :, None]
    rows = torch.arange(like.shape[1], device=like.device) + 0.5
    columns = torch.arange(like.shape[2], device=like.device) + 0.5
    inside_rows = (rows > area[:, 1]) & (rows < area[:, 3])
    inside_columns = (columns > area[:, 0]) & (columns < area[:, 2])
    return inside_rows[:, :, None] & inside_columns[:, None, :]
