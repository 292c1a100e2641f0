"""A prediction job over ten million images whose driver may not have more than 1 GiB: does it go on, and commit?

    python -m benchmarks.scale.ten_million_ids
    python -m benchmarks.scale.ten_million_ids --small

The dataset refers to images that are nowhere, so rows are small and say "missing". An earlier attempt has finished
all units but the last few; the job must compare what that attempt left with the plan, id by id, score the rest, and
commit. The driver is watched, and killed once its own memory (``RssAnon`` of Linux) exceeds the limit. Printed: its
peak with the small dataset (a tenth) and with the whole, units and rows adopted and scored, seconds, and what the
manifest and its lists weigh. ``lost`` and ``doubled`` count image_ids of what was committed, read back shard by shard.
"""

import argparse
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import harness
from benchmarks.scale.scaling import descendants, tiny_bundle
from jobs.session import ray_session
from pipeline import predictions, schema
from pipeline.datasets.dataset import DATASET_JSON
from pipeline.models import bundle
from pipeline.runtime import ray_tasks
from pipeline.runtime.progress import SilentSink
from pipeline.scoring.job import predict
from pipeline.scoring.plan import plan_scoring
from pipeline.storage import checksum

GROUP = 256
LEFT = 4
"""Units that the earlier attempt had not finished."""
FACTOR = 10
"""The whole dataset is so much larger than the one beside it."""


def ids_of(shard: int, rows: int) -> pa.Array:
    """image_ids of a shard."""
    return pa.array([f"camera-{shard:05d}/image-{row:09d}.jpg" for row in range(rows)], pa.string())


def nulls(names: pa.Schema, rows: int, **columns: Any) -> pa.Table:
    """Rows of a schema with these columns, and null in all others."""
    return pa.table(
        [columns[field.name] if field.name in columns else pa.nulls(rows, field.type) for field in names], schema=names
    )


def constant(value: Any, rows: int, kind: pa.DataType) -> pa.Array:
    """The same value in each row."""
    return pa.array([value], kind).take(pa.array([0] * rows))


def write_shard(work: tuple[str, int, int], group: int = GROUP) -> dict[str, Any]:
    """One shard of referenced rows, in row groups of so many; its entry in dataset.json."""
    folder, number, rows = work
    ids = ids_of(number, rows)
    table = nulls(
        schema.DATASET, rows, image_id=ids, split=constant("test", rows, pa.string()),
        uri=pa.array([f"/nowhere/{name}" for name in ids.to_pylist()], pa.string()),
        height=constant(64, rows, pa.int32()), width=constant(64, rows, pa.int32()),
    )  # fmt: skip
    path = f"data/test-{number:05d}.parquet"
    pq.write_table(table, f"{folder}/{path}", row_group_size=group, write_page_checksum=True)
    groups = [[min(group, rows - at), 1000 * min(group, rows - at)] for at in range(0, rows, group)]
    return {"path": path, "split": "test", "size": 0, "sha256": "", "rows": rows, "row_groups": groups}


def write_dataset(folder: Path, ids: int, shards: int, group: int = GROUP) -> str:
    """A dataset of so many rows, in row groups of ``group``; its URI. Ray must be running."""
    (folder / "data").mkdir(parents=True)
    each = ids // shards
    work = partial(write_shard, group=group)
    files = list(ray_tasks.map_in_tasks(work, [(str(folder), number, each) for number in range(shards)]))
    meta = {
        "schema_version": schema.SCHEMA_VERSION, "name": "ids", "classes": ["thing", "background"], "background": 1,
        "tasks": [], "counts": {"test": {"images": each * shards}}, "fingerprint": f"{ids} ids", "statistics": {},
        "referenced": True, "files": files,
    }  # fmt: skip
    (folder / DATASET_JSON).write_text(json.dumps(checksum.with_checksum(meta)))
    return str(folder)


def write_units(work: tuple[str, str, str, str, Sequence[tuple[int, int, int]]]) -> int:
    """What an earlier attempt has finished of one shard: (unit, first row, rows) each; how many."""
    out, attempt, digest, file, parts = work
    ids = pq.read_table(file, columns=["image_id", "uri"])
    for unit, first, rows in parts:
        own = ids.slice(first, rows)
        table = nulls(
            schema.PREDICTIONS["segmentation"], rows, image_id=own["image_id"].combine_chunks(),
            uri=own["uri"].combine_chunks(), status=constant("missing", rows, pa.string()),
        )  # fmt: skip
        predictions.write_unit(out, attempt, unit, table, digest=digest, sources=[])
    return len(parts)


def earlier_attempt(model: str, data: str, out: str) -> int:
    """An attempt that was killed shortly before its end; the number of its units."""
    plan = plan_scoring(bundle.open_bundle(model), data, None, measure=False)
    attempt = predictions.start_attempt(out, inputs=plan.inputs, digest=plan.digest, groups=plan.unit_groups)
    work = []
    for piece in plan.unit_groups:
        done = [unit for unit in piece.units if unit.number < len(plan.units) - LEFT]
        starts = [(unit.number, unit.source["group"] * GROUP + unit.source["start"], unit.rows) for unit in done]
        work.append((out, attempt.name, attempt.digest, f"{data}/{piece.units[0].source['file']}", starts))
    return sum(ray_tasks.map_in_tasks(write_units, work))


def job(model: str, data: str, out: str, limit: int, pipe: Any) -> None:
    """The job in a process of its own, killed where it takes more than ``limit`` bytes."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], descendants()[os.getpid()]["private"])
            if peak[0] > limit:
                os.kill(os.getpid(), signal.SIGKILL)

    with ray_session():
        before = descendants()[os.getpid()]["private"]
        threading.Thread(target=watch, daemon=True).start()
        began = time.perf_counter()
        found = predict(model, data, out, sink=SilentSink())
        seconds = time.perf_counter() - began
        stop.set()
    kept = {key: found[key] for key in ("rows", "statuses", "adopted", "scored")}
    pipe.send({**kept, "seconds": seconds, "peak_mb": peak[0] / 1e6, "before_mb": before / 1e6})


def count(out: str, shards: int, rows: int) -> dict[str, int]:
    """Image_ids that are not once in what was committed."""
    manifest = predictions.committed_manifest(out) or {"lists": []}
    named = sorted(
        (item["unit"], item["file"]) for entry in manifest["lists"] for item in predictions.read_list(out, entry)
    )
    lost = doubled = 0
    files = iter(named)
    for shard in range(shards):
        have: list[str] = []
        while len(have) < rows and (item := next(files, None)) is not None:
            have += pq.read_table(f"{out}/{item[1]}", columns=["image_id"])["image_id"].to_pylist()
        once = set(have)
        doubled += len(have) - len(once)
        lost += len(set(ids_of(shard, rows).to_pylist()) - once)
    doubled += sum(1 for _ in files)
    return {"lost": lost, "doubled": doubled}


def measure(folder: Path, ids: int, args: argparse.Namespace) -> dict[str, Any]:
    """One size."""
    shards = max(1, ids // args.shard)
    with ray_session():
        data = write_dataset(folder / "data", ids, shards)
        model = tiny_bundle(folder / "model")
        out = str(folder / "out")
        began = time.perf_counter()
        finished = earlier_attempt(model, data, out)
        print(f"  {ids} ids: {finished} units finished before ({time.perf_counter() - began:.0f} s)", flush=True)
    found = harness.apart(job, model, data, out, int(args.limit * 2**30))
    small = [path.stat().st_size for path in (folder / "out").glob("*.json")]
    lists = [path.stat().st_size for path in (folder / "out/_lists").glob("files-*")]
    return {"ids": ids, "shards": shards, **found, **count(out, shards, ids // shards), "manifest_kb": sum(small) / 1e3,
            "lists_mb": sum(lists) / 1e6}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, help="image_ids (10,000,000; small: 100,000)")
    parser.add_argument("--shard", type=int, default=100_000, help="rows of a shard")
    parser.add_argument("--limit", type=float, default=1.0, help="memory of the driver in GiB")
    parser.add_argument("--folder", type=Path, help="for some GB of files; default: the system's temporary folder")
    parser.add_argument("--small", action="store_true", help="under 2 minutes on 2 cores")
    args = parser.parse_args(argv)
    args.ids = args.ids or (100_000 if args.small else 10_000_000)
    args.shard = min(args.shard, max(GROUP, args.ids // FACTOR))
    return args


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the table and the JSON line; return figures and ratios."""
    args, rows = parse(argv), []
    for ids in (args.ids // FACTOR, args.ids):
        folder = Path(tempfile.mkdtemp(prefix="ids-", dir=args.folder))
        try:
            rows.append(measure(folder, ids, args))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(harness.table([{**row, "statuses": json.dumps(row["statuses"])} for row in rows]), flush=True)
    few, many = rows
    ratios = {"driver's memory, 10x / 1x": many["peak_mb"] / few["peak_mb"]}
    harness.finish("ids", {"small": few, "whole": many}, ratios)
    return {"small": few, "whole": many}, ratios


if __name__ == "__main__":
    main()
