"""Attempts at one result: adopt what is finished, check that all is there, commit once."""

import contextlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.config import first_difference
from pipeline.errors import InputError
from pipeline.predictions.file_lists import FOLDER, write_lists
from pipeline.predictions.resume import AdoptableUnits, Mapper, adopt_finished_units, list_attempts
from pipeline.predictions.unit_file import UnitFile, count_statuses
from pipeline.schema import SCHEMA_VERSION
from pipeline.storage import checksum

MANIFEST, START = "_MANIFEST.json", "_START.json"


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


def start_attempt(
    uri: str, *, inputs: Mapping[str, Any], digest: str, groups: Sequence[AdoptableUnits], mapper: Mapper = map
) -> Attempt:
    """Begin the next attempt: decide, for good, which finished units of earlier attempts it adopts.

    Args:
        uri: The folder of predictions.
        inputs: What the result depends on; kept for whoever looks.
        digest: The plan's digest; only units of the same plan are adopted.
        groups: All units of the plan.
        mapper: Who compares what earlier attempts left with the plan, a group a call.
    """
    names = list_attempts(uri)
    number = 1 + max((attempt_number(name) for name in names), default=-1)
    adopted = adopt_finished_units(uri, names, digest, groups, mapper)
    while True:
        content = {
            "schema_version": SCHEMA_VERSION,
            "plan": digest,
            "inputs": dict(inputs),
            "adopted": write_lists(uri, f"adopted-{number}", list(adopted.values())),
            # Two drivers with the same inputs must not both become this attempt.
            "driver": secrets.token_hex(8),
        }
        target = storage.join(uri, f"attempt-{number}", START)
        if storage.create_once(target, _sealed_json(content)):
            return Attempt(uri, number, digest, adopted)
        number += 1


def _sealed_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(checksum.with_checksum(content), indent=1).encode()


def attempt_number(name: str) -> int:
    """The attempt that a file belongs to, -1 for none."""
    head = name.split("/", 1)[0].removeprefix("attempt-")
    return int(head) if "/" in name and head.isdecimal() and name.startswith("attempt-") else -1


def check_complete(units: Sequence[UnitFile], expected: Mapping[int, int]) -> None:
    """Every unit of the plan once, with all its rows.

    That a unit's rows are its images, each once, is checked where it is written, and where it is adopted; that no two
    units share an image is the plan's part.

    Raises:
        RuntimeError: Rows were lost or doubled; nothing may be committed.
    """
    numbers = sorted(item.unit for item in units)
    wrong = sum(item.rows != expected.get(item.unit) for item in units)
    if numbers != sorted(expected) or wrong:
        rows, expected_rows = sum(item.rows for item in units), sum(expected.values())
        raise RuntimeError(
            f"{len(numbers)} units with {rows} rows were scored, the plan has {len(expected)} with {expected_rows}; "
            f"{wrong} have other rows than planned"
        )


def commit_attempt(
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
    check_complete(units, expected)
    content = {
        "schema_version": SCHEMA_VERSION,
        "plan": attempt.digest,
        "inputs": dict(inputs),
        "attempt": attempt.number,
        "rows": sum(item.rows for item in units),
        "statuses": count_statuses(units),
        **extra,
        "lists": write_lists(attempt.uri, f"files-{attempt.number}", units),
    }
    if storage.create_once(storage.join(attempt.uri, MANIFEST), _sealed_json(content)):
        _delete_leftovers(attempt.uri, {item.file for item in units} | {item["file"] for item in content["lists"]})
        return content
    winner = committed_manifest(attempt.uri, inputs)
    if winner is None:
        raise RuntimeError(f"'{attempt.uri}': the manifest could neither be written nor read")
    return winner


def _delete_leftovers(uri: str, kept: set[str]) -> None:
    """Delete unit files and lists that the manifest leaves out, so that tools that glob see each image once too."""
    filesystem, root = storage.arrow(uri)
    for listed in storage.list_files(uri, (".parquet",)):
        belongs = attempt_number(listed.path) >= 0 or listed.path.startswith(f"{FOLDER}/files-")
        if belongs and listed.path not in kept:
            with contextlib.suppress(OSError):
                filesystem.delete_file(f"{root}/{listed.path}")


def committed_manifest(uri: str, inputs: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
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
        committed_inputs, _ = manifest["inputs"], manifest["lists"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{target}' is not a manifest of predictions; choose another folder") from None
    checksum.verify_checksum(manifest, target, "predict again to another folder")
    difference = first_difference(committed_inputs, dict(inputs)) if inputs is not None else None
    if difference:
        raise InputError(
            f"'{uri}' was committed by other inputs: {difference}; choose another output or delete that one"
        )
    return manifest
