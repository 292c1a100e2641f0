"""What stands beside the shards: the content of dataset.json, ``digests.parquet``, ``rejects/``."""

import colorsys
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.datasets.formats.base import Context, IngestSettings, Reject
from pipeline.datasets.shard_writer import SplitStatistics
from pipeline.errors import InputError


def split_counts(sums: dict[str, SplitStatistics], context: Context) -> dict[str, Any]:
    """``{split: {images, labelled, boxes {class: n}, pixels {class: n}, void}}``, splits in schema order."""
    out: dict[str, Any] = {}
    for split in schema.SPLITS:
        if split not in sums:
            continue
        part = sums[split]
        out[split] = {"images": part.images, "labelled": part.labelled}
        if "detection" in context.tasks:
            out[split]["boxes"] = {name: part.boxes[label] for label, name in enumerate(context.things)}
        if "segmentation" in context.tasks:
            out[split]["pixels"] = {name: part.pixels[label] for label, name in enumerate(context.classes)}
            out[split]["void"] = part.pixels[schema.VOID]
    return out


def statistics(sums: dict[str, SplitStatistics]) -> dict[str, Any]:
    """Size and intensity of the train images (of all images where there is no train split).

    ``mean`` and ``std`` are per channel R, G, B over all pixels, on the 0 to 1 scale; ``height`` and
    ``width`` are in pixels, weighted by image.
    """
    split = "train" if "train" in sums else None
    total = SplitStatistics()
    for name, part in sums.items():
        if split in (None, name):
            total.add(part)
    values = np.arange(256) / 255
    pixels = total.histogram.sum(axis=1)
    mean = total.histogram @ values / pixels
    variance = total.histogram @ values**2 / pixels - mean**2
    return {
        "split": split,
        "images": total.images,
        "mean": [round(float(value), 6) for value in mean],
        "std": [round(float(value) ** 0.5, 6) for value in np.maximum(variance, 0)],
        "height": _extent(Counter(size[0] for size in total.sizes.elements())),
        "width": _extent(Counter(size[1] for size in total.sizes.elements())),
    }


def _extent(sizes: Counter[int]) -> dict[str, int]:
    ordered = sorted(sizes.elements())
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}


def palette(count: int) -> list[str]:
    """``count`` well-separated ``#rrggbb`` colours: hues a golden angle apart."""
    out = []
    for index in range(count):
        rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75 if index % 2 else 0.9, 0.95 if index % 3 else 0.75)
        out.append("#" + "".join(f"{round(value * 255):02x}" for value in rgb))
    return out


def fingerprint(digests: Sequence[tuple[str, str, str, str | None]], context: Context) -> str:
    """sha256 over the sorted (image_id, split, sha256, label sha256), the class names and the tasks.

    It depends on neither the order of ingest, the shards, nor where the images were.
    """
    head = {"classes": context.classes, "background": context.background, "tasks": context.tasks}
    digest = hashlib.sha256(json.dumps({"schema": schema.SCHEMA_VERSION, **head}).encode())
    for row in sorted(digests):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def dataset_notes(sums: dict[str, SplitStatistics], context: Context) -> list[str]:
    """Sentences on what is not wrong, but seldom meant."""
    total = SplitStatistics()
    for part in sums.values():
        total.add(part)
    out = []
    for label, name in enumerate(context.classes):
        if total.labelled and not total.boxes[label] and not total.pixels[label]:
            out.append(f"class '{name}' occurs in no label")
    void, pixels = total.pixels[schema.VOID], total.pixels.total()
    if pixels and void:
        out.append(f"{100 * void / pixels:.2g} % of the labelled pixels are void ({schema.VOID}) and count nowhere")
    return out


def rejects_by_reason(rejects: Sequence[Reject]) -> dict[str, int]:
    """Rejects by reason, the most frequent first."""
    return dict(sorted(Counter(item.reason for item in rejects).items(), key=lambda item: (-item[1], item[0])))


def reject_table(rejects: Sequence[Reject]) -> str:
    """One line a reason: count, and the first case."""
    lines = []
    for reason, count in rejects_by_reason(rejects).items():
        first = next(item for item in rejects if item.reason == reason)
        lines.append(f"  {count:6d}  {reason:14s} first: {first.uri}: {first.detail}")
    return "\n".join(lines)


def check_rejects(uri: str, rejects: list[Reject], good: int, settings: IngestSettings) -> None:
    """Write the rejects and raise InputError with their table, if they are more than is allowed of all."""
    total = len(rejects) + good
    if not rejects or len(rejects) <= settings.max_reject_fraction * total:
        return
    file = storage.join(uri, write_rejects(uri, rejects)["path"])
    share = f"{len(rejects)} of {total} ({100 * len(rejects) / total:.3g} %)"
    raise InputError(
        f"{share} could not be used, more than max_reject_fraction = {settings.max_reject_fraction:g}; mend "
        f"them (all are listed in '{file}') or allow more with --set max_reject_fraction=...:\n"
        f"{reject_table(rejects)}"
    )


def write_digests(uri: str, digests: list[tuple[str, str, str, str | None]]) -> dict[str, Any]:
    """``digests.parquet``, sorted by image_id; returns its entry of ``files``."""
    rows = sorted(digests)
    columns = {
        "image_id": [r[0] for r in rows],
        "sha256": [r[2] for r in rows],
        "label_sha256": [r[3] for r in rows],
    }
    return _write_table(uri, "digests.parquet", pa.table(columns, schema.DIGESTS))


def write_rejects(uri: str, rejects: list[Reject]) -> dict[str, Any]:
    """The rows of ``schema.REJECTS``; returns its entry of ``files``."""
    columns = {name: [getattr(item, name) for item in rejects] for name in schema.REJECTS.names}
    return _write_table(uri, "rejects/rejects-00000.parquet", pa.table(columns, schema.REJECTS))


def _write_table(uri: str, path: str, table: pa.Table) -> dict[str, Any]:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    storage.write_bytes(storage.join(uri, path), data)
    return {
        "path": path,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "rows": table.num_rows,
    }


def ingest_summary(uri: str, meta: dict[str, Any], seconds: float, *, already: bool) -> dict[str, Any]:
    """What ``dubito ingest`` says at the end."""
    per_split = {split: part["images"] for split, part in meta["counts"].items()}
    same = ("name", "fingerprint", "classes", "tasks", "left_out", "rejects", "repairs", "notes")
    return {
        "uri": uri,
        **{key: meta[key] for key in same},
        "images": sum(per_split.values()),
        "splits": per_split,
        "unlabelled": per_split.get("unlabelled", 0),
        "seconds": round(seconds, 2),
        "already": already,
    }
