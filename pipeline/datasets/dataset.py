"""A dataset as it lies on storage: opened, described, its row groups."""

import json
from dataclasses import dataclass
from typing import Any

from pipeline import schema, storage
from pipeline.datasets.shard_reader import RowGroup
from pipeline.errors import InputError, one_line
from pipeline.storage import checksum

DATASET_JSON = "dataset.json"


@dataclass(frozen=True)
class DatasetInfo:
    """A committed dataset, as dataset.json says."""

    uri: str
    name: str
    classes: tuple[str, ...]
    background: int | None
    """Label of the class ``background``, or None."""
    tasks: tuple[str, ...]
    counts: dict[str, Any]
    """``{split: {images, labelled, boxes {class: n}, pixels {class: n}, void}}``."""
    fingerprint: str
    statistics: dict[str, Any]
    """``mean`` and ``std`` (R, G, B on the 0 to 1 scale), ``height`` and ``width`` of the train images."""
    meta: dict[str, Any]
    """All of dataset.json."""

    @property
    def referenced(self) -> bool:
        """Whether rows only refer to their images."""
        return bool(self.meta.get("referenced"))

    @property
    def num_things(self) -> int:
        """Number of classes that boxes may have: without a trailing background."""
        return len(self.classes) - int(self.background is not None and self.background == len(self.classes) - 1)


def open_dataset(uri: str) -> DatasetInfo:
    """The dataset at ``uri``.

    Raises:
        InputError: There is none, or it was written by another schema version.
    """
    uri = storage.absolute(uri)
    meta = committed_metadata(uri)
    if meta is None:
        raise InputError(f"no dataset at '{uri}': wanted {DATASET_JSON} in it, found none; run dubito ingest first")
    if meta.get("schema_version") != schema.SCHEMA_VERSION:
        raise InputError(
            f"dataset '{uri}' has schema version {meta.get('schema_version')}, this program reads "
            f"{schema.SCHEMA_VERSION}; ingest it again"
        )
    checksum.verify_checksum(meta, storage.join(uri, DATASET_JSON), "ingest again")
    return DatasetInfo(
        uri=uri,
        name=meta["name"],
        classes=tuple(meta["classes"]),
        background=meta["background"],
        tasks=tuple(meta["tasks"]),
        counts=meta["counts"],
        fingerprint=meta["fingerprint"],
        statistics=meta["statistics"],
        meta=meta,
    )


def row_groups(info: DatasetInfo, split: str) -> list[RowGroup]:
    """The row groups of a split, sorted by file and index. No shard is opened: dataset.json has the footers.

    Raises:
        InputError: The split has no rows.
    """
    groups = [
        RowGroup(storage.join(info.uri, file["path"]), index, rows, num_bytes)
        for file in sorted(info.meta["files"], key=lambda file: file["path"])
        if file.get("split") == split
        for index, (rows, num_bytes) in enumerate(file["row_groups"])
    ]
    if not groups:
        splits_with_counts = ", ".join(f"{name} ({part['images']})" for name, part in info.counts.items())
        raise InputError(f"dataset '{info.uri}' has no rows in split '{split}'; those that have: {splits_with_counts}")
    return groups


def committed_metadata(uri: str) -> dict[str, Any] | None:
    """The content of dataset.json; None where nothing was committed."""
    try:
        return json.loads(storage.read_bytes(storage.join(uri, DATASET_JSON)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        text = one_line(error)
        raise InputError(f"'{uri}' could not be read: {text}; check the path and the credentials") from None
    except ValueError:
        raise InputError(f"'{uri}/{DATASET_JSON}' is damaged: not valid JSON; ingest to another place") from None
