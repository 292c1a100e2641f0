"""The benchmark of what bounds large jobs: what it counts is what is there, and what it reckons."""

import json
import os

import pytest

from benchmarks.scale import driver_limits, ten_million_ids
from benchmarks.scale.scaling import tiny_bundle
from benchmarks.scale.store_cost import counted_requests, listing
from infra.local.fault_proxy import FaultProxy


def test_a_unit_is_read_by_three_requests_and_written_by_one(s3, monkeypatch):
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        found = counted_requests(f"{s3}/limits", proxy)
    assert found["read a unit of a dataset"] == {"GET": 2, "HEAD": 1}
    assert found["fetch an image of a folder"] == {"GET": 1, "HEAD": 1}
    assert found["write a unit"] == {"PUT": 1}
    assert found["commit"] == {"PUT": 1}


def test_all_keys_are_listed(s3):
    assert listing(f"{s3}/listing", 40)["keys a second"] > 0


def test_a_plan_costs_so_much_a_row_group(tmp_path):
    found = driver_limits.plan(tmp_path / "data", tiny_bundle(tmp_path / "model"), 100)
    text = (tmp_path / "data/dataset.json").read_text()
    assert sum(len(file["row_groups"]) for file in json.loads(text)["files"]) == 100
    assert found["bytes of dataset.json"] == len(text) / 100
    assert found["driver kB"] > 0.1


def test_what_training_sends_to_a_task_grows_with_the_row_groups():
    few, many = driver_limits.order(1000), driver_limits.order(4000)
    assert many["bytes sent"] == pytest.approx(few["bytes sent"], rel=0.2)
    assert few["bytes sent"] > 8


def test_digests_are_as_large_as_their_hashes(tmp_path):
    found = driver_limits.digests(tmp_path, 2000)
    assert 64 < found["bytes of digests.parquet"] < 128  # two hashes of 32 bytes, which cannot be compressed
    assert found["driver kB"] > 0.2


def test_a_billion_images_are_reckoned_by_hand():
    found = {
        "requests": {"read a unit of a dataset": {"GET": 2, "HEAD": 1}, "write a unit": {"PUT": 1},
                     "fetch an image of a folder": {"GET": 1, "HEAD": 1}},
        "plan": {"bytes of dataset.json": 100, "driver ms": 0.06, "driver kB": 1},
        "folder": {"driver kB": 0.1}, "digests": {"driver kB": 0.4, "bytes of digests.parquet": 70},
        "order": {"bytes sent": 80, "task us": 1}, "windows": {"ms a window before the first": 1},
        "driver": {"ms a unit scored": 10, "ms a unit before the first": 1, "ms a unit adopted": 0.1,
                   "bytes of lists a unit": 100, "units a second that are counted": 1000},
    }  # fmt: skip
    args = driver_limits.parse(["--images", str(1e6 * ten_million_ids.GROUP)])
    rows = {row["what"]: row["value"] for row in driver_limits.grown(found, args)}
    assert rows["ingest: driver's memory"] == pytest.approx(102.4)
    assert rows["plan of a dataset: driver's time"] == pytest.approx(1)
    assert rows["listing of a folder, 1,000 keys a page"] == pytest.approx(256_000 * 0.1 / 3600)
    assert rows["scoring: driver's time"] == pytest.approx(1e4 / 3600)
    assert rows["scoring: images a second that one driver allows"] == pytest.approx(25_600)
    assert rows["reading units: images a second at 5,500 GET"] == pytest.approx(5500 * 256 / 3)
    assert rows["fetching images: images a second at 5,500 GET"] == pytest.approx(2750)


@pytest.mark.long
def test_it_runs(capsys: pytest.CaptureFixture[str]):
    figures, _ = driver_limits.main(["--units", "100", "--groups", "1000", "--keys", "200"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["benchmark"] == "limits"
    assert {name: line["figures"][name] for name in figures} == figures
    assert figures["driver"]["bytes of lists a unit"] > 10
    assert figures["driver"]["ms a unit scored"] > figures["driver"]["ms a unit adopted"]
