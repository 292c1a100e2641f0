"""The champions of each model: entries ``registry/<name>/<n:06>.json``, each written once; the highest number counts.

A rollback is a new entry that points at an old bundle. Decisions (``decisions/<run>.json``) are kept whether they
promote or not, and so are the digests of the data that a champion was trained on (``digests/<fingerprint>.parquet``):
the data itself may be deleted later. Two runs cannot write the same number: the second one is overtaken, and has to
compare its challenger with the new champion.
"""

import json
import re
import secrets
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline import storage
from pipeline.errors import InputError
from pipeline.storage import checksum

_MODEL_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
_ENTRY_FILE = re.compile(r"^(\d{6})\.json$")
_RESTORE_HINT = "restore it from a copy; entries are never changed"
MAX_DECISIONS_ON_TEST = 20
"""Decisions on one frozen test, from which on a warning is given: champions were chosen on its images by then."""


class OvertakenError(Exception):
    """Another run wrote the entry first."""


@dataclass(frozen=True)
class Entry:
    """One champion."""

    number: int
    """1 is the first."""
    kind: Literal["promotion", "rollback", "manual"]
    bundle: str
    """URI of the bundle."""
    bundle_id: str
    data: str
    """URI of the dataset that it was trained on; '' where not known."""
    fingerprint: str
    """Of that dataset."""
    test: str
    """URI of the frozen test; '' where there was none."""
    test_split: str
    parent: int | None
    """Number of the champion before; None for the first."""
    run: str
    """Id of the scheduled run, or of the command, that made the entry."""
    time: str
    """When it was made: UTC, ISO 8601."""
    reasons: list[str]
    """Why it was made, in sentences."""


def folder(registry: str, name: str) -> str:
    """URI of the folder that holds everything of a model.

    Raises:
        InputError: The name cannot be that of a folder.
    """
    if not _MODEL_NAME.match(name):
        raise InputError(f"name '{name}': wanted letters, digits, '.', '_' and '-', at most 100")
    return storage.join(storage.absolute(registry), name)


def names(registry: str) -> list[str]:
    """Models that have a champion, sorted."""
    registry = storage.absolute(registry)
    folders = storage.names_in(registry, folders=True)
    return [name for name in folders if _MODEL_NAME.match(name) and _numbers(registry, name)]


def _numbers(registry: str, name: str) -> list[int]:
    """Numbers of a model's entries, ascending; they are complete, or an InputError names the first that is missing."""
    matches = (_ENTRY_FILE.match(file) for file in storage.names_in(folder(registry, name)))
    numbers = sorted(int(match[1]) for match in matches if match)
    if numbers and numbers != list(range(1, len(numbers) + 1)):
        missing = next(n for n in range(1, numbers[-1]) if n not in numbers)
        raise InputError(f"'{_uri(registry, name, missing)}' is missing, but later entries are there; {_RESTORE_HINT}")
    return numbers


def _uri(registry: str, name: str, number: int) -> str:
    return storage.join(folder(registry, name), f"{number:06d}.json")


def entries(registry: str, name: str) -> list[Entry]:
    """All entries of a model, the first one first.

    Raises:
        InputError: An entry is damaged or missing.
    """
    return [entry(registry, name, number) for number in _numbers(registry, name)]


def entry(registry: str, name: str, number: int) -> Entry:
    """The entry of a number.

    Raises:
        InputError: There is none of that number, or it is damaged.
    """
    uri = _uri(registry, name, number)
    try:
        content = json.loads(storage.read_text(uri, "registry entry"))
    except ValueError as error:
        if isinstance(error, InputError):  # from read_text: it says already what is wrong
            raise
        raise InputError(f"'{uri}' is not JSON; {_RESTORE_HINT}") from None
    checksum.verify_checksum(content, uri, _RESTORE_HINT)
    if content["number"] != number:
        raise InputError(f"'{uri}' is a copy of entry {content['number']}; {_RESTORE_HINT}")
    return Entry(**{field.name: content[field.name] for field in fields(Entry)})


def champion(registry: str, name: str) -> Entry | None:
    """The entry with the highest number; None before the first."""
    numbers = _numbers(registry, name)
    return entry(registry, name, numbers[-1]) if numbers else None


def add(registry: str, name: str, after: int, **values: Any) -> Entry:
    """Write the entry that follows number ``after`` (0: the first), which makes its bundle champion.

    Args:
        registry: URI.
        name: Of the model.
        after: Number of the champion that the decision was made against.
        **values: The other fields of ``Entry``; the same ``run`` twice makes one entry.

    Returns:
        The entry as it is stored: an earlier one of the same run, if there is one.

    Raises:
        InputError: Entry ``after`` does not exist yet.
        OvertakenError: Another run's entry has that number.
    """
    count = len(_numbers(registry, name))
    if after > count:
        raise InputError(f"'{name}' has {count} champions; number {after + 1} cannot follow them")
    new = Entry(number=after + 1, parent=after or None, time=_now(), **values)
    uri = _uri(registry, name, new.number)
    content = json.dumps(checksum.with_checksum(asdict(new)), indent=1, sort_keys=True).encode()
    # Of all runs that want this number one creates the file. A run that died after it finds its own entry here.
    created = storage.create_once(uri, content)
    stored = new if created else entry(registry, name, new.number)
    if stored.run != new.run:
        raise OvertakenError(f"entry {new.number} of '{name}' was made by run {stored.run} meanwhile")
    return stored


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def promote(registry: str, name: str, bundle: str) -> Entry:
    """Make a bundle champion by hand, without a comparison.

    Raises:
        InputError: No such bundle, or it is the champion already.
        OvertakenError: Another run wrote the entry first.
    """
    from pipeline.models.bundle import open_bundle  # not above: torch takes seconds, and listing champions needs none

    opened, last = open_bundle(bundle), champion(registry, name)
    if last is not None and last.bundle_id == opened.id:
        raise InputError(f"bundle '{opened.uri}' (id {opened.id}) is the champion of '{name}' already")
    # The frozen test stays that of the champion before, so that later challengers are compared on the same images.
    return add(
        registry,
        name,
        after=0 if last is None else last.number,
        kind="manual",
        bundle=opened.uri,
        bundle_id=opened.id,
        data="",
        fingerprint=opened.manifest["data"].get("fingerprint", ""),
        test="" if last is None else last.test,
        test_split="test" if last is None else last.test_split,
        run=_command_id("promote"),
        reasons=["promoted by hand"],
    )


def rollback(registry: str, name: str, number: int | None = None) -> Entry:
    """Make an earlier champion's bundle champion again: a new entry.

    Args:
        registry: URI.
        name: Of the model.
        number: Of the entry to go back to; None: the last one with another bundle than the champion's.

    Raises:
        InputError: There is no such entry, its bundle is gone or another one now, or it is the champion already.
        OvertakenError: Another run wrote the entry first.
    """
    from pipeline.models.bundle import open_bundle

    history = entries(registry, name)
    if not history:
        raise InputError(f"'{name}' has no champion in '{registry}'; there is nothing to go back to")
    last = history[-1]
    earlier = [entry for entry in history if entry.bundle_id != last.bundle_id and number in (None, entry.number)]
    if not earlier:
        target_text = "an earlier one with another bundle" if number is None else f"number {number}"
        listed = ", ".join(f"{entry.number} ({entry.bundle_id})" for entry in history)
        raise InputError(
            f"cannot go back to {target_text}: the champion of '{name}' is {last.bundle_id}; known: {listed}"
        )
    target = earlier[-1]
    # A bundle may have been replaced at its place since: then it is not the one that was champion.
    if open_bundle(target.bundle).id != target.bundle_id:
        raise InputError(f"'{target.bundle}' is no longer the bundle {target.bundle_id} of entry {target.number}")
    copied = ("bundle", "bundle_id", "data", "fingerprint", "test", "test_split")
    return add(
        registry,
        name,
        after=last.number,
        kind="rollback",
        run=_command_id("rollback"),
        reasons=[f"back to entry {target.number}"],
        **{key: getattr(target, key) for key in copied},
    )


def _command_id(command: str) -> str:
    """Names the entry's maker where no scheduled run made it; no two commands share one."""
    return f"{command}-{secrets.token_hex(6)}"


def _decision_uri(registry: str, name: str, run: str) -> str:
    return storage.join(folder(registry, name), "decisions", f"{run}.json")


def record_decision(registry: str, name: str, run: str, record: dict[str, Any]) -> dict[str, Any]:
    """Store a decision for good; returns what is stored: an earlier decision, if the run had made one before."""
    uri = _decision_uri(registry, name, run)
    content = json.dumps(checksum.with_checksum({"run": run, "time": _now(), **record}), indent=1, sort_keys=True)
    storage.create_once(uri, content.encode())
    stored = decision(registry, name, run)
    assert stored is not None
    return stored


def decision(registry: str, name: str, run: str) -> dict[str, Any] | None:
    """What a run decided; None where it has not.

    Raises:
        InputError: It is damaged.
    """
    uri = _decision_uri(registry, name, run)
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    try:
        stored = json.loads(content)
    except ValueError:
        raise InputError(f"'{uri}' is not JSON; {_RESTORE_HINT}") from None
    checksum.verify_checksum(stored, uri, _RESTORE_HINT)
    return stored


def decisions(registry: str, name: str) -> list[dict[str, Any]]:
    """All decisions on a model, in the order of time."""
    uri = storage.join(folder(registry, name), "decisions")
    runs = [file.removesuffix(".json") for file in storage.names_in(uri) if file.endswith(".json")]
    stored = [record for record in (decision(registry, name, run) for run in runs) if record is not None]
    return sorted(stored, key=lambda record: (record["time"], record["run"]))


def decisions_on_test(registry: str, name: str, fingerprint: str, split: str) -> int:
    """How many decisions were made on this frozen test before."""
    tests = (record.get("test") or {} for record in decisions(registry, name))
    return sum(test.get("fingerprint") == fingerprint and test.get("split") == split for test in tests)
