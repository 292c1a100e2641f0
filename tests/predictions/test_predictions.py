"""Attempts, adoption, commit: whatever happens on the way, each image exactly once, or no manifest."""

import json
import threading
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from pipeline import predictions, storage
from pipeline.errors import InputError
from pipeline.predictions import file_lists
from pipeline.schema import PREDICTIONS

INPUTS = {"bundle_id": "b1", "data": "d1", "splits": ["test"]}
EXPECTED = {0: 3, 1: 3, 2: 2}
DIGEST = "plan"


def rows(unit: int, count: int | None = None) -> pa.Table:
    names = [f"unit{unit}/image{n}.jpg" for n in range(EXPECTED[unit] if count is None else count)]
    columns: dict[str, list[Any]] = {name: [None] * len(names) for name in PREDICTIONS["detection"].names}
    columns["image_id"] = names
    columns["status"] = ["ok"] * (len(names) - 1) + ["corrupt"]
    columns["uncertainty"] = [0.5] * (len(names) - 1) + [None]
    columns["boxes"] = [[{"x1": 1.0, "label": 0, "probabilities": [0.25, 0.75]}]] * (len(names) - 1) + [None]
    return pa.Table.from_pydict(columns, schema=PREDICTIONS["detection"])


class UnitGroup:
    """Units that are adopted together."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def image_ids(self) -> dict[int, pa.ChunkedArray]:
        return {unit: rows(unit)["image_id"] for unit in self.numbers}


GROUPS = [UnitGroup(range(2)), UnitGroup(range(2, 3))]


def begin(uri: Path | str, digest: str = DIGEST) -> predictions.Attempt:
    return predictions.start_attempt(str(uri), inputs=INPUTS, digest=digest, groups=GROUPS)


def listed(folder: Path) -> list[dict[str, Any]]:
    return list(predictions.iter_files(str(folder), json.loads((folder / "_MANIFEST.json").read_text())))


def write(attempt: predictions.Attempt, unit: int, table: pa.Table | None = None, **more: Any) -> predictions.UnitFile:
    table = rows(unit) if table is None else table
    digest = attempt.digest
    return predictions.write_unit(attempt.uri, attempt.name, unit, table, digest=digest, sources=["s"], **more)


def finish(attempt: predictions.Attempt, units: list[predictions.UnitFile], inputs: dict[str, Any] = INPUTS):
    return predictions.commit_attempt(attempt, units, expected=EXPECTED, inputs=inputs, extra={})


@pytest.fixture
def done(tmp_path: Path) -> Path:
    attempt = begin(tmp_path / "p")
    finish(attempt, [write(attempt, unit) for unit in (2, 0, 1)])
    return tmp_path / "p"


def test_rows_come_back_in_the_order_of_the_plan(done: Path):
    table = predictions.read(str(done))
    assert table["image_id"].to_pylist() == [name for unit in EXPECTED for name in rows(unit)["image_id"].to_pylist()]
    assert table.schema == PREDICTIONS["detection"]
    assert predictions.read(str(done), ["image_id", "status"]).column_names == ["image_id", "status"]


def test_the_manifest_counts(done: Path):
    manifest = json.loads((done / "_MANIFEST.json").read_text())
    assert (manifest["rows"], manifest["statuses"]) == (8, {"ok": 5, "corrupt": 3})
    (entry,) = manifest["lists"]
    assert (entry["files"], entry["rows"], entry["size"]) == (3, 8, (done / entry["file"]).stat().st_size)
    assert [item["rows"] for item in listed(done)] == [3, 3, 2]
    assert [json.loads(item["statuses"]) for item in listed(done)] == [{"ok": 2, "corrupt": 1}] * 2 + [
        {"ok": 1, "corrupt": 1}
    ]


def test_many_files_take_several_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_lists, "LIST_FILES", 2)
    attempt = begin(tmp_path / "p")
    manifest = finish(attempt, [write(attempt, unit) for unit in (1, 2, 0)])
    assert [entry["files"] for entry in manifest["lists"]] == [2, 1]
    assert [item["unit"] for item in listed(tmp_path / "p")] == [0, 1, 2]
    assert predictions.read(str(tmp_path / "p")).num_rows == 8


@pytest.mark.parametrize("which", ["manifest", "list"])
def test_what_names_the_files_is_checked_too(done: Path, which: str):
    path = done / "_MANIFEST.json"
    if which == "list":
        path = done / json.loads(path.read_text())["lists"][0]["file"]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_text(path.read_text().replace('"rows": 8', '"rows": 9'))
    with pytest.raises(InputError, match="differs"):
        predictions.read(str(done))


def ask(query: str) -> list[Any]:
    found = duckdb.sql(query)
    assert found is not None
    return found.fetchall()


def test_pandas_polars_and_duckdb_read_the_folder(done: Path):
    pattern = str(done / "attempt-*" / "*.parquet")
    found = [
        pd.read_parquet(done)["image_id"].tolist(),
        pl.read_parquet(pattern)["image_id"].to_list(),
        [row[0] for row in ask(f"select image_id from read_parquet('{pattern}')")],
    ]
    for names in found:
        assert sorted(names) == sorted(predictions.read(str(done))["image_id"].to_pylist())
    (box,) = ask(f"select boxes[1].probabilities from '{pattern}' where status = 'ok' limit 1")
    assert box[0] == [0.25, 0.75]


def test_an_attempt_adopts_what_earlier_ones_finished(tmp_path: Path):
    first = begin(tmp_path / "p")
    kept = write(first, 1, metrics=b"\x00state")
    second = begin(tmp_path / "p")
    assert (first.number, second.number, sorted(second.adopted)) == (0, 1, [1])
    adopted = second.adopted[1]
    assert (adopted.file, adopted.sha256, adopted.metrics) == (kept.file, kept.sha256, b"\x00state")
    assert adopted.statuses == {"ok": 2, "corrupt": 1}
    assert adopted.uncertainty_sum == 1.0
    stored = json.loads((tmp_path / "p/attempt-1/_START.json").read_text())
    assert [item["file"] for item in file_lists.read_list(str(tmp_path / "p"), stored["adopted"][0])] == [kept.file]


def test_damaged_and_foreign_files_are_not_adopted(tmp_path: Path):
    first = begin(tmp_path / "p")
    for unit, damage in ((0, "cut"), (1, "pages")):
        path = tmp_path / "p" / write(first, unit).file
        data = bytearray(path.read_bytes())
        if damage == "cut":
            del data[-20:]
        else:
            data[4:200] = bytes(196)
        path.write_bytes(data)
    write(first, 2, rows(2, count=1))  # fewer rows than planned
    write(first, 2, rows(2).set_column(0, "image_id", pa.array(["unit2/image1.jpg"] * 2)))  # one image twice
    write(first, 2, rows(2).take([1, 0]))  # another order
    assert begin(tmp_path / "p").adopted == {}
    other = begin(tmp_path / "p", digest="other plan")
    for unit in EXPECTED:
        write(other, unit)
    assert begin(tmp_path / "p").adopted == {}
    assert sorted(begin(tmp_path / "p", digest="other plan").adopted) == [0, 1, 2]


def test_a_late_file_of_an_earlier_attempt_is_never_seen(tmp_path: Path):
    zombie = begin(tmp_path / "p")
    attempt = begin(tmp_path / "p")
    units = [write(attempt, unit) for unit in EXPECTED]
    before = write(zombie, 0)
    finish(attempt, units)
    late = write(zombie, 1)
    assert predictions.read(str(tmp_path / "p")).num_rows == 8
    assert not (tmp_path / "p" / before.file).exists()  # tidied, for tools that glob
    assert (tmp_path / "p" / late.file).exists()


@pytest.mark.parametrize("fault", ["missing", "twice", "fewer rows"])
def test_lost_or_doubled_rows_are_never_committed(tmp_path: Path, fault: str):
    attempt = begin(tmp_path / "p")
    units = [write(attempt, unit) for unit in (0, 1)]
    last = {"missing": [], "twice": [write(attempt, 1)], "fewer rows": [write(attempt, 2, rows(2, count=1))]}
    units += last[fault]
    with pytest.raises(RuntimeError, match="the plan has"):
        finish(attempt, units)
    assert not (tmp_path / "p/_MANIFEST.json").exists()
    with pytest.raises(InputError, match="did not finish; run it again"):
        predictions.read(str(tmp_path / "p"))


def test_of_two_that_commit_one_wins(tmp_path: Path):
    first, second = begin(tmp_path / "p"), begin(tmp_path / "p")
    mine = [write(first, unit) for unit in EXPECTED]
    other = [write(second, unit) for unit in EXPECTED]
    assert finish(second, other)["attempt"] == 1
    assert finish(first, mine)["attempt"] == 1
    with pytest.raises(InputError, match="committed by other inputs: data was 'd1', now 'd2'"):
        finish(first, mine, {**INPUTS, "data": "d2"})


def test_drivers_that_start_together_never_share_an_attempt(tmp_path: Path):
    numbers: list[int] = []
    gate = threading.Barrier(8)

    def driver() -> None:
        gate.wait()
        numbers.append(begin(tmp_path / "p").number)

    threads = [threading.Thread(target=driver) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(8))


def test_committed_by_the_same_or_by_other_inputs(done: Path):
    found = predictions.committed_manifest(str(done), INPUTS)
    assert found is not None
    assert found["rows"] == 8
    with pytest.raises(InputError, match="bundle_id was 'b1', now 'b2'"):
        predictions.committed_manifest(str(done), {**INPUTS, "bundle_id": "b2"})
    assert predictions.committed_manifest(str(done.parent / "none"), INPUTS) is None


def test_a_flipped_bit_is_found_by_the_reader(done: Path):
    entry = listed(done)[1]
    path = done / entry["file"]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match="sha256 differs"):
        predictions.read(str(done))
    path.unlink()
    with pytest.raises(InputError, match=r"could not be read \(missing\), but the manifest names it"):
        predictions.read(str(done), verify=False)


def test_reading_where_nothing_is(tmp_path: Path):
    with pytest.raises(InputError, match="no committed predictions at .* check the path"):
        predictions.read(str(tmp_path / "none"))
    (tmp_path / "_MANIFEST.json").write_text('{"files": 1}')
    with pytest.raises(InputError, match="not a manifest of predictions"):
        predictions.read(str(tmp_path))


def test_s3_commits_once(s3: str):
    uri = storage.join(s3, "predictions-once")
    attempt = begin(uri)
    write(attempt, 0)
    again = begin(uri)
    assert (again.number, sorted(again.adopted)) == (1, [0])
    finish(again, [again.adopted[0], write(again, 1), write(again, 2)])
    assert predictions.read(uri).num_rows == 8
    with pytest.raises(InputError, match="other inputs"):
        predictions.committed_manifest(uri, {**INPUTS, "data": "d2"})
