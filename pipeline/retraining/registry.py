"""Champions, in a row that only grows: ``registry/<name>/<n:06>.json``, each made once; the highest number counts.

A rollback is a new number that points at an old bundle. Decisions (``decisions/<run>.json``) are kept whether they
promote or not, and so are digests of the data that a champion saw (``digests/<fingerprint>.parquet``), which may be
deleted later. Two who want the same number cannot both have it: the other is overtaken, and has to judge anew.
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

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
_ENTRY = re.compile(r"^(\d{6})\.json$")
_SEALED = "restore it from a copy; entries are never changed"
MAX_DECISIONS_ON_TEST = 20
"""From so many looks at one frozen test on, its figures are no longer of images that nothing was chosen on."""


class OvertakenError(Exception):
    """Somebody else became champion meanwhile."""


@dataclass(frozen=True)
class Entry:
    """One champion."""

    number: int
    kind: Literal["promotion", "rollback", "manual"]
    bundle: str
    """URI."""
    bundle_id: str
    data: str
    """URI of the dataset that it was trained on; '' where not known."""
    fingerprint: str
    test: str
    """URI of the frozen test; '' where there was none."""
    test_split: str
    parent: int | None
    """The number that was champion before."""
    run: str
    """Who made the entry: id of the scheduled run, or of the command."""
    time: str
    """UTC, ISO 8601."""
    reasons: list[str]


def folder(registry: str, name: str) -> str:
    """Where everything of a model lies.

    Raises:
        InputError: The name cannot be one of a folder.
    """
    if not _NAME.match(name):
        raise InputError(f"name '{name}': wanted letters, digits, '.', '_' and '-', at most 100")
    return storage.join(storage.absolute(registry), name)


def names(registry: str) -> list[str]:
    """Models that have a champion, sorted."""
    registry = storage.absolute(registry)
    return [name for name in storage.names_in(registry, folders=True) if _NAME.match(name) and _numbers(registry, name)]


def _numbers(registry: str, name: str) -> list[int]:
    found = (_ENTRY.match(file) for file in storage.names_in(folder(registry, name)))
    numbers = sorted(int(each[1]) for each in found if each)
    if numbers and numbers != list(range(1, len(numbers) + 1)):
        missing = next(n for n in range(1, numbers[-1]) if n not in numbers)
        raise InputError(f"'{_uri(registry, name, missing)}' is missing, but later entries are there; {_SEALED}")
    return numbers


def _uri(registry: str, name: str, number: int) -> str:
    return storage.join(folder(registry, name), f"{number:06d}.json")


def entries(registry: str, name: str) -> list[Entry]:
    """All champions that there were, the first one first.

    Raises:
        InputError: One is damaged or missing.
    """
    return [entry(registry, name, number) for number in _numbers(registry, name)]


def entry(registry: str, name: str, number: int) -> Entry:
    """One of them.

    Raises:
        InputError: There is none of that number, or it is damaged.
    """
    uri = _uri(registry, name, number)
    try:
        found = json.loads(storage.read_text(uri, "registry entry"))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{uri}' is not JSON; {_SEALED}") from None
    checksum.verify_checksum(found, uri, _SEALED)
    if found["number"] != number:
        raise InputError(f"'{uri}' is a copy of entry {found['number']}; {_SEALED}")
    return Entry(**{each.name: found[each.name] for each in fields(Entry)})


def champion(registry: str, name: str) -> Entry | None:
    """The entry with the highest number; None before the first."""
    numbers = _numbers(registry, name)
    return entry(registry, name, numbers[-1]) if numbers else None


def add(registry: str, name: str, after: int, **values: Any) -> Entry:
    """Make the champion that follows number ``after`` (0: the first).

    Args:
        registry: URI.
        name: Of the model.
        after: The number that was champion when this was decided.
        **values: The other fields of ``Entry``; ``run`` names who asks, and the same one twice makes one entry.

    Raises:
        OvertakenError: Another run's entry has that number.
    """
    there = len(_numbers(registry, name))
    if after > there:
        raise InputError(f"'{name}' has {there} champions; number {after + 1} cannot follow them")
    made = Entry(number=after + 1, parent=after or None, time=_now(), **values)
    uri = _uri(registry, name, made.number)
    content = json.dumps(checksum.with_checksum(asdict(made)), indent=1, sort_keys=True).encode()
    won = storage.create_once(uri, content)
    kept = made if won else entry(registry, name, made.number)
    if kept.run != made.run:
        raise OvertakenError(f"entry {made.number} of '{name}' was made by run {kept.run} meanwhile")
    return kept


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def promote(registry: str, name: str, bundle: str) -> Entry:
    """Make a bundle champion by hand, unjudged.

    Raises:
        InputError: No such bundle, or it is the champion already.
        OvertakenError: Somebody else made one at the same moment.
    """
    from pipeline.models.bundle import open_bundle  # here, since torch takes seconds, and listing champions needs none

    opened, last = open_bundle(bundle), champion(registry, name)
    if last is not None and last.bundle_id == opened.id:
        raise InputError(f"bundle '{opened.uri}' (id {opened.id}) is the champion of '{name}' already")
    data = opened.manifest["data"]
    test = (last.test, last.test_split) if last is not None else ("", "test")
    return add(
        registry, name, 0 if last is None else last.number, kind="manual", bundle=opened.uri, bundle_id=opened.id,
        data="", fingerprint=data.get("fingerprint", ""), test=test[0], test_split=test[1], run=_by_hand("promote"),
        reasons=["promoted by hand"],
    )  # fmt: skip


def rollback(registry: str, name: str, number: int | None = None) -> Entry:
    """Make an earlier champion's bundle champion again: a new entry.

    Args:
        registry: URI.
        name: Of the model.
        number: Which; None: the last one with another bundle.

    Raises:
        InputError: There is none such, its bundle is gone, or it is the champion already.
        OvertakenError: Somebody else made one at the same moment.
    """
    from pipeline.models.bundle import open_bundle

    every = entries(registry, name)
    if not every:
        raise InputError(f"'{name}' has no champion in '{registry}'; there is nothing to go back to")
    last = every[-1]
    others = [each for each in every if each.bundle_id != last.bundle_id and number in (None, each.number)]
    if not others:
        wanted = "an earlier one with another bundle" if number is None else f"number {number}"
        known = ", ".join(f"{each.number} ({each.bundle_id})" for each in every)
        raise InputError(f"cannot go back to {wanted}: the champion of '{name}' is {last.bundle_id}; known: {known}")
    target = others[-1]
    if open_bundle(target.bundle).id != target.bundle_id:
        raise InputError(f"'{target.bundle}' is no longer the bundle {target.bundle_id} of entry {target.number}")
    kept = {key: getattr(target, key) for key in ("bundle", "bundle_id", "data", "fingerprint", "test", "test_split")}
    reasons = [f"back to entry {target.number}"]
    return add(registry, name, last.number, kind="rollback", run=_by_hand("rollback"), reasons=reasons, **kept)


def _by_hand(what: str) -> str:
    return f"{what}-{secrets.token_hex(6)}"


def _decision_uri(registry: str, name: str, run: str) -> str:
    return storage.join(folder(registry, name), "decisions", f"{run}.json")


def record_decision(registry: str, name: str, run: str, record: dict[str, Any]) -> dict[str, Any]:
    """Keep a decision, for good; returns what is kept, which is an earlier one if the run had decided before."""
    uri = _decision_uri(registry, name, run)
    content = json.dumps(checksum.with_checksum({"run": run, "time": _now(), **record}), indent=1, sort_keys=True)
    storage.create_once(uri, content.encode())
    found = decision(registry, name, run)
    assert found is not None
    return found


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
        found = json.loads(content)
    except ValueError:
        raise InputError(f"'{uri}' is not JSON; {_SEALED}") from None
    checksum.verify_checksum(found, uri, _SEALED)
    return found


def decisions(registry: str, name: str) -> list[dict[str, Any]]:
    """All decisions, in the order of time."""
    where = storage.join(folder(registry, name), "decisions")
    runs = [file.removesuffix(".json") for file in storage.names_in(where) if file.endswith(".json")]
    found = [each for each in (decision(registry, name, run) for run in runs) if each is not None]
    return sorted(found, key=lambda each: (each["time"], each["run"]))


def decisions_on_test(registry: str, name: str, fingerprint: str, split: str) -> int:
    """How many decisions were made on this frozen test before."""
    wanted = {"fingerprint": fingerprint, "split": split}
    tests = (each.get("test") or {} for each in decisions(registry, name))
    return sum({key: test.get(key) for key in wanted} == wanted for test in tests)
