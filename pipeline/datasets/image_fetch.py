"""Images that a dataset or a listing only refers to: fetched as rows are streamed, a bounded number at a time."""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from pipeline import storage
from pipeline.errors import InputError, one_line
from pipeline.images.decode import MAX_BYTES

THREADS = 16
"""Images fetched at a time by one task: enough to hide an object store's latency."""
AHEAD = 64
"""Images that may be fetched before they are asked for."""
REFERENCE_COLUMNS = ("uri", "sha256")
"""Columns by which a row's image is found, and known again."""


@dataclass(frozen=True)
class Fetched:
    """One image, or why it is not there."""

    data: bytes | None
    status: str
    """A word of ``schema.STATUSES``."""
    error: str | None


def fetch(uri: str, size: int = 0, sha256: str | None = None) -> Fetched:
    """One image, with the patience that storage calls have.

    Args:
        uri: Where it is.
        size: Its bytes as listed, if known.
        sha256: Of the bytes as they were ingested, if known: other bytes are "corrupt".
    """
    too_large = f"image file has {size or 'too many'} bytes; at most {MAX_BYTES} are read"
    if size > MAX_BYTES:
        return Fetched(None, "error", too_large)
    for last in (False, True):
        try:
            data = storage.read_bytes(uri, MAX_BYTES + 1)
        except Exception as error:  # whatever a filesystem raises belongs to this image alone
            text = one_line(f"{type(error).__name__}: {error}")
            return Fetched(None, storage.error_status(error), text)
        if len(data) > MAX_BYTES:
            return Fetched(None, "error", too_large)
        if sha256 is None or hashlib.sha256(data).hexdigest() == sha256:
            return Fetched(data, "ok", None)
        if last:
            break
    return Fetched(None, "corrupt", "sha256 differs from what was ingested: the file was damaged or changed since")


def fetch_images(uris: Sequence[str], sizes: Sequence[int]) -> list[Fetched]:
    """Each image, in order."""
    with ThreadPoolExecutor(THREADS, "fetch") as pool:
        return list(pool.map(fetch, uris, sizes))


def with_images(table: pa.Table) -> pa.Table:
    """Rows with ``image`` in the place of null, and ``status`` and ``error`` of each."""
    ((rows, fetched_images),) = _fetch_ahead(iter([table]))
    statuses = ["ok" if item is None else item.status for item in fetched_images]
    errors = [None if item is None else item.error for item in fetched_images]
    table = _fill_images(rows, fetched_images).append_column("status", pa.array(statuses, pa.string()))
    return table.append_column("error", pa.array(errors, pa.string()))


def require_images(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables whose every row holds its image; those of referenced images are fetched up to ``AHEAD`` images ahead.

    Args:
        tables: All with the same columns. Rows that may refer to their images have ``REFERENCE_COLUMNS``, which are
            dropped; tables without them hold their images, and pass as they are.

    Raises:
        InputError: An image cannot be had; it names the image.
    """
    tables = iter(tables)
    first = next(tables, None)
    if first is None:
        return
    tables = itertools.chain([first], tables)
    # Packed rows cost nothing here: no thread is started for them, no column is touched.
    if not set(REFERENCE_COLUMNS) <= set(first.column_names):
        yield from tables
        return
    for table, fetched_images in _fetch_ahead(tables):
        for row, fetched in enumerate(fetched_images):
            if fetched is not None and fetched.data is None:
                name, uri = table["image_id"][row].as_py(), table["uri"][row].as_py()
                raise InputError(
                    f"image '{name}' of the dataset is {fetched.status} at '{uri}': {fetched.error}; "
                    "put it back, or ingest again without it"
                )
        yield _fill_images(table, fetched_images).drop_columns(
            [name for name in REFERENCE_COLUMNS if name in table.column_names]
        )


def _fetch_ahead(tables: Iterable[pa.Table]) -> Iterator[tuple[pa.Table, list[Fetched | None]]]:
    """Each table with what was fetched for its rows; None where the image is in the row."""
    waiting: deque[tuple[pa.Table, list[Future[Fetched] | None]]] = deque()
    with ThreadPoolExecutor(THREADS, "fetch") as pool:
        try:
            for table in tables:
                waiting.append((table, _start_fetches(pool, table)))
                while sum(table.num_rows for table, _ in waiting) > AHEAD:
                    yield _wait_for_fetches(*waiting.popleft())
            while waiting:
                yield _wait_for_fetches(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_fetches(pool: ThreadPoolExecutor, table: pa.Table) -> list[Future[Fetched] | None]:
    absent = [not value.is_valid for value in table["image"]]
    if not any(absent):
        return [None] * table.num_rows
    digests = table["sha256"].to_pylist() if "sha256" in table.column_names else [None] * table.num_rows
    fetches = zip(absent, table["uri"].to_pylist(), digests, strict=True)
    return [pool.submit(fetch, uri, 0, sha256) if gone else None for gone, uri, sha256 in fetches]


def _wait_for_fetches(table: pa.Table, fetches: list[Future[Fetched] | None]) -> tuple[pa.Table, list[Fetched | None]]:
    return table, [None if future is None else future.result() for future in fetches]


def _fill_images(table: pa.Table, fetched_images: list[Fetched | None]) -> pa.Table:
    if all(item is None for item in fetched_images):
        return table
    pairs = zip(table["image"], fetched_images, strict=True)
    images = [value.as_py() if item is None else item.data for value, item in pairs]
    return table.set_column(table.column_names.index("image"), "image", pa.array(images, pa.binary()))
