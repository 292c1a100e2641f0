"""The contract: column names, Arrow schemas, axis letters, and the conventions that everybody shares.

Axis letters in shapes: N images, C classes, H and W pixels (rows, columns), M ensemble members,
L locations of a detector, B boxes of one image.

Boxes are ``x1, y1, x2, y2`` in pixels of the upright image with continuous edges: a box that covers the
columns 0 to 9 has x1 = 0 and x2 = 10. Labels start at 0. ``classes`` of a dataset lists every name in the
order of its label; where a format has an implicit background (whatever no instance covers), that is one
more name at the END of the list, so box labels and mask ids share one numbering, detectors have no
background class, and ``classes[value]`` names any pixel.
"""

from typing import Final, Literal

import pyarrow as pa

SCHEMA_VERSION: Final = 1
BUNDLE_JSON: Final = "manifest.json"
"""What commits a bundle."""

VOID: Final = 255
"""Mask value that nothing counts: neither losses nor metrics."""

BACKGROUND: Final = "background"
MAX_CLASSES: Final = 255

SPLITS: Final = ("train", "val", "calibration", "test", "unlabelled")
Task = Literal["segmentation", "detection"]

LABEL_COLUMNS: Final = {"segmentation": ["mask"], "detection": ["boxes"]}
"""Task -> the columns of a dataset that hold what it learns from."""

STATUSES: Final = ("ok", "missing", "forbidden", "timeout", "corrupt", "error")
"""Fate of one image; all but ``ok`` are also reasons in ``rejects/``."""

BOX: Final = pa.struct(
    [
        ("x1", pa.float32()),
        ("y1", pa.float32()),
        ("x2", pa.float32()),
        ("y2", pa.float32()),
        ("label", pa.int16()),
        ("crowd", pa.bool_()),
        ("instance", pa.int32()),
    ]
)

SHAPE: Final = pa.struct(
    [
        ("kind", pa.string()),
        ("label", pa.int16()),
        ("instance", pa.int32()),
        ("points", pa.list_(pa.float64())),
        ("rings", pa.list_(pa.int32())),
        ("edges", pa.list_(pa.int32())),
        ("visible", pa.list_(pa.int8())),
        ("mask", pa.binary()),
        ("attributes", pa.string()),
    ]
)

DATASET: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("sha256", pa.string()),
        ("image", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("orientation", pa.int8()),
        ("split", pa.string()),
        ("mask", pa.binary()),
        ("boxes", pa.list_(BOX)),
        ("tags", pa.list_(pa.int16())),
        ("shapes", pa.list_(SHAPE)),
        ("label_source", pa.string()),
        ("label_confidence", pa.float32()),
    ]
)
"""One row an image. Null label column = not labelled; empty = labelled, none there."""

REJECTS: Final = pa.schema([("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

DIGESTS: Final = pa.schema([("image_id", pa.string()), ("sha256", pa.string()), ("label_sha256", pa.string())])

_PREDICTION_COMMON: Final = [
    ("image_id", pa.string()),
    ("uri", pa.string()),
    ("sha256", pa.string()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("status", pa.string()),
    ("error", pa.string()),
    ("bundle_id", pa.string()),
    ("members", pa.int32()),
    ("uncertainty", pa.float32()),
    ("decision", pa.string()),
]

CLASS_SUMMARY: Final = pa.struct(
    [
        ("label", pa.int16()),
        ("area_fraction", pa.float32()),
        ("probability", pa.float32()),
        ("entropy", pa.float32()),
        ("mutual_information", pa.float32()),
    ]
)

PREDICTED_BOX: Final = pa.struct(
    [
        ("x1", pa.float32()),
        ("y1", pa.float32()),
        ("x2", pa.float32()),
        ("y2", pa.float32()),
        ("label", pa.int16()),
        ("score", pa.float32()),
        ("probabilities", pa.list_(pa.float32())),
        ("entropy", pa.float32()),
        ("mutual_information", pa.float32()),
        ("votes", pa.int32()),
        ("std_x1", pa.float32()),
        ("std_y1", pa.float32()),
        ("std_x2", pa.float32()),
        ("std_y2", pa.float32()),
    ]
)

SEGMENTATION_PREDICTIONS: Final = pa.schema(
    [
        *_PREDICTION_COMMON,
        ("mask", pa.binary()),
        ("confidence_map", pa.binary()),
        ("uncertainty_map", pa.binary()),
        ("map_height", pa.int32()),
        ("map_width", pa.int32()),
        ("entropy_mean", pa.float32()),
        ("entropy_p95", pa.float32()),
        ("expected_entropy_mean", pa.float32()),
        ("mutual_information_mean", pa.float32()),
        ("mutual_information_p95", pa.float32()),
        ("entropy_patch_max", pa.float32()),
        ("entropy_inner_mean", pa.float32()),
        ("member_dice", pa.float32()),
        ("classes", pa.list_(CLASS_SUMMARY)),
    ]
)
"""``mask`` is zstd of row-major uint8 class ids, height x width. The maps are zstd of row-major uint8,
``map_height`` x ``map_width``, scaled so that 255 is 1: the confidence max_c p_c, and the entropy / ln C."""

DETECTION_PREDICTIONS: Final = pa.schema(
    [
        *_PREDICTION_COMMON,
        ("boxes", pa.list_(PREDICTED_BOX)),
        ("entropy_sum", pa.float32()),
        ("mutual_information_sum", pa.float32()),
        ("box_entropy_mean", pa.float32()),
        ("box_entropy_max", pa.float32()),
        ("missed_votes", pa.float32()),
        ("expected_error", pa.float32()),
    ]
)

PREDICTIONS: Final = {
    "segmentation": SEGMENTATION_PREDICTIONS,
    "detection": DETECTION_PREDICTIONS,
}


def pack_map(values: bytes) -> bytes:
    """Compress row-major uint8 bytes to one zstd frame (level 1: measured 17 times as fast as PNG)."""
    return pa.Codec("zstd", 1).compress(values, asbytes=True)


def unpack_map(packed: bytes, height: int, width: int) -> bytes:
    """Undo ``pack_map``; ``height * width`` is the number of bytes expected."""
    return pa.Codec("zstd").decompress(packed, height * width, asbytes=True)
