"""The row of champions, its decisions, and the lock beside it."""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.errors import InputError
from pipeline.retraining import registry
from pipeline.storage import lease
from tests.support import tiny


def fields(run: str, bundle: str = "s3://b/1", **changes: Any) -> dict[str, Any]:
    """What an entry is made of."""
    values = {
        "kind": "promotion", "bundle": bundle, "bundle_id": f"id-{bundle[-1]}", "data": "s3://d", "fingerprint": "f",
        "test": "s3://t", "test_split": "test", "run": run, "reasons": ["better"],
    }  # fmt: skip
    return values | changes


def test_champions_follow_one_another_and_none_changes(tmp_path: Path):
    where = str(tmp_path)
    assert registry.champion(where, "cells") is None
    assert registry.names(where) == []
    first = registry.add(where, "cells", 0, **fields("a"))
    assert (first.number, first.parent) == (1, None)
    second = registry.add(where, "cells", 1, **fields("b", "s3://b/2"))
    assert registry.champion(where, "cells") == second
    assert registry.entries(where, "cells") == [first, second]
    assert registry.names(where) == ["cells"]
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == ["000001.json", "000002.json"]


def test_the_same_run_makes_one_entry_and_another_is_overtaken(tmp_path: Path):
    where = str(tmp_path)
    first = registry.add(where, "cells", 0, **fields("a"))
    time.sleep(1.1)  # the time of an entry is no part of what makes it the same
    assert registry.add(where, "cells", 0, **fields("a")) == first
    with pytest.raises(registry.OvertakenError, match="entry 1 of 'cells' was made by run a meanwhile"):
        registry.add(where, "cells", 0, **fields("b"))
    assert registry.entries(where, "cells") == [first]


def _race(where: str, run: str, gate: Any, found: Any) -> None:
    gate.wait()
    try:
        registry.add(where, "cells", 0, **fields(run))
        found.put((run, "won"))
    except registry.OvertakenError:
        found.put((run, "overtaken"))


@pytest.mark.parametrize("place", ["local", "s3"])
def test_of_many_processes_that_want_one_number_one_gets_it(place: str, tmp_path: Path, request: Any):
    where = str(tmp_path) if place == "local" else f"{request.getfixturevalue('s3')}/registry-{time.time_ns()}"
    context = multiprocessing.get_context("spawn")
    gate, found = context.Barrier(4), context.Queue()
    racers = [context.Process(target=_race, args=(where, f"run-{n}", gate, found)) for n in range(4)]
    for racer in racers:
        racer.start()
    results = dict(found.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join(30)
        assert racer.exitcode == 0
    won = [run for run, word in results.items() if word == "won"]
    assert len(won) == 1
    champion = registry.champion(where, "cells")
    assert champion is not None
    assert champion.run == won[0]


def test_a_rollback_is_a_new_number(tmp_path: Path):
    where = str(tmp_path / "registry")
    bundles = [tiny.make_bundle(tmp_path / str(n), tiny.UNET, seeds=(n,)) for n in range(2)]
    first = registry.promote(where, "cells", bundles[0])
    with pytest.raises(InputError, match="is the champion of 'cells' already"):
        registry.promote(where, "cells", bundles[0])
    with pytest.raises(InputError, match="cannot go back to an earlier one with another bundle"):
        registry.rollback(where, "cells")
    registry.promote(where, "cells", bundles[1])
    back = registry.rollback(where, "cells")
    assert (back.number, back.kind, back.bundle_id, back.parent) == (3, "rollback", first.bundle_id, 2)
    assert registry.rollback(where, "cells", 2).bundle == storage.absolute(bundles[1])
    with pytest.raises(InputError, match=r"cannot go back to number 9: the champion .* known: 1 \("):
        registry.rollback(where, "cells", 9)
    with pytest.raises(InputError, match="'rbc' has no champion"):
        registry.rollback(where, "rbc")


def test_damage_and_gaps_are_named(tmp_path: Path):
    where = str(tmp_path)
    for number in range(3):
        registry.add(where, "cells", number, **fields(str(number)))
    path = tmp_path / "cells" / "000002.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"bundle": "s3://evil"}))
    with pytest.raises(InputError, match=r"000002.json' is not as it was committed.*entries are never changed"):
        registry.entries(where, "cells")
    path.write_text("{")
    with pytest.raises(InputError, match=r"000002.json' is not JSON"):
        registry.entries(where, "cells")
    path.unlink()
    with pytest.raises(InputError, match=r"000002.json' is missing, but later entries are there"):
        registry.champion(where, "cells")
    with pytest.raises(InputError, match="wanted letters, digits"):
        registry.champion(where, "../cells")


def test_decisions_are_kept_once_and_looks_are_counted(tmp_path: Path):
    where, test = str(tmp_path), {"fingerprint": "f", "split": "test", "uri": "u"}
    assert registry.decision(where, "cells", "a") is None
    assert registry.decisions_on_test(where, "cells", "f", "test") == 0
    first = registry.record_decision(where, "cells", "a", {"promote": True, "test": test})
    assert registry.record_decision(where, "cells", "a", {"promote": False, "test": test}) == first
    registry.record_decision(where, "cells", "b", {"promote": False, "test": test})
    registry.record_decision(where, "cells", "c", {"promote": False, "test": test | {"split": "val"}})
    assert registry.decisions_on_test(where, "cells", "f", "test") == 2
    assert [each["run"] for each in registry.decisions(where, "cells")] == ["a", "b", "c"]
    assert registry.champion(where, "cells") is None, "a decision makes no champion"


def test_the_lock_is_held_by_one_renewed_and_given_back(tmp_path: Path):
    where = str(tmp_path / "locks")
    with lease.hold_lease(where, "run a", 1.0):
        time.sleep(1.6)  # renewed meanwhile
        with pytest.raises(InputError, match="run a holds the lock '.*' on .* since .* UTC, until .* at least"):
            with lease.hold_lease(where, "run b", 1.0):
                raise AssertionError
    with lease.hold_lease(where, "run b", 1.0):
        pass
    with pytest.raises(ZeroDivisionError), lease.hold_lease(where, "run c", 60.0):
        raise ZeroDivisionError
    with lease.hold_lease(where, "run d", 1.0):
        pass


def test_the_lock_of_a_dead_holder_is_taken_over_when_it_expires(tmp_path: Path):
    where = str(tmp_path / "locks")
    lease._acquire(where, "dead", "run a", 0.8)
    with pytest.raises(InputError, match="run a holds the lock"):
        lease._acquire(where, "other", "run b", 1.0)
    time.sleep(0.9)
    assert lease._acquire(where, "other", "run b", 1.0) == 2


def _hold(where: str, gate: Any, found: Any) -> None:
    gate.wait()
    try:
        with lease.hold_lease(where, "a run", 30.0):
            found.put("held")
            time.sleep(2)
    except InputError:
        found.put("refused")


def test_of_many_processes_one_holds_the_lock(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    gate, found = context.Barrier(4), context.Queue()
    racers = [context.Process(target=_hold, args=(str(tmp_path), gate, found)) for _ in range(4)]
    for racer in racers:
        racer.start()
    results = [found.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join(30)
    assert sorted(results) == ["held", *["refused"] * 3]


def test_a_number_that_cannot_be_next_and_a_copy_are_refused(tmp_path: Path):
    where = str(tmp_path)
    registry.add(where, "cells", 0, **fields("a"))
    with pytest.raises(InputError, match="'cells' has 1 champions; number 4 cannot follow them"):
        registry.add(where, "cells", 3, **fields("b"))
    (tmp_path / "cells" / "000002.json").write_bytes((tmp_path / "cells" / "000001.json").read_bytes())
    with pytest.raises(InputError, match=r"000002.json' is a copy of entry 1"):
        registry.champion(where, "cells")
