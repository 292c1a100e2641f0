"""What bounds a job over very many images on very many nodes: what an image, a unit and a file cost the one driver.

    python -m benchmarks.scale.driver_limits
    python -m benchmarks.scale.driver_limits --small

Each figure is of something that grows with the data while there is one of it: the driver's time and memory, a list
that is written whole, requests to one bucket. Measured small, by differences, so that starts fall out; and then
multiplied, as if it stayed linear, by what a billion images are (``--images``, of ``--image-kb``), which is no
measurement. Units are row groups of 256 images here, as large datasets have them, except where it is said.

- requests: counted by a proxy between this process and an S3 server on this machine.
- listing: of objects on that server, 1,000 a page; S3 itself answers slower (``--list-ms`` a page), one after another.
- plan: reading dataset.json, making units, their digest; memory by ``tracemalloc``.
- driver: a whole prediction job over units that cost nothing (one image each, which is not there), and the same job
  again with its manifest gone, which adopts all of them; CPU time of the process that calls.
- order: what every reading task of training is sent, and unpacks.
"""

import argparse
import json
import os
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from benchmarks import harness
from benchmarks.scale.driver_cost import cpu_s, driver, windows
from benchmarks.scale.scaling import tiny_bundle
from benchmarks.scale.store_cost import METHODS, counted_requests, listing
from benchmarks.scale.ten_million_ids import GROUP, ids_of
from infra.local.fault_proxy import FaultProxy
from infra.local.s3_server import environment, make_bucket, s3_server
from jobs.session import ray_session
from pipeline import schema
from pipeline.datasets import metadata
from pipeline.datasets.dataset import DATASET_JSON
from pipeline.datasets.shard_reader import RowGroup
from pipeline.models import bundle
from pipeline.scoring import plan as planning
from pipeline.storage import checksum
from pipeline.stream import epoch_order, run_stream
from pipeline.stream.ledger import Ledger

GROUPS = 5
"""Row groups of a shard of 128 MB, of images of 100 kB."""


def traced(call: Callable[[], Any]) -> tuple[Any, int]:
    """(what it returns, bytes of Python objects that are there afterwards and were not before)."""
    tracemalloc.start()
    try:
        made = call()
        return made, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def meta_of(groups: int) -> dict[str, Any]:
    """dataset.json of so many row groups."""
    files = [
        {"path": f"data/test-{number:05d}.parquet", "split": "train", "size": 134217728, "sha256": f"{number:064x}",
         "rows": GROUP * GROUPS, "row_groups": [[GROUP, 26214400]] * GROUPS}
        for number in range(groups // GROUPS)
    ]  # fmt: skip
    return checksum.with_checksum({
        "schema_version": schema.SCHEMA_VERSION, "name": "limits", "classes": ["thing", "background"], "background": 1,
        "tasks": [], "counts": {"train": {"images": groups * GROUP}}, "fingerprint": "limits", "statistics": {},
        "files": files,
    })  # fmt: skip


def plan(folder: Path, model: str, groups: int) -> dict[str, float]:
    """What a row group costs before the first is read."""
    folder.mkdir()
    text = json.dumps(meta_of(groups), indent=1)
    (folder / DATASET_JSON).write_text(text)
    opened, begin = bundle.open_bundle(model), cpu_s()
    made = planning.plan_scoring(opened, str(folder), "train", measure=False)
    assert made.digest
    seconds = cpu_s() - begin
    again, held = traced(lambda: planning.plan_scoring(opened, str(folder), "train", measure=False))
    assert len(again.units) == groups
    return {
        "bytes of dataset.json": len(text) / groups,
        "driver ms": 1e3 * seconds / groups,
        "driver kB": held / groups / 1e3,
    }


def folder_plan(folder: Path, model: str, files: int) -> dict[str, float]:
    """What a file costs before the first is read, where a folder of images is scored."""
    folder.mkdir()
    for number in range(files):
        (folder / f"image-{number:09d}.jpg").touch()
    opened = bundle.open_bundle(model)
    _, held = traced(lambda: planning.plan_scoring(opened, str(folder), None, measure=False))
    begin = cpu_s()
    assert planning.plan_scoring(opened, str(folder), None, measure=False).digest
    return {"driver ms": 1e3 * (cpu_s() - begin) / files, "driver kB": held / files / 1e3}


def digests(folder: Path, images: int) -> dict[str, float]:
    """What ``dubito ingest`` keeps of each image until it commits: in the driver, and in digests.parquet."""
    random = np.random.default_rng(0)

    def make() -> list[tuple[str, str, str, str | None]]:
        names = ids_of(0, images).to_pylist()
        return [(name, "train", random.bytes(32).hex(), random.bytes(32).hex()) for name in names]

    rows, held = traced(make)
    entry = metadata.write_digests(str(folder), rows)
    return {"bytes of digests.parquet": entry["size"] / images, "driver kB": held / images / 1e3}


def order(groups: int) -> dict[str, float]:
    """What a row group costs each reading task of training, whichever row groups it reads."""
    every = [
        RowGroup(f"s3://bucket/dataset/data/train-{at // GROUPS:05d}.parquet", at % GROUPS, GROUP, 26214400)
        for at in range(groups)
    ]
    whole = epoch_order.EpochOrder.of(every, 0, 64 * 2**20)
    rest = epoch_order.plan_remaining_rows(Ledger(), whole.rows, GROUP)
    sent = run_stream.ExpandUnits(whole, ("image",), 0, rest.stop, Ledger().to_bytes(), 16, "")
    data = ray.cloudpickle.dumps(sent)  # pyright: ignore[reportAttributeAccessIssue]
    times = []
    for window in range(4):
        begin = cpu_s()
        got = ray.cloudpickle.loads(data)  # pyright: ignore[reportAttributeAccessIssue]
        got.order.window(0, window)
        times.append(cpu_s() - begin)
    return {"bytes sent": len(data) / groups, "task us": 1e6 * float(np.median(times[1:])) / groups}


def grown(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the last table: what the figures come to with so many images, if they stay linear."""
    images, units = args.images, args.images / GROUP
    windows = args.images * args.image_kb * 1000 / (run_stream.StreamSettings().window_mb * 2**20)
    each, per = found["driver"], found["requests"]
    plan, folder, kept, order = (found[name] for name in ("plan", "folder", "digests", "order"))
    gets = sum(per["read a unit of a dataset"].get(name, 0) for name in ("GET", "HEAD"))
    fetches = sum(per["fetch an image of a folder"].get(name, 0) for name in ("GET", "HEAD"))
    puts = sum(per["write a unit"].get(name, 0) for name in ("PUT", "POST"))
    rows: list[tuple[str, float, str]] = [
        ("ingest: driver's memory", kept["driver kB"] * images / 1e6, "GB"),
        ("ingest: digests.parquet", kept["bytes of digests.parquet"] * images / 1e9, "GB"),
        ("dataset.json", plan["bytes of dataset.json"] * units / 1e9, "GB"),
        ("plan of a dataset: driver's time", plan["driver ms"] * units / 6e4, "min"),
        ("plan of a dataset: driver's memory", plan["driver kB"] * units / 1e6, "GB"),
        ("listing of a folder, 1,000 keys a page", args.list_ms * images / 1e6 / 3600, "h"),
        ("plan of a folder: driver's memory", folder["driver kB"] * images / 1e6, "GB"),
        ("scoring: driver's time", each["ms a unit scored"] * units / 3.6e6, "h"),
        ("scoring: images a second that one driver allows", 1e3 * GROUP / each["ms a unit scored"], ""),
        ("scoring: images a second that can be counted", GROUP * each["units a second that are counted"], ""),
        ("scoring: before the first unit", each["ms a unit before the first"] * units / 3.6e6, "h"),
        ("anti-join of a whole attempt: driver's time", each["ms a unit adopted"] * units / 3.6e6, "h"),
        ("predictions: files", units, ""),
        ("predictions: lists", each["bytes of lists a unit"] * units / 1e9, "GB"),
        ("training: plan in each reading task", order["bytes sent"] * units / 1e9, "GB"),
        ("training: time to unpack it", order["task us"] * units / 1e6, "s"),
        ("training: before the first batch", found["windows"]["ms a window before the first"] * windows / 3.6e6, "h"),
        ("reading units: images a second at 5,500 GET", 5500 * GROUP / gets, ""),
        ("fetching images: images a second at 5,500 GET", 5500 / fetches, ""),
        ("writing units: images a second at 3,500 PUT", 3500 * GROUP / puts, ""),
    ]  # fmt: skip
    return [{"what": what, "value": value, "unit": unit} for what, value, unit in rows]


def measure(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every figure."""
    found: dict[str, dict[str, Any]] = {}
    with s3_server() as server:
        bucket = make_bucket(server, "limits")
        kept = dict(os.environ)
        with FaultProxy(server["endpoint"]) as proxy:
            try:
                os.environ.update(environment({**server, "endpoint": proxy.endpoint}))
                found["requests"] = counted_requests(f"{bucket}/job", proxy)
                os.environ.update(environment(server))
                found["listing"] = listing(bucket, args.keys)
            finally:
                os.environ.clear()
                os.environ.update(kept)
    with ray_session(4):
        model = tiny_bundle(folder / "model")
        found["plan"] = plan(folder / "plan", model, args.groups)
        found["folder"] = folder_plan(folder / "folder", model, args.keys)
        found["digests"] = digests(folder, args.keys)
        found["order"] = order(args.groups)
        found["windows"] = windows(args.units // 5, args.units)
        found["driver"] = driver(folder, model, (args.units // 5, args.units))
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, default=1e9, help="of the job that is reckoned")
    parser.add_argument("--image-kb", type=float, default=100, help="of one of its images")
    parser.add_argument("--list-ms", type=float, default=100, help="a page of a listing takes S3")
    parser.add_argument("--units", type=int, help="of the larger job (2000; small: 500)")
    parser.add_argument("--groups", type=int, help="row groups of the dataset that is planned (100000; small: 20000)")
    parser.add_argument("--keys", type=int, help="objects that are listed (10000; small: 3000)")
    parser.add_argument("--small", action="store_true", help="under 2 minutes on 2 cores")
    args = parser.parse_args(argv)
    for name, (full, small) in {"units": (2000, 500), "groups": (100_000, 20_000), "keys": (10_000, 3000)}.items():
        setattr(args, name, getattr(args, name) or (small if args.small else full))
    return args


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the tables and the JSON line; return figures and ratios."""
    args = parse(argv)
    print(f"load before: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(Path(temporary), args)
    print(
        harness.table(
            [{"requests": name, **{m: each.get(m, 0.0) for m in METHODS}} for name, each in found["requests"].items()]
        )
    )
    rows = [
        {"of": part, "figure": name, "value": value}
        for part, each in found.items()
        if part != "requests"
        for name, value in each.items()
    ]
    print(f"\n{harness.table(rows)}\n\n{args.images:.3g} images, if all stays linear")
    total = grown(found, args)
    print(harness.table(total), flush=True)
    harness.finish("limits", {**found, "grown": total}, {})
    return found, {}


if __name__ == "__main__":
    main()
