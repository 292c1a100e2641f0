"""Instances: one label map an image, 0 = background, every other value one object."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import schema
from pipeline.datasets.formats import files
from pipeline.datasets.formats.base import (
    Context,
    Format,
    Index,
    IngestSettings,
    LabelError,
    Labels,
    Source,
    box_row,
    check_size,
    need,
)
from pipeline.errors import InputError
from pipeline.images.decode import IMAGE_SUFFIXES, DecodeError, ImageInfo, decode_map


class InstanceSettings(IngestSettings):
    """Options of the instances format."""

    void: int | None = None
    """Value that stands for "unknown here"; None = every value but 0 is an object."""


class Instances(Format):
    """uint8 or uint16 label maps -> a semantic mask, and a box for the extent of each value.

    All objects are of one class: the name in ``--classes`` (default ``object``); ``background`` is appended.
    """

    name = "instances"
    settings = InstanceSettings

    def index(
        self,
        images: str | None,
        labels: str | None,
        classes: Sequence[str] | None,
        settings: InstanceSettings,
    ) -> Index:
        """See ``Format.index``."""
        images_uri = need(images, "--images", "the folder of images")
        labels_uri = need(labels, "--labels", "the folder of label maps")
        names = [name for name in classes or ["object"] if name != schema.BACKGROUND]
        if len(names) != 1:
            raise InputError(f"instances have one class; found --classes {','.join(names)}; give one name")
        sources, rejects = files.paired_sources(images_uri, labels_uri, IMAGE_SUFFIXES)
        tasks: tuple[schema.Task, ...] = ("segmentation", "detection")
        return Index(sources, Context((names[0], schema.BACKGROUND), 1, tasks, settings), rejects)

    def read(self, source: Source, image: ImageInfo, label: bytes, context: Context) -> Labels:
        """See ``Format.read``."""
        try:
            ids = decode_map(label)
        except DecodeError as error:
            raise LabelError("bad_label", str(error)) from None
        if ids.ndim != 2:
            raise LabelError("bad_label", "wanted a grey label map of 8 or 16 bits, found a colour image")
        check_size(ids.shape[0], ids.shape[1], image, "the label map")
        if ids.min() < 0 or ids.max() > 65535:
            raise LabelError("bad_label", f"wanted values of 0 to 65535, found {ids.min()} to {ids.max()}")
        void = context.settings.void
        mask = np.where(ids == 0, np.uint8(1), np.uint8(0))
        if void is not None:
            mask[ids == void] = schema.VOID
        return Labels(mask=mask, boxes=_boxes(ids, void))


def _boxes(ids: np.ndarray, void: int | None) -> list[dict[str, Any]]:
    from scipy.ndimage import find_objects

    boxes = []
    for value, slices in enumerate(find_objects(ids.astype(np.int32)), start=1):
        if slices is not None and value != void:
            rows, columns = slices
            edges = (columns.start, rows.start, columns.stop, rows.stop)
            x1, y1, x2, y2 = (float(edge) for edge in edges)
            boxes.append(box_row(x1, y1, x2, y2, 0, instance=value))
    return boxes
