"""From rows of a table to a batch: decode, sort out what cannot be used, frame images and labels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.augment import crop_offsets
from pipeline.errors import InputError
from pipeline.images.batch import Batch
from pipeline.images.buffer_pool import Buffers
from pipeline.images.decode import DecodeError, Reduced, Size, decode_many
from pipeline.images.frame_labels import frame_labels
from pipeline.images.gpu_frames import frame_on_device
from pipeline.images.host_frames import Paster, paste_images
from pipeline.images.input_settings import InputSettings
from pipeline.images.layout import Layout, lay_out

FRAME, FAULT = "frame", "fault"
"""Columns of rows that were framed elsewhere: canvas height x width x 3 bytes; null or "reason: detail"."""

Failure = tuple[int, str, str]
"""Row of the table, reason (a word of ``schema.STATUSES``), detail."""


class Usable(NamedTuple):
    """The rows of a table that have an image, and those that have none."""

    rows: list[int]
    """Numbers of the rows that have an image, in order."""
    images: list[Any]
    """An image for each of ``rows``: (H, W, 3) uint8 array, perhaps of a fraction of its size; or (3, H, W) uint8
    tensor on a device."""
    sizes: list[Size]
    """Height and width of the upright source image, for each of ``rows``."""
    failures: list[Failure]
    """The rows that have no image, with the reason."""


class Collator:
    """Decodes and frames the rows of a table.

    Args:
        input: What the network sees.
        label_column: Name of the column of labels.
        read_labels: (column, ids, sizes) -> arguments of ``frame_labels``, as ``Task.read_labels``.
        threads: CPU threads that decode and resize.
        multiple: Whole-image frames (``fit: crop``) are padded to a multiple of it.
    """

    def __init__(
        self,
        input: InputSettings,
        label_column: str,
        read_labels: Callable[[pa.ChunkedArray, list[str], list[Size]], dict[str, Any]],
        threads: int,
        multiple: int,
    ) -> None:
        self.input = input
        self.label_column = label_column
        self.read_labels = read_labels
        self.threads = threads
        self.multiple = multiple
        self._buffers = Buffers()

    def collate(
        self,
        table: pa.Table,
        *,
        train: bool,
        seed: int,
        decoded: Sequence[np.ndarray | Tensor | DecodeError] | None = None,
    ) -> tuple[Batch, list[Failure]]:
        """Decode and frame the rows of a table, on the CPU unless they were ``decoded`` elsewhere.

        Args:
            table: ``image_id, image``, perhaps ``height, width`` and the label column; with ``train`` also
                ``epoch, position``. Rows that were framed elsewhere have ``FRAME`` and ``FAULT`` instead of ``image``.
            train: Random windows where the input is cropped; every row must be labelled.
            seed: Decides the windows, together with epoch and position.
            decoded: The images of the rows, where that has been done: arrays (H, W, 3), or tensors (3, H, W) on a
                device, on which all of them are framed then; the labels stay on the CPU.

        Returns:
            The Batch of the rows that could be decoded, in order (labels None when the table has no label
            column; a null label of a row is all void, or no boxes), and the other rows with the reason.

        Raises:
            InputError: With ``train``, a row is not labelled; a label names no class.
        """
        paster = None
        if FRAME in table.column_names:
            usable = framed_rows(table)
        else:
            images = decoded
            if images is None:
                images, paster = self._decode(table, train, seed)
            # Without labels an image may have any size: nothing has to fit it.
            labelled = self.label_column in table.column_names
            usable = usable_rows(images, stored_sizes(table) if labelled else [None] * len(images))
        kept = table.take(pa.array(usable.rows, pa.int64())) if usable.failures else table
        return self._frame(kept, usable, paster, train=train, seed=seed), usable.failures

    def _decode(
        self, table: pa.Table, train: bool, seed: int
    ) -> tuple[Sequence[np.ndarray | Reduced | DecodeError], Paster | None]:
        """Images; and the Paster that put them into their frames while decoding, where all frames have one size."""
        encoded = table["image"].to_pylist()
        if not Paster.fits(self.input, train):
            return decode_many(encoded, self.threads, buffers=self._buffers), None
        offsets = crop_offsets(seed, *_epochs_and_positions(table, train)) if train else None
        # Inference mode is a matter of threads: those that decode may not write to tensors made inside it.
        with torch.inference_mode(False):
            paster = Paster(len(encoded), self.input, train=train, offsets=offsets, buffers=self._buffers)
        return decode_many(encoded, self.threads, paster.target_size, self._buffers, paster), paster

    def _frame(self, table: pa.Table, usable: Usable, paster: Paster | None, *, train: bool, seed: int) -> Batch:
        """The Batch of ``table``, whose rows are those of ``usable``."""
        ids = table["image_id"].to_pylist()
        epochs, positions = _epochs_and_positions(table, train)
        labels = self._labels(table, ids, usable.sizes, train)
        offsets = crop_offsets(seed, epochs, positions) if train else None
        layout = lay_out(usable.sizes, self.input, train=train, offsets=offsets, multiple=self.multiple)
        # Tensors of the batch are written to by other threads: see _decode.
        with torch.inference_mode(False):
            images = self._frame_images(table, usable, paster, layout)
            framed = frame_labels(usable.sizes, layout, **labels, threads=self.threads)
        keys = {"epochs": torch.from_numpy(epochs), "positions": torch.from_numpy(positions)}
        return Batch(image_ids=ids, images=images, **keys, **framed)

    def _labels(self, table: pa.Table, ids: list[str], sizes: list[Size], train: bool) -> dict[str, Any]:
        """Arguments of ``frame_labels``: None where the table has no label column."""
        labels: dict[str, Any] = {"masks": None, "boxes": None, "labels": None, "crowd": None}
        if self.label_column not in table.column_names:
            return labels
        column = table[self.label_column]
        # An unlabelled row would teach a model that there is nothing in the image.
        if train and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise InputError(
                f"image '{ids[row]}' is in the train split but has no {self.label_column}; label it, "
                f"or move it to another split and ingest again"
            )
        return labels | self.read_labels(column, ids, sizes)

    def _frame_images(self, table: pa.Table, usable: Usable, paster: Paster | None, layout: Layout) -> Tensor:
        """(N, 3, h, w) uint8: by whatever has the pixels."""
        # Pasted into their frames while they were decoded: nothing is left to do.
        if paster is not None:
            return paster.images(usable.rows)
        # Framed by a task of the stream, and sent as flat bytes.
        if FRAME in table.column_names:
            return unflatten(usable.images, layout.canvas, self._buffers)
        # Decoded on a device: framed there, so that the pixels never come back to the host.
        device = next((image.device for image in usable.images if isinstance(image, Tensor)), None)
        if device is not None:
            return frame_on_device(usable.images, layout, self.input, device)
        return paste_images(usable.images, layout, self.input, self.threads, self._buffers)


def size_of(image: np.ndarray | Tensor) -> Size:
    """Height and width."""
    shape = image.shape[1:] if isinstance(image, Tensor) else image.shape[:2]
    return shape[0], shape[1]


def usable_rows(
    decoded: Sequence[np.ndarray | Reduced | Tensor | DecodeError], stored: Sequence[Size | None]
) -> Usable:
    """Sort out what could not be decoded, or has another size than the one that its labels are for (None: any)."""
    usable = Usable([], [], [], [])
    for row, (image, stored_size) in enumerate(zip(decoded, stored, strict=True)):
        if isinstance(image, DecodeError):
            usable.failures.append((row, image.reason, str(image)))
            continue
        size = image.size if isinstance(image, Reduced) else size_of(image)
        if stored_size is not None and size != stored_size:
            text = f"decodes to {size[0]}x{size[1]}, its labels are for {stored_size[0]}x{stored_size[1]}"
            usable.failures.append((row, "corrupt", text))
            continue
        usable.rows.append(row)
        usable.images.append(image.pixels if isinstance(image, Reduced) else image)
        usable.sizes.append(size)
    return usable


def stored_sizes(table: pa.Table) -> list[Size | None]:
    """Height and width of every row, None where the table does not have them."""
    if "height" not in table.column_names or "width" not in table.column_names:
        return [None] * table.num_rows
    pairs = zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
    return [None if height is None or width is None else (height, width) for height, width in pairs]


def framed_rows(table: pa.Table) -> Usable:
    """Sort out the rows that were framed elsewhere; their images are the frames, flat."""
    usable = Usable([], [], [], [])
    # A view of Arrow's own buffer: frames are large, and a copy of each would cost as much as framing it.
    frames = table[FRAME].combine_chunks()
    width = frames.type.byte_width
    flat = np.frombuffer(frames.buffers()[1], np.uint8)[frames.offset * width :][: table.num_rows * width]
    pixels = flat.reshape(table.num_rows, width)
    for row, (fault, size) in enumerate(zip(table[FAULT].to_pylist(), stored_sizes(table), strict=True)):
        if fault is not None or size is None:
            reason, _, detail = (fault or "error: no size is stored").partition(": ")
            usable.failures.append((row, reason, detail))
            continue
        usable.rows.append(row)
        usable.images.append(pixels[row])
        usable.sizes.append(size)
    return usable


def unflatten(frames: Sequence[np.ndarray], canvas: Size, buffers: Buffers) -> Tensor:
    """(N, 3, *canvas) uint8, channels last in memory, out of N flat frames."""
    images = buffers.take(len(frames), *canvas, 3)
    for image, flat in zip(images, frames, strict=True):
        image.reshape(-1)[:] = flat
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _epochs_and_positions(table: pa.Table, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 epoch and (N,) int64 position of the rows; zeros where only training has them."""
    missing = [name for name in ("epoch", "position") if name not in table.column_names]
    if missing and train:
        raise ValueError(f"a training table needs the column '{missing[0]}', found {table.column_names}")
    epochs, positions = (
        np.zeros(table.num_rows, np.int64) if name in missing else np.array(table[name].to_numpy(), np.int64)
        for name in ("epoch", "position")
    )
    return epochs, positions
