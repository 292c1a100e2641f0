"""What ``limits`` asks an S3 server on this machine, and how often."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.scale import ten_million_ids
from infra.local.fault_proxy import FaultProxy
from pipeline import predictions, schema, storage
from pipeline.predictions.unit_file import adoptable
from pipeline.scoring.unit_reader import read_unit

METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")


@contextmanager
def counted(proxy: FaultProxy) -> Iterator[Counter[str]]:
    """Requests by method while the block runs."""
    found: Counter[str] = Counter()
    proxy.clear()
    yield found
    found.update(method for method, _, _ in proxy.log)


def image_table(rows: int, size: int) -> pa.Table:
    """Rows of a dataset whose images are noise of ``size`` bytes."""
    random = np.random.default_rng(0)
    images = [random.bytes(size) for _ in range(rows)]
    return ten_million_ids.nulls(
        schema.DATASET, rows, image_id=ten_million_ids.ids_of(0, rows), image=pa.array(images, pa.binary()),
        sha256=pa.array([random.bytes(32).hex() for _ in range(rows)]),
    )  # fmt: skip


def scored_table(rows: int) -> pa.Table:
    """Rows of predictions as a job writes them for images that are not there."""
    return ten_million_ids.nulls(
        schema.PREDICTIONS["segmentation"], rows, image_id=ten_million_ids.ids_of(0, rows),
        status=ten_million_ids.constant("missing", rows, pa.string()),
    )  # fmt: skip


def counted_requests(uri: str, proxy: FaultProxy) -> dict[str, dict[str, float]]:
    """Requests by method that each of the things takes which a job does with a unit, an image or a result."""
    table, sink = image_table(2 * ten_million_ids.GROUP, 1000), pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ten_million_ids.GROUP, write_page_checksum=True)
    storage.write_bytes(f"{uri}/data/test-00000.parquet", sink.getvalue().to_pybytes())
    names = [f"{number:03d}.jpg" for number in range(16)]
    for name in names:
        storage.write_bytes(f"{uri}/images/{name}", b"x" * 1000)
    source = {"file": "data/test-00000.parquet", "group": 1, "group_rows": ten_million_ids.GROUP, "start": 0}
    page = {"root": f"{uri}/images", "paths": names, "sizes": [1000] * len(names)}
    columns = ["image_id", "uri", "sha256", "image", "height", "width"]
    done: list[Any] = []

    def write() -> None:
        rows = scored_table(ten_million_ids.GROUP)
        done.append(predictions.write_unit(uri, "attempt-0", 0, rows, digest="plan", sources=[]))

    def adopt() -> None:
        assert (
            adoptable(uri, done[0].file, "plan", pa.chunked_array([ten_million_ids.ids_of(0, ten_million_ids.GROUP)]))
            is not None
        )

    def pages() -> None:
        assert len(storage.list_files(f"{uri}/images")) == len(names)

    things: dict[str, tuple[int, Callable[[], Any]]] = {
        "read a unit of a dataset": (1, lambda: read_unit(source, ten_million_ids.GROUP, uri, columns)),
        "fetch an image of a folder": (len(names), lambda: read_unit(page, len(names), "", ())),
        "write a unit": (1, write),
        "adopt a unit": (1, adopt),
        "list a page": (1, pages),
        "commit": (1, lambda: storage.create_once(f"{uri}/_MANIFEST.json", b"{}")),
    }
    out = {}
    for name, (number, call) in things.items():
        with counted(proxy) as found:
            call()
        out[name] = {method: found[method] / number for method in METHODS if found[method]}
    return out


def listing(uri: str, keys: int) -> dict[str, float]:
    """Listing a folder of so many objects of a byte."""

    def put(number: int) -> None:
        storage.write_bytes(f"{uri}/many/image-{number:09d}.jpg", b"x")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(keys)))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        assert len(storage.list_files(f"{uri}/many")) == keys
        seconds.append(time.perf_counter() - began)
    return {"keys a second": keys / float(np.median(seconds))}
