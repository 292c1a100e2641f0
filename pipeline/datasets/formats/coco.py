"""COCO: one JSON file for all images; boxes x, y, w, h; polygons, RLE and crowd regions."""

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import schema, storage
from pipeline.datasets.formats import files
from pipeline.datasets.formats.base import (
    Context,
    Format,
    Index,
    IngestSettings,
    LabelError,
    Labels,
    Reject,
    Source,
    box_row,
    check_size,
    fit_box,
    need,
)
from pipeline.errors import InputError, nearest
from pipeline.images.decode import ImageInfo

FAR = 1e6
"""A polygon corner farther out than this is a fault."""
LONGEST = 2**24
"""Pixels of outline that one object may have: drawing takes time and memory for each, also outside the image."""


class Coco(Format):
    """``--images FOLDER --labels FILE.json`` (or a folder with one JSON file).

    Category ids may be sparse: labels follow their order, or that of ``--classes``. If any annotation has a
    segmentation, every image also gets a semantic mask: ``background`` is appended to the classes, larger
    objects are painted first, the box of an object without segmentation is void where nothing else lies.
    """

    name = "coco"

    def index(
        self, images: str | None, labels: str | None, classes: Sequence[str] | None, settings: IngestSettings
    ) -> Index:
        """See ``Format.index``."""
        images_uri = need(images, "--images", "the folder of images")
        uri = _json_file(need(labels, "--labels", "the JSON file"))
        data = _load(uri)
        strange = _only_objects(data, uri)
        things = _categories(data, uri)
        names = [name for name in classes if name != schema.BACKGROUND] if classes else list(things.values())
        label_of = {key: names.index(name) if name in names else -1 for key, name in things.items()}
        extra = {"labels": label_of, "names": things}
        tasks: tuple[schema.Task, ...] = ("detection",)
        background: int | None = None
        if any(note.get("segmentation") for note in data["annotations"]):
            tasks = ("segmentation", "detection")
            background = len(names)
            names = [*names, schema.BACKGROUND]
        if len(names) > schema.MAX_CLASSES and background is not None:
            raise InputError(f"'{uri}' has {len(names)} classes; a mask holds at most {schema.MAX_CLASSES}")
        sources, rejects = _sources(data, images_uri, uri)
        return Index(sources, Context(tuple(names), background, tasks, settings, extra), [*strange, *rejects])

    def read(self, source: Source, image: ImageInfo, label: bytes, context: Context) -> Labels:
        """See ``Format.read``."""
        entry = json.loads(zlib.decompress(label))
        if entry["height"] and entry["width"]:
            check_size(entry["height"], entry["width"], image, "the size in the JSON")
        boxes: list[dict[str, Any]] = []
        shapes: list[dict[str, Any]] = []
        out = Labels(boxes=boxes, shapes=shapes)
        painted: list[tuple[int, np.ndarray]] = []
        unsure: list[dict[str, Any]] = []
        for note in entry["annotations"]:
            class_id = _label(note, context)
            box = _box(note, class_id, image, out.repairs)
            if box:
                boxes.append(box)
            shape, pixels = _shape(note, class_id, image)
            if shape is not None and pixels is not None:
                shapes.append(shape)
                painted.append((class_id, pixels))
            elif box:
                unsure.append(box)
        if context.background is not None:
            out.mask = _paint(painted, unsure, image, context.background)
            out.repairs["box_without_segmentation"] += len(unsure)
        return out


def _json_file(uri: str) -> str:
    if uri.lower().endswith(".json"):
        return uri
    json_files = files.labels_in(uri, (".json",))
    if len(json_files) > 1:
        names = ", ".join(item.path for item in json_files[:5])
        raise InputError(f"'{uri}' holds {len(json_files)} JSON files ({names}); name one with --labels")
    return storage.join(uri, json_files[0].path)


def _load(uri: str) -> dict[str, Any]:
    try:
        data = json.loads(storage.read_text(uri, "label file"))
    except RecursionError:
        raise InputError(f"label file '{uri}' is nested too deep for COCO") from None
    except ValueError as error:  # also of a number of thousands of digits
        if isinstance(error, InputError):
            raise
        raise InputError(f"label file '{uri}' is not valid JSON: {error}") from None
    lists = ("images", "annotations", "categories")
    missing = [key for key in lists if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if missing:
        raise InputError(f"'{uri}' is no COCO file: wanted the lists images, annotations, categories; no {missing}")
    return data


def _only_objects(data: dict[str, Any], uri: str) -> list[Reject]:
    """Take out of ``images`` and ``annotations`` what is none, or has an id of the wrong kind; it is rejected."""
    rejects: list[Reject] = []
    for key, name in (("images", "id"), ("annotations", "image_id")):
        good = []
        for number, item in enumerate(data[key]):
            if isinstance(item, dict) and isinstance(item.get(name), (int, str)):
                good.append(item)
                continue
            offender = f"'{name}': {item.get(name)!r:.60}" if isinstance(item, dict) else repr(item)[:60]
            detail = f"wanted an object with '{name}', a number or text; found {offender}"
            rejects.append(Reject(f"{uri}#{key}[{number}]", "bad_label", detail))
        data[key] = good
    return rejects


def _categories(data: dict[str, Any], uri: str) -> dict[int, str]:
    """Category id -> name, in the order of the ids."""
    try:
        names = {int(item["id"]): str(item["name"]) for item in data["categories"]}
        for name in names.values():
            name.encode()  # a lone surrogate is a ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(f"'{uri}': every category needs an 'id' (integer) and a 'name'") from None
    double = [name for name, count in Counter(names.values()).items() if count > 1]
    if double or len(names) != len(data["categories"]):
        raise InputError(f"'{uri}': category ids and names must be unique; found twice: {double or 'an id'}")
    return dict(sorted(names.items()))


def _sources(data: dict[str, Any], images_uri: str, uri: str) -> tuple[list[Source], list[Reject]]:
    rejects: list[Reject] = []
    notes: dict[Any, list[dict[str, Any]]] = {}
    for note in data["annotations"]:
        kept = {key: note.get(key) for key in ("id", "category_id", "bbox", "iscrowd", "segmentation")}
        notes.setdefault(note.get("image_id"), []).append(kept)
    listed = {item.path: item for item in files.images_in(images_uri)}
    by_name: dict[str, list[str]] = {}
    for path in listed:
        by_name.setdefault(path.rsplit("/", 1)[-1], []).append(path)
    labels: dict[str, bytes] = {}
    for entry in data["images"]:
        name = str(entry.get("file_name", ""))
        annotations = notes.pop(entry.get("id"), [])
        paths = [name] if name in listed else by_name.get(name.rsplit("/", 1)[-1], [])
        if len(paths) != 1:
            detail = f"image '{name}' (id {entry.get('id')}) of the JSON: {len(paths)} such files in the folder"
            rejects.append(Reject(f"{uri}#{name}", "no_image", detail))
        elif paths[0] in labels:
            rejects.append(Reject(f"{uri}#{name}", "second_label", f"image '{paths[0]}' is listed twice"))
        else:
            label = {"height": entry.get("height"), "width": entry.get("width"), "annotations": annotations}
            labels[paths[0]] = zlib.compress(json.dumps(label).encode(), 1)
    for key, lost in notes.items():
        rejects.append(Reject(f"{uri}#{key}", "no_image", f"{len(lost)} annotations of unknown image id {key}"))
    sources = [
        Source(path, storage.join(images_uri, path), item.size, label=labels.get(path)) for path, item in listed.items()
    ]
    return sources, rejects


def _label(note: dict[str, Any], context: Context) -> int:
    key = note["category_id"]
    label = context.extra["labels"].get(key) if isinstance(key, int) else None
    if label is None:
        raise LabelError("unknown_class", f"annotation {note['id']}: category id {key!r:.60} is not in categories")
    if label < 0:
        name = context.extra["names"][key]
        hint = nearest(name, context.things)
        raise LabelError("unknown_class", f"annotation {note['id']}: '{name}' is none of the classes.{hint}")
    return label


def _box(note: dict[str, Any], label: int, image: ImageInfo, repairs: Counter[str]) -> dict[str, Any] | None:
    try:
        x, y, w, h = (float(value) for value in note["bbox"])
    except (TypeError, ValueError, OverflowError):
        raise LabelError(
            "bad_box", f"annotation {note['id']}: wanted bbox [x, y, w, h], found {note['bbox']}"
        ) from None
    row = box_row(x, y, x + w, y + h, label, crowd=bool(note["iscrowd"]))
    return fit_box(row, image, repairs)


def _shape(note: dict[str, Any], label: int, image: ImageInfo) -> tuple[dict[str, Any] | None, np.ndarray | None]:
    """(row of ``schema.SHAPE``, (H, W) bool pixels), both None without a segmentation.

    Polygon: ``points`` x, y, x, y ... of all rings, ``rings`` the number of points of each. RLE: ``mask`` is
    zstd of row-major 0/1 bytes of the whole image (``schema.pack_map``).
    """
    segmentation = note.get("segmentation")
    if not segmentation:
        return None, None
    from faster_coco_eval.core import mask as rle

    row: dict[str, Any] = {"label": label, "attributes": json.dumps({"crowd": bool(note["iscrowd"])})}
    try:
        if isinstance(segmentation, dict):
            height, width = (int(side) for side in segmentation["size"])
            check_size(height, width, image, f"the RLE of annotation {note['id']}")
            pixels = _from_runs(segmentation["counts"], height, width)
            return row | {"kind": "mask", "mask": schema.pack_map(pixels.astype(np.uint8).tobytes())}, pixels
        rings = [[float(value) for value in ring] for ring in segmentation]
        flat = np.array([value for ring in rings for value in ring])
        if any(len(ring) < 6 or len(ring) % 2 for ring in rings) or not (np.abs(flat) < FAR).all():
            raise ValueError("wanted rings of at least three x, y pairs")
        if sum(_outline(ring) for ring in rings) > LONGEST:
            raise ValueError(f"its outline is longer than {LONGEST} pixels")
        pixels = _pixels(rle.decode(rle.merge(list(rle.frPyObjects(rings, image.height, image.width)))))
        return row | {
            "kind": "polygon",
            "points": flat.tolist(),
            "rings": [len(r) // 2 for r in rings],
        }, pixels
    except LabelError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
        detail = f"annotation {note['id']}: segmentation cannot be read: {error}"
        raise LabelError("bad_label", detail) from None


def _outline(ring: list[float]) -> float:
    corners = np.array(ring).reshape(-1, 2)
    return float(np.abs(np.diff(corners, axis=0, append=corners[:1])).sum())


def _from_runs(counts: Any, height: int, width: int) -> np.ndarray:
    """(H, W) bool of COCO's run lengths, down the columns, absent first: a list, or text as in pycocotools' rleApi.c.

    Raises:
        ValueError: They are not of ``height`` times ``width`` pixels: a library would write beyond its memory.
    """
    runs = _unpacked(counts.encode() if isinstance(counts, str) else counts)
    if any(not isinstance(run, int) or run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"wanted runs of {height * width} pixels in all")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, np.array(runs, np.int64))
    return np.ascontiguousarray(flat.reshape(width, height).T)


def _unpacked(counts: Any) -> list[Any]:
    """Text to run lengths: five bits a letter, the lowest first, a sixth for "more"; from the third, differences."""
    if not isinstance(counts, bytes):
        return list(counts)
    runs: list[int] = []
    value, shift = 0, 0
    for letter in counts:
        bits = letter - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("not the text of run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("the text of run lengths ends early")
    return runs


def _pixels(decoded: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(decoded).astype(bool)


def _paint(
    painted: list[tuple[int, np.ndarray]], unsure: list[dict[str, Any]], image: ImageInfo, background: int
) -> np.ndarray:
    mask = np.full((image.height, image.width), background, np.uint8)
    for box in unsure:
        rows = slice(int(box["y1"]), int(np.ceil(box["y2"])))
        mask[rows, int(box["x1"]) : int(np.ceil(box["x2"]))] = schema.VOID
    for label, pixels in sorted(painted, key=lambda item: -int(item[1].sum())):
        mask[pixels] = label
    return mask
