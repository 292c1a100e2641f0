"""Masks: one label image an image, whose values or colours are classes."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import field_validator

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
    check_size,
    need,
)
from pipeline.errors import InputError, nearest
from pipeline.images.decode import IMAGE_SUFFIXES, DecodeError, ImageInfo, decode_map

VOID_NAME = "void"
_COLOUR = re.compile(r"#?([0-9a-fA-F]{6})")


class MaskSettings(IngestSettings):
    """Options of the masks format."""

    map: dict[str, str] = {}
    """Class name, or ``void``, of each value (``0``) or colour (``'#ff0000'`` or ``'255,0,0'``) in the masks.
    Empty = value i is class i of ``--classes``, 255 is void."""

    @field_validator("map", mode="before")
    @classmethod
    def _keys_as_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        out = {str(key): name for key, name in value.items()}
        for key in out:
            _key(key)
        return out


def _key(text: str) -> int:
    """A value as itself; a colour as 2^24 + its 24 bits, which no grey value reaches."""
    if text.isdigit() and len(text) < 6 and int(text) <= 65535:
        return int(text)
    match = _COLOUR.fullmatch(text)
    if match:
        return 2**24 + int(match[1], 16)
    parts = text.split(",")
    if len(parts) == 3 and all(part.strip().isdigit() and int(part) <= 255 for part in parts):
        red, green, blue = (int(part) for part in parts)
        return 2**24 + red * 65536 + green * 256 + blue
    raise ValueError(f"'{text}' is neither a value (0 to 65535) nor a colour ('#ff0000' or '255,0,0')")


class Masks(Format):
    """``--images`` and ``--labels``: two folders, paired by name. Grey, palette, 1-bit or RGB label images.

    A 1-bit file has the values 0 and 1; a palette file counts by its indices unless ``map`` holds colours.
    """

    name = "masks"
    settings = MaskSettings

    def index(
        self, images: str | None, labels: str | None, classes: Sequence[str] | None, settings: MaskSettings
    ) -> Index:
        """See ``Format.index``."""
        images_uri = need(images, "--images", "the folder of images")
        labels_uri = need(labels, "--labels", "the folder of masks")
        names = _class_names(classes, settings)
        sources, rejects = files.paired_sources(images_uri, labels_uri, IMAGE_SUFFIXES)
        background = names.index(schema.BACKGROUND) if schema.BACKGROUND in names else None
        table = _table(names, settings)
        context = Context(tuple(names), background, ("segmentation",), settings, {"table": table})
        return Index(sources, context, rejects, _colours(names, table))

    def read(self, source: Source, image: ImageInfo, label: bytes, context: Context) -> Labels:
        """See ``Format.read``."""
        try:
            values = decode_map(label)
        except DecodeError as error:
            raise LabelError("bad_label", str(error)) from None
        check_size(values.shape[0], values.shape[1], image, "the mask")
        return Labels(mask=_to_ids(values, label, context))


def _class_names(classes: Sequence[str] | None, settings: MaskSettings) -> list[str]:
    mapped = list(dict.fromkeys(name for name in settings.map.values() if name != VOID_NAME))
    names = list(classes) if classes else mapped
    if not names:
        raise InputError(
            "masks do not name their classes; give --classes background,vessel (value i is the i-th name) "
            "or --set 'map={0: background, 255: vessel}'"
        )
    for name in mapped:
        if name not in names:
            raise InputError(f"--set map: '{name}' is none of --classes.{nearest(name, [*names, VOID_NAME])}")
    if len(names) > schema.MAX_CLASSES:
        raise InputError(f"{len(names)} classes; a mask holds at most {schema.MAX_CLASSES}")
    return names


def _table(names: list[str], settings: MaskSettings) -> dict[int, int]:
    """Value or coded colour -> class id."""
    if not settings.map:
        return {**{value: value for value in range(len(names))}, schema.VOID: schema.VOID}
    ids = {name: index for index, name in enumerate(names)} | {VOID_NAME: schema.VOID}
    table = {_key(key): ids[name] for key, name in settings.map.items()}
    if any(key < 2**24 for key in table):
        table.setdefault(schema.VOID, schema.VOID)
    return table


def _colours(names: list[str], table: dict[int, int]) -> list[str] | None:
    by_id = {label: key - 2**24 for key, label in table.items() if key >= 2**24}
    if not all(label in by_id for label in range(len(names))):
        return None
    return [f"#{by_id[label]:06x}" for label in range(len(names))]


def _to_ids(values: np.ndarray, label: bytes, context: Context) -> np.ndarray:
    table: dict[int, int] = context.extra["table"]
    coloured = any(key >= 2**24 for key in table)
    if coloured and not any(key < 2**24 for key in table) and values.ndim == 2:
        values = _as_colours(label)
    if values.ndim == 3:
        if coloured:
            parts = values.astype(np.int64)
            values = 2**24 + parts[..., 0] * 65536 + parts[..., 1] * 256 + parts[..., 2]
        elif (values == values[..., :1]).all():
            values = values[..., 0]  # grey written as RGB
        else:
            coloured_at = np.argmax((values != values[..., :1]).any(-1))
            colour = bytes(values.reshape(-1, 3)[coloured_at].tolist()).hex()
            raise LabelError(
                "mask_value",
                f"colour #{colour} in the mask; map colours with --set map.'#rrggbb'=name",
            )
    colours, inverse = _distinct(values)
    unknown = [int(value) for value in colours if int(value) not in table]
    if unknown:
        raise LabelError("mask_value", _unknown_text(unknown, context))
    ids = np.array([table[int(value)] for value in colours], np.uint8)
    return ids[inverse].reshape(values.shape)


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``np.unique`` with the inverse; grey values by counting, which is many times as fast as sorting."""
    if values.size and 0 <= values.min() and values.max() < 2**16:
        values_present = np.flatnonzero(np.bincount(values.ravel()))
        index = np.zeros(2**16, np.int64)
        index[values_present] = np.arange(len(values_present))
        return values_present, index[values]
    return np.unique(values, return_inverse=True)


def _as_colours(label: bytes) -> np.ndarray:
    """Grey and palette files as the colours they show."""
    from pipeline.images.decode import decode

    try:
        return decode(label)
    except DecodeError as error:
        raise LabelError("bad_label", str(error)) from None


def _unknown_text(unknown: list[int], context: Context) -> str:
    shown = ", ".join(f"#{value - 2**24:06x}" if value >= 2**24 else str(value) for value in unknown[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    if context.settings.map:
        return f"value {shown}{more} in the mask is not in map ({', '.join(context.settings.map)})"
    last = len(context.classes) - 1
    return (
        f"value {shown}{more} in the mask; the classes ({', '.join(context.classes)}) have 0 to {last}, "
        f"255 is void; name more with --classes or give --set map"
    )
