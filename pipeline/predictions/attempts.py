"""Attempts at one result: adopt what is finished, check that all is there, commit once."""

import contextlib
import json
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.config import first_difference
from pipeline.errors import InputError
from pipeline.predictions.files import UnitFile, adoptable
from pipeline.schema import SCHEMA_VERSION

MANIFEST, START = "_MANIFEST.json", "_START.json"
THREADS = 16
"""Files read at the same time."""


@dataclass(frozen=True)
class Attempt:
    """A started attempt: where it writes, and the units that earlier attempts had finished."""

    uri: str
    number: int
    digest: str
    adopted: dict[int, UnitFile]

    @property
    def name(self) -> str:
        """The attempt's folder, relative to the folder of predictions."""
        return f"attempt-{self.number}"


def start(uri: str, *, inputs: Mapping[str, Any], digest: str, expected: Mapping[int, int]) -> Attempt:
    """Begin the next attempt: decide, for good, which finished units of earlier attempts it adopts.

    Args:
        uri: The folder of predictions.
        inputs: What the result depends on; kept for whoever looks.
        digest: The plan's digest; only units of the same plan are adopted.
        expected: Rows of each unit of the plan.
    """
    names = [listed.path for listed in storage.list_files(uri)] if storage.exists(uri) else []
    number = 1 + max((attempt_number(name) for name in names), default=-1)
    files = [name for name in names if name.endswith(".parquet") and attempt_number(name) >= 0]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: adoptable(uri, name, digest, expected), files)
        adopted = {item.unit: item for item in found if item is not None}
    while True:
        content = {
            "schema_version": SCHEMA_VERSION,
            "plan": digest,
            "inputs": dict(inputs),
            "adopted": [adopted[unit].listed() for unit in sorted(adopted)],
            # Two drivers with the same inputs must not both become this attempt.
            "driver": secrets.token_hex(8),
        }
        target = storage.join(uri, f"attempt-{number}", START)
        if storage.create_once(target, json.dumps(content, indent=1).encode()):
            return Attempt(uri, number, digest, adopted)
        number += 1


def attempt_number(name: str) -> int:
    """The attempt that a file belongs to, -1 for none."""
    head = name.split("/", 1)[0].removeprefix("attempt-")
    return int(head) if "/" in name and head.isdecimal() and name.startswith("attempt-") else -1


def check(units: Sequence[UnitFile], expected: Mapping[int, int]) -> None:
    """Every unit of the plan once, with all its rows, and no image twice.

    Raises:
        RuntimeError: Rows were lost or doubled; nothing may be committed.
    """
    numbers = sorted(item.unit for item in units)
    rows, wanted = sum(item.rows for item in units), sum(expected.values())
    if numbers != sorted(expected) or rows != wanted:
        raise RuntimeError(
            f"{len(numbers)} units with {rows} rows were scored, the plan has {len(expected)} with {wanted}"
        )
    distinct = len(np.unique(np.concatenate([item.ids for item in units])))
    if distinct != wanted:
        raise RuntimeError(f"{wanted} rows have only {distinct} distinct image_ids")


def commit(
    attempt: Attempt,
    units: Sequence[UnitFile],
    *,
    expected: Mapping[int, int],
    inputs: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Check that the units are whole and commit ``_MANIFEST.json``; the winner's manifest is returned.

    Args:
        attempt: This attempt.
        units: Adopted and newly scored, together.
        expected: Rows of each unit of the plan.
        inputs: What the result depends on; a later job compares its own with these.
        extra: Further keys of the manifest.

    Raises:
        InputError: A job with other inputs committed meanwhile.
    """
    check(units, expected)
    statuses: dict[str, int] = {}
    for item in units:
        for word, count in item.statuses.items():
            statuses[word] = statuses.get(word, 0) + count
    content = {
        "schema_version": SCHEMA_VERSION,
        "plan": attempt.digest,
        "inputs": dict(inputs),
        "attempt": attempt.number,
        "rows": sum(item.rows for item in units),
        "statuses": statuses,
        **extra,
        "files": [item.listed() for item in sorted(units, key=lambda item: item.unit)],
    }
    if storage.create_once(storage.join(attempt.uri, MANIFEST), json.dumps(content, indent=1).encode()):
        _tidy(attempt.uri, {item.file for item in units})
        return content
    won = committed(attempt.uri, inputs)
    if won is None:
        raise RuntimeError(f"'{attempt.uri}': the manifest could neither be written nor read")
    return won


def _tidy(uri: str, kept: set[str]) -> None:
    """Delete unit files that the manifest leaves out, so that tools that glob see each image once too."""
    filesystem, root = storage.arrow(uri)
    for listed in storage.list_files(uri, (".parquet",)):
        if attempt_number(listed.path) >= 0 and listed.path not in kept:
            with contextlib.suppress(OSError):
                filesystem.delete_file(f"{root}/{listed.path}")


def committed(uri: str, inputs: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The manifest at ``uri``, or None where nothing was committed.

    Args:
        uri: The folder of predictions.
        inputs: The inputs that it must have been committed by.

    Raises:
        InputError: It was committed by other inputs; the first difference is named.
    """
    target = storage.join(uri, MANIFEST)
    if not storage.exists(target):
        return None
    try:
        manifest = json.loads(storage.read_text(target, "manifest of predictions"))
        found, _ = manifest["inputs"], manifest["files"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{target}' is not a manifest of predictions; choose another folder") from None
    difference = first_difference(found, dict(inputs)) if inputs is not None else None
    if difference:
        raise InputError(
            f"'{uri}' was committed by other inputs: {difference}; choose another output or delete that one"
        )
    return manifest
