"""Images that a dataset or a listing only refers to: fetched as rows are streamed, a bounded number at a time."""

import hashlib
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


def may_be_referenced(columns: Sequence[str]) -> bool:
    """Whether rows with these columns may only refer to their images."""
    return set(REFERENCE_COLUMNS) <= set(columns)


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
    ((rows, found),) = _each(iter([table]))
    words = ["ok" if item is None else item.status for item in found]
    errors = [None if item is None else item.error for item in found]
    table = _with_images(rows, found).append_column("status", pa.array(words, pa.string()))
    return table.append_column("error", pa.array(errors, pa.string()))


def require_images(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables with ``image`` in the place of null, and without ``WANTED``: up to ``AHEAD`` images ahead.

    Raises:
        InputError: An image cannot be had; it names the image.
    """
    for table, found in _each(tables):
        for row, item in enumerate(found):
            if item is not None and item.data is None:
                name, uri = table["image_id"][row].as_py(), table["uri"][row].as_py()
                raise InputError(
                    f"image '{name}' of the dataset is {item.status} at '{uri}': {item.error}; "
                    "put it back, or ingest again without it"
                )
        yield _with_images(table, found).drop_columns(
            [name for name in REFERENCE_COLUMNS if name in table.column_names]
        )


def _each(tables: Iterable[pa.Table]) -> Iterator[tuple[pa.Table, list[Fetched | None]]]:
    """Each table with what was fetched for its rows; None where the image is in the row."""
    waiting: deque[tuple[pa.Table, list[Future[Fetched] | None]]] = deque()
    with ThreadPoolExecutor(THREADS, "fetch") as pool:
        try:
            for table in tables:
                waiting.append((table, _ask(pool, table)))
                while sum(each.num_rows for each, _ in waiting) > AHEAD:
                    yield _answer(*waiting.popleft())
            while waiting:
                yield _answer(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _ask(pool: ThreadPoolExecutor, table: pa.Table) -> list[Future[Fetched] | None]:
    absent = [not value.is_valid for value in table["image"]]
    if not any(absent):
        return [None] * table.num_rows
    digests = table["sha256"].to_pylist() if "sha256" in table.column_names else [None] * table.num_rows
    found = zip(absent, table["uri"].to_pylist(), digests, strict=True)
    return [pool.submit(fetch, uri, 0, sha256) if gone else None for gone, uri, sha256 in found]


def _answer(table: pa.Table, asked: list[Future[Fetched] | None]) -> tuple[pa.Table, list[Fetched | None]]:
    return table, [None if future is None else future.result() for future in asked]


def _with_images(table: pa.Table, found: list[Fetched | None]) -> pa.Table:
    if all(item is None for item in found):
        return table
    pairs = zip(table["image"], found, strict=True)
    images = [value.as_py() if item is None else item.data for value, item in pairs]
    return table.set_column(table.column_names.index("image"), "image", pa.array(images, pa.binary()))
