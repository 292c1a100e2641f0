"""Whether what lies on storage is what was committed: every file of a dataset, a bundle or predictions."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray.data

from pipeline import predictions, storage
from pipeline.datasets import image_fetch, shard_reader
from pipeline.datasets.dataset import DATASET_JSON, open_dataset
from pipeline.errors import InputError
from pipeline.predictions.attempts import MANIFEST
from pipeline.runtime.progress import Progress, ProgressSink, SilentSink
from pipeline.schema import BUNDLE_JSON

CHUNK = 8 * 2**20
TRIES = 3
TASKS = 1000
"""At most, however many files there are."""


def verify(uri: str, sink: ProgressSink | None = None) -> dict[str, Any]:
    """Read every file that is named by what committed ``uri``, and compare size and sha256; Ray must be running.

    Args:
        uri: A dataset, a bundle, or a folder of predictions.
        sink: Where progress goes.

    Returns:
        ``uri, kind, files, bytes, seconds`` and ``damage``: a list of ``{file, problem}``, sorted by file. The images
        that a referenced dataset refers to count as its files.

    Raises:
        InputError: Nothing is committed there, or what commits it is damaged itself.
    """
    start_s, uri = time.monotonic(), storage.absolute(uri)
    kind, files = _committed_files(uri)
    progress, damage = Progress(sink or SilentSink(), "verify", len(files), unit="files"), []
    ray.data.DataContext.get_current().enable_progress_bars = False
    entries = [{"file": path, "size": entry["size"], "sha256": entry["sha256"]} for path, entry in files.items()]
    images, image_bytes = 0, 0
    for row in _map_in_tasks(entries, _FileComparison(uri)):
        progress.advance(1)
        if row["problem"]:
            damage.append({"file": storage.join(uri, row["file"]), "problem": row["problem"]})
    if kind == "dataset" and open_dataset(uri).referenced:
        damaged = {item["file"] for item in damage}
        shards = [{"file": file} for item in entries if (file := storage.join(uri, item["file"])) not in damaged]
        shards = [item for item in shards if "/data/" in item["file"].removeprefix(uri)]
        for row in _map_in_tasks(shards, _check_images):
            images, image_bytes = images + row["images"], image_bytes + row["bytes"]
            damage += [{"file": file, "problem": text} for file, text in json.loads(row["problems"])]
    return {
        "uri": uri,
        "kind": kind,
        "files": len(files) + images,
        "bytes": sum(entry["size"] for entry in files.values()) + image_bytes,
        "damage": sorted(damage, key=lambda item: item["file"]),
        "seconds": time.monotonic() - start_s,
    }


def _map_in_tasks(
    items: list[dict[str, Any]], work: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """``map`` as Ray Data tasks; results in any order."""
    if items:
        yield from ray.data.from_items(items, override_num_blocks=min(len(items), TASKS)).map(work).iter_rows()


def _check_images(row: dict[str, Any]) -> dict[str, Any]:
    """The images that one shard refers to: fetched, and compared with the hashes that were ingested."""
    images, size, problems = 0, 0, []
    for group in shard_reader.groups_of(row["file"]):
        table = shard_reader.read_row_group(group, ["image", *image_fetch.REFERENCE_COLUMNS])
        for start in range(0, table.num_rows, image_fetch.AHEAD):
            fetched = image_fetch.with_images(table.slice(start, image_fetch.AHEAD))
            size += sum(len(image) for image in fetched["image"].to_pylist() if image)
            outcomes = zip(
                fetched["uri"].to_pylist(),
                fetched["status"].to_pylist(),
                fetched["error"].to_pylist(),
                strict=True,
            )
            problems += [(uri, f"{status}: {error}") for uri, status, error in outcomes if status != "ok"]
        images += table.num_rows
    return {"images": images, "bytes": size, "problems": json.dumps(problems)}


def _committed_files(uri: str) -> tuple[str, Mapping[str, Any]]:
    """(kind, {path: {size, sha256}}) of what is committed at ``uri``."""
    for kind, (name, files) in _KINDS.items():
        if storage.exists(storage.join(uri, name)):
            return kind, files(uri)
    names = ", ".join(name for name, _ in _KINDS.values())
    raise InputError(f"nothing is committed at '{uri}': wanted one of {names} in it; check the path")


def _dataset_files(uri: str) -> dict[str, Any]:
    return {file["path"]: file for file in open_dataset(uri).meta["files"]}


def _bundle_files(uri: str) -> dict[str, Any]:
    from pipeline.models.bundle import open_bundle  # here, since tasks import this module, and torch takes them seconds

    return open_bundle(uri).manifest["files"]


def _prediction_files(uri: str) -> dict[str, Any]:
    committed = predictions.committed_manifest(uri) or {"lists": []}
    files = {entry["file"]: entry for entry in committed["lists"]}
    for entry in committed["lists"]:
        with contextlib.suppress(InputError):  # the list itself is found damaged; what it names cannot be compared
            files |= {item["file"]: item for item in predictions.read_list(uri, entry)}
    return files


_KINDS: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "dataset": (DATASET_JSON, _dataset_files),
    "bundle": (BUNDLE_JSON, _bundle_files),
    "predictions": (MANIFEST, _prediction_files),
}


class _FileComparison:
    """Runs in tasks: one file -> what is wrong with it, "" for nothing."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        problem = ""
        for left in reversed(range(TRIES)):
            try:
                problem = compare_file(storage.join(self.uri, row["file"]), row["size"], row["sha256"])
                break
            except OSError as error:
                reason = storage.error_status(error)
                problem = reason if reason == "missing" else f"could not be read ({reason})"
                if reason in ("missing", "forbidden") or not left:
                    break
                time.sleep(1)
        return {"file": row["file"], "problem": problem}


def compare_file(uri: str, size: int, sha256: str) -> str:
    """What is wrong with one file; "" for nothing. Reads it in chunks.

    Raises:
        OSError: It could not be read.
    """
    digest, count = hashlib.sha256(), 0
    filesystem, path = storage.arrow(uri)
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            count += len(chunk)
    if count != size:
        return f"{count} bytes where {size} were written"
    return "" if digest.hexdigest() == sha256 else "sha256 differs from what was written"
