"""Faults of the store: wrong answers, none at all, other bytes than were written."""

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.faults.jobs import Ended, Job, run
from benchmarks.faults.testbed import NOISE, World, compare_rows, far_from, rows_of, tally, units
from infra.local.fault_proxy import Kind, Rule
from pipeline import environment, predictions, storage
from pipeline.datasets.dataset import open_dataset, row_groups
from pipeline.datasets.shard_reader import read_row_group
from pipeline.errors import InputError
from pipeline.models.bundle import open_bundle

KINDS: tuple[Kind, ...] = ("status", "reset", "lost", "truncate", "stall", "slow")


def whole_jobs(world: World, name: str, rules: list[Rule]) -> Counter[str]:
    """Ingest, train and predict through the proxy."""
    data, out, found = world.fresh("data"), world.fresh("run"), world.fresh("predictions")
    jobs = {"ingest": world.ingest(data), "train": world.train(data, out), "predict": world.predict(found)}
    if world.args.small:
        del jobs["train"]
    ended = _through(world, name, rules, jobs)
    return tally([*ended.values()]) + _compare(world, ended, data, out, found, world.rows)


def referenced(world: World, rules: list[Rule]) -> Counter[str]:
    """The same where the dataset only refers to its images, which prediction and training fetch one by one.

    Then one image is missing, one forbidden, one never answers and one has another bit: rows of predictions and
    rejects of ingest say so, and verify names the last.
    """
    packed, data, out, found = (world.fresh(name) for name in ("packed", "data", "run", "predictions"))
    whole = run(world.folder, world.direct, *world.predict(packed, world.uri("data")))
    jobs = {"ingest": world.ingest(data, "referenced=true"), "train": world.train(data, out)}
    ended = _through(world, "referenced", rules, jobs | {"predict": world.predict(found, data)})
    counts = tally([whole, *ended.values()]) + _compare(world, ended, data, out, found, rows_of(packed))
    return counts + _told_apart(world, data)


def _told_apart(world: World, data: str) -> Counter[str]:
    wanted = {"image0003.png": "forbidden", "image0005.png": "timeout", "image0007.png": "missing"}
    wanted["image0009.png"] = "corrupt"
    world.proxy.add(Rule("status", path="image0003", status=403, code="AccessDenied"))
    world.proxy.add(Rule("delay", path="image0005", seconds=60))
    gone = world.uri("source/images/image0007.png")
    flipped = world.uri("source/images/image0009.png")
    kept, whole = storage.read_bytes(gone), storage.read_bytes(flipped)
    storage.write_bytes(flipped, whole[:99] + bytes([whole[99] ^ 4]) + whole[100:])
    filesystem, path = storage.arrow(gone)
    filesystem.delete_file(path)
    env, out, again = (
        {**world.through, environment.STORAGE_PATIENCE_S: "5"},
        world.fresh("predictions"),
        world.fresh("data"),
    )
    ended = [
        run(world.folder, env, *world.predict(out, data)),
        run(world.folder, env, *world.ingest(again, "referenced=true", "max_reject_fraction=0.2")),
    ]
    world.proxy.clear()
    ended.append(run(world.folder, world.direct, "verify", data))
    storage.write_bytes(gone, kept)
    storage.write_bytes(flipped, whole)
    rows = {row["image_id"]: row["status"] for row in rows_of(out).to_pylist() if row["status"] != "ok"}
    counts = tally(ended) + Counter(differ=int(rows != wanted), unseen=int("image0009.png" not in ended[-1].said))
    # A file that is not there when ingest lists the images is none of its sources, and its mask has no image.
    said = {name.rsplit("/", 1)[-1]: reason for name, reason in _rejects(again).items()}
    del wanted["image0007.png"]
    counts["differ"] += any(said.get(name) != reason for name, reason in wanted.items())
    print(f"  told apart: predictions {rows}, rejects {said}", flush=True)
    return counts


def _rejects(data: str) -> dict[str, str]:
    files = [item.path for item in storage.list_files(f"{data}/rejects", (".parquet",))]
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(f"{data}/rejects/{file}"))) for file in files]
    return {row["uri"]: row["reason"] for table in tables for row in table.to_pylist()}


def _through(world: World, name: str, rules: list[Rule], jobs: dict[str, list[str]]) -> dict[str, Ended]:
    """Jobs one after the other while the proxy keeps to the rules."""
    world.proxy.clear()
    for rule in rules:
        world.proxy.add(rule)
    ended = {job: run(world.folder, world.through, *args) for job, args in jobs.items()}
    requests, fired = len(world.proxy.log), sum(rule.fired for rule in rules)
    world.proxy.clear()
    said = ", ".join(f"{job} {each.code} in {each.seconds:.0f} s" for job, each in ended.items())
    print(f"  storage, {name}: exits: {said}; {fired} of {requests} requests went wrong", flush=True)
    for each in ended.values():
        if each.code != 0:
            print("    " + each.said.strip()[-600:].replace("\n", "\n    "), flush=True)
    return ended


def _compare(world: World, ended: dict[str, Ended], data: str, out: str, found: str, rows: pa.Table) -> Counter[str]:
    """What the jobs left beside what undisturbed ones did."""
    done = {job for job, each in ended.items() if each.code == 0}
    counts = Counter(failed=len(ended) - len(done))
    if "ingest" in done:
        counts["differ"] += open_dataset(data).fingerprint != world.fingerprint
    if "train" in done:
        counts["differ"] += far_from(world, out) > NOISE
    return counts + (compare_rows(rows_of(found), rows) if "predict" in done else Counter())


def gone(world: World, seconds: float) -> Counter[str]:
    """No storage at all for a while, in the middle of each job."""
    counts: Counter[str] = Counter()
    plans: dict[str, Callable[[str], list[str]]] = {
        "predict": world.predict,
        "train": lambda out: world.train(world.uri("data"), out),
        "ingest": world.ingest,
    }
    for name in list(plans)[: 1 if world.args.small else 3]:
        out = world.fresh(name)
        args = plans[name](out)
        world.proxy.clear()
        job = Job(world.folder, world.through, *args)
        time.sleep(0.6 * world.seconds[name])
        world.proxy.add(Rule("gone"))
        time.sleep(seconds)
        world.proxy.clear()
        ended = [job.wait()]
        while ended[-1].code not in (0, None) and len(ended) < 3:
            ended.append(run(world.folder, world.through, *args, *(["--resume"] if name == "train" else [])))
        print(f"  gone for {seconds:.0f} s, {name}: exits {[each.code for each in ended]}", flush=True)
        counts += tally(ended)
        counts["failed"] += ended[-1].code != 0
        if ended[-1].code:
            print("    " + ended[-1].said.strip()[-600:].replace("\n", "\n    "), flush=True)
        elif name == "predict":
            counts += compare_rows(rows_of(out), world.rows)
        elif name == "ingest":
            counts["differ"] += open_dataset(out).fingerprint != world.fingerprint
        else:
            counts["differ"] += far_from(world, out) > NOISE
    return counts


def bits(world: World, rng: random.Random) -> Counter[str]:
    """One bit of a shard, a bundle and a file of predictions: found by verify, by its reader, and by a job."""
    counts, looked = Counter[str](), 0
    groups = row_groups(open_dataset(world.uri("many")), "train")
    made, found = world.uri("run/bundle"), world.uri("predictions")
    plans: list[tuple[str, str, Callable[[], Any], bool]] = [
        (world.uri("many"), groups[0].file, lambda: [read_row_group(group, ["image"]) for group in groups], True),
        (made, f"{made}/members/0/model.safetensors", lambda: open_bundle(made).load_member(0), True),
        (found, f"{found}/{units(found)[0]}", lambda: predictions.read(found), False),
    ]
    for whole, file, read, predicts in plans:
        good = storage.read_bytes(file)
        bad = bytearray(good)
        # Not in the footer's own statistics: anywhere in what is read.
        bad[rng.randrange(100, len(bad) - 4000 if len(bad) > 8000 else len(bad) // 2)] ^= 1 << rng.randrange(8)
        storage.write_bytes(file, bytes(bad))
        ended = [run(world.folder, world.direct, "verify", whole)]
        counts["unseen"] += ended[0].code != 2 or file.rsplit("/", 1)[-1] not in ended[0].said
        try:
            read()
            counts["unseen"] += 1
        except InputError:
            pass
        if predicts and not world.args.small:
            ended.append(run(world.folder, world.direct, *world.predict(world.fresh("bits"))))
            counts["unseen"] += ended[1].code != 2
        looked += 1 + len(ended)
        counts += tally(ended)
        storage.write_bytes(file, good)
    print(f"  bits: {counts['unseen']} of {looked} looks did not see the damage", flush=True)
    return counts
