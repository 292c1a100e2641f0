"""One shard of a dataset: sources -> validated rows -> a Parquet file. Runs in tasks; knows no Ray."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.datasets.formats import FORMATS
from pipeline.datasets.formats.base import Context, LabelError, Labels, Reject, Source
from pipeline.datasets.splits import hash_position
from pipeline.errors import one_line
from pipeline.images.decode import MAX_BYTES, DecodeError, decode, probe

ROW_GROUP_ROWS = 256
ROW_GROUP_BYTES = 32 * 2**20
THREADS = 8
"""Images of one shard read and decoded at a time: enough to hide an object store's latency."""


@dataclass(frozen=True)
class ShardPlan:
    """What one task does."""

    uri: str
    """The Parquet file to publish."""
    split: str
    format: str
    sources: tuple[Source, ...]


def plan_shards(
    uri: str, format_name: str, sources: Sequence[Source], split_of: dict[str, str], shard_bytes: int
) -> list[ShardPlan]:
    """Shards of about ``shard_bytes`` of encoded images, one split each.

    Images are in the order of their hash: what lies together in a folder (a patient, a class) must not fill
    a row group of its own.
    """
    plans = []
    for split in schema.SPLITS:
        sources_of_split = [item for item in sources if split_of[item.image_id] == split]
        sources_of_split.sort(key=lambda item: (hash_position(item.image_id), item.image_id))
        for number, part in enumerate(_parts(sources_of_split, shard_bytes)):
            file = storage.join(uri, f"data/{split}-{number:05d}.parquet")
            plans.append(ShardPlan(file, split, format_name, tuple(part)))
    return plans


def _parts(sources: Sequence[Source], shard_bytes: int) -> Iterator[list[Source]]:
    part: list[Source] = []
    size = 0
    for item in sources:
        if part and size + item.size > shard_bytes:
            yield part
            part, size = [], 0
        part.append(item)
        size += item.size
    if part:
        yield part


@dataclass
class SplitStatistics:
    """What is counted over a split; adds up in any order."""

    images: int = 0
    labelled: int = 0
    boxes: Counter[int] = field(default_factory=Counter)
    """Boxes by label, crowd regions included."""
    pixels: Counter[int] = field(default_factory=Counter)
    """Mask pixels by value, void included."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images by (height, width)."""
    histogram: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    """Pixels by channel (R, G, B) and value."""
    repairs: Counter[str] = field(default_factory=Counter)

    def add(self, other: "SplitStatistics") -> None:
        """Count what ``other`` counted as well."""
        self.images += other.images
        self.labelled += other.labelled
        self.boxes.update(other.boxes)
        self.pixels.update(other.pixels)
        self.sizes.update(other.sizes)
        self.histogram += other.histogram
        self.repairs.update(other.repairs)


@dataclass
class WrittenShard:
    """What one task returns: small, whatever the size of its images."""

    split: str
    sources: int
    sums: SplitStatistics
    digests: list[tuple[str, str, str | None]]
    """(image_id, sha256 of the encoded image, sha256 of the labels) of each row."""
    rejects: list[Reject]
    file: dict[str, Any] | None
    """Size, sha256, rows and row groups of the shard; None if no row was good."""


@dataclass
class _Row:
    values: dict[str, Any]
    label_sha256: str | None
    num_bytes: int
    sums: SplitStatistics


def write_shard(plan: ShardPlan, context: Context) -> WrittenShard:
    """Read, validate and convert the sources of ``plan``, and publish its shard.

    Rows keep the order of the plan. What cannot be used becomes a reject; only storage that cannot be
    written raises.
    """
    out = WrittenShard(plan.split, len(plan.sources), SplitStatistics(), [], [], None)

    def good() -> Iterator[_Row]:
        for result in _results(plan, context):
            if isinstance(result, Reject):
                out.rejects.append(result)
                continue
            values = result.values
            out.sums.add(result.sums)
            out.digests.append((values["image_id"], values["sha256"], result.label_sha256))
            yield result

    rows = good()
    first = next(rows, None)
    if first is not None:
        out.file = _write_file(plan.uri, first, rows)
    return out


def _results(plan: ShardPlan, context: Context) -> Iterator[_Row | Reject]:
    with ThreadPoolExecutor(THREADS, "ingest") as pool:
        # A window at a time: what is ready but not yet written is bounded.
        for start in range(0, len(plan.sources), 4 * THREADS):
            window = plan.sources[start : start + 4 * THREADS]
            yield from pool.map(lambda source: _row(source, plan, context), window)


def _row(source: Source, plan: ShardPlan, context: Context) -> _Row | Reject:
    """One source as a row of ``schema.DATASET``, or why not."""
    uri = source.image_uri or f"{plan.format}:{source.image_id}"
    try:
        if source.image_uri is None:
            data, labels = FORMATS[plan.format].generate(source, context)
        else:
            data, labels = _fetch(source.image_uri), None
        info, pixels = probe(data), decode(data)
        if labels is None and source.labelled:
            uri = source.label_uri or uri
            label = _fetch(source.label_uri) if source.label_uri else source.label or b""
            if len(label) > MAX_BYTES:
                raise LabelError("error", f"label file has more than {MAX_BYTES} bytes")
            labels = FORMATS[plan.format].read(source, info, label, context)
    except (DecodeError, LabelError) as error:
        return Reject(uri, error.reason, error.detail)
    labels = labels or Labels()
    values: dict[str, Any] = {
        "image_id": source.image_id,
        "uri": source.image_uri or uri,
        "sha256": hashlib.sha256(data).hexdigest(),
        "image": None if context.settings.referenced else data,
        "height": info.height,
        "width": info.width,
        "orientation": info.orientation,
        "split": plan.split,
        "mask": None if labels.mask is None else schema.pack_map(np.ascontiguousarray(labels.mask).tobytes()),
        "boxes": labels.boxes,
        "tags": labels.tags,
        "shapes": labels.shapes,
        "label_source": _label_source(source),
        "label_confidence": None,
    }
    digest = _label_digest(labels) if source.labelled else None
    return _Row(values, digest, len(data) + len(values["mask"] or b""), _sums(source, labels, pixels))


def _label_source(source: Source) -> str | None:
    if not source.labelled:
        return None
    return "human" if source.image_uri is not None else "generated"


def _fetch(uri: str) -> bytes:
    """The object; what fails is a DecodeError with a word of ``schema.STATUSES``."""
    try:
        return storage.read_bytes(uri, MAX_BYTES + 1)
    except OSError as error:
        text = one_line(error)
        raise DecodeError(storage.error_status(error), f"'{uri}' could not be read: {text}") from None


def _label_digest(labels: Labels) -> str:
    """sha256 of the labels in our own conventions, so that it does not depend on how they were written."""
    digest = hashlib.sha256()
    if labels.mask is not None:
        digest.update(f"mask {labels.mask.shape}".encode())
        digest.update(np.ascontiguousarray(labels.mask).tobytes())
    plain = {"boxes": labels.boxes, "tags": labels.tags, "shapes": labels.shapes}
    digest.update(json.dumps(plain, sort_keys=True, default=_hashed).encode())
    return digest.hexdigest()


def _hashed(value: Any) -> str:
    return hashlib.sha256(value).hexdigest()


def _sums(source: Source, labels: Labels, pixels: np.ndarray) -> SplitStatistics:
    out = SplitStatistics(images=1, labelled=int(source.labelled), repairs=Counter(labels.repairs))
    out.boxes.update(box["label"] for box in labels.boxes or [])
    if labels.mask is not None:
        counts = np.bincount(labels.mask.ravel(), minlength=256)
        out.pixels.update({int(value): int(counts[value]) for value in np.flatnonzero(counts)})
    out.sizes[pixels.shape[0], pixels.shape[1]] += 1
    out.histogram = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
    return out


class _Hashing(io.RawIOBase):
    """A binary stream that passes on what is written, and knows its size and sha256."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._at, self._digest = stream, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._stream.write(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def digest(self) -> dict[str, Any]:
        return {"size": self._at, "sha256": self._digest.hexdigest()}


def _write_file(uri: str, first: _Row, rest: Iterator[_Row]) -> dict[str, Any]:
    with storage.publish(uri) as stream:
        hashing = _Hashing(stream)
        writer = pq.ParquetWriter(hashing, schema.DATASET, **_options())
        group, num_bytes = [first.values], first.num_bytes
        sizes: list[list[int]] = []
        for row in rest:
            if len(group) >= ROW_GROUP_ROWS or num_bytes + row.num_bytes > ROW_GROUP_BYTES:
                sizes.append(_flush(writer, group, num_bytes))
                group, num_bytes = [], 0
            group.append(row.values)
            num_bytes += row.num_bytes
        sizes.append(_flush(writer, group, num_bytes))
        writer.close()
    return {**hashing.digest(), "rows": sum(rows for rows, _ in sizes), "row_groups": sizes}


def _flush(writer: pq.ParquetWriter, rows: Sequence[dict[str, Any]], num_bytes: int) -> list[int]:
    """[rows, bytes of their encoded images and masks, whether those are in the file or only referred to]."""
    table = pa.Table.from_pylist(list(rows), schema.DATASET)
    writer.write_table(table, row_group_size=len(rows))
    return [len(rows), num_bytes]


@cache
def _options() -> dict[str, Any]:
    """Columns that are compressed already are stored as they are, without dictionary or statistics."""
    buffer = pa.BufferOutputStream()
    pq.write_table(schema.DATASET.empty_table(), buffer)
    columns = pq.ParquetFile(pa.BufferReader(buffer.getvalue())).schema
    paths = [columns.column(index).path for index in range(len(columns))]
    stored = ("image", "mask", "shapes.list.element.mask")
    return {
        "compression": {path: "NONE" if path in stored else "ZSTD" for path in paths},
        "use_dictionary": ["split", "label_source"],
        "write_statistics": ["image_id", "height", "width", "split"],
        "write_page_checksum": True,
    }
