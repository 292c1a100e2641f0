"""What is lost, doubled, crashed or hung when things go wrong: a table of faults, each met by whole jobs.

    python -m benchmarks.faults
    python -m benchmarks.faults --small
    python -m benchmarks.faults --only inference training

``dubito ingest``, ``train`` and ``predict`` run as a user runs them, each in a process and a Ray session of its own, on
a private S3 server; a proxy before it answers wrongly on request. Every result is compared with that of an undisturbed
run: the dataset's fingerprint, the losses of training, each row of the predictions. ``lost`` and ``doubled`` count
images; ``crashes`` are jobs that ended in a traceback, or processes that died by themselves; ``hangs`` took longer than
four minutes (files: ten seconds); ``differ`` counts results that are not those of the undisturbed run.
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.faults import broken_files, failing_storage, hostile_files
from benchmarks.faults.failing_storage import KINDS
from benchmarks.faults.jobs import HANG_S, NOBODY, Job, run
from benchmarks.faults.testbed import NOISE, World, compare_rows, far_from, rows_of, tally, units
from infra.local.fault_proxy import FaultProxy, Kind, Rule
from infra.local.s3_server import s3_server
from pipeline import storage
from pipeline.training import checkpoint

FIGURES = ("lost", "doubled", "crashes", "hangs", "differ")
ROWS = ("inference", "training", "storage", "referenced", "gone", "bits", "images", "labels", "memory")


def kill_inference(world: World, number: int, target: str, rng: random.Random) -> Counter[str]:
    """Kill once at a random moment of the work, then start the same command until it is done."""
    out = world.fresh("killed")
    args = world.predict(out)
    job, ended = Job(world.folder, world.direct, *args), []
    while not storage.exists(f"{out}/attempt-0/_START.json") and job.process.poll() is None:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 0.6 * world.seconds["predict"]))
    hit = job.kill(target, rng)
    ended.append(job.wait())
    finished = set(units(out)) if ended[-1].code else set()
    if hit != NOBODY and ended[-1].code not in (0, -9):
        print("    " + ended[-1].said.strip()[-300:].replace("\n", "\n    "), flush=True)
    while ended[-1].code not in (0, None) and len(ended) < 5:
        ended.append(run(world.folder, world.direct, *args))
    out_rows = rows_of(out) if ended[-1].code == 0 else world.rows.slice(0, 0)
    kept = {name.rsplit("/", 1)[-1] for name in units(out)}
    redone = len({name.rsplit("/", 1)[-1] for name in finished} - kept)
    print(f"  inference {number}: killed {hit} ({target}), exits {[e.code for e in ended]}, "
          f"{len(finished)} units kept, {redone} done again", flush=True)  # fmt: skip
    return tally(ended) + compare_rows(out_rows, world.rows) + Counter(redone_units=redone, missed=int(hit == NOBODY))


def kill_training(world: World, number: int, target: str, rng: random.Random) -> Counter[str]:
    """The same for a training run of two workers: its ledger, and its losses beside the undisturbed ones."""
    out = world.fresh("run")
    job, ended = Job(world.folder, world.direct, *world.train(world.uri("data"), out)), []
    deadline = time.monotonic() + 60
    while job.process.poll() is None and time.monotonic() < deadline and not checkpoint.latest(f"{out}/members/0"):
        time.sleep(0.1)
    time.sleep(rng.uniform(0, 0.2 * world.seconds["train"]))
    hit = job.kill(target, rng)
    ended.append(job.wait())
    while ended[-1].code not in (0, None) and len(ended) < 5:
        ended.append(run(world.folder, world.direct, *world.train(world.uri("data"), out, resume=True)))
    newest = checkpoint.latest(f"{out}/members/0")
    steps = max(world.losses)
    ledger = checkpoint.read_ledger(newest) if newest else None
    used = ledger.contains(np.arange(steps * 8 + 64)) if ledger else np.zeros(steps * 8 + 64, bool)
    lost, doubled = int((~used[: steps * 8]).sum()), int(used[steps * 8 :].sum())
    far = far_from(world, out) if ended[-1].code == 0 else 9e9
    print(f"  training {number}: killed {hit} ({target}), exits {[e.code for e in ended]}, "
          f"losses differ by at most {far:.2g}", flush=True)  # fmt: skip
    return tally(ended) + Counter(lost=lost, doubled=doubled, differ=int(far > NOISE), missed=int(hit == NOBODY))


def memory(world: World) -> Counter[str]:
    """Scoring actors die as soon as they have more than a container would give them: the job ends with a sentence."""
    out, deaths = world.fresh("memory"), 0
    job = Job(world.folder, world.direct, *world.predict(out))
    while job.process.poll() is None and time.monotonic() - job.began < HANG_S:
        for pid, title in job.processes().items():
            if title.startswith("ray::MapWorker") and private(pid) > world.args.actor_mb * 1e6:
                os.kill(pid, signal.SIGKILL)
                deaths += 1
        time.sleep(0.02)
    ended = job.wait()
    print(f"  memory: {deaths} actors had too much, exit {ended.code}: {ended.said.strip()[-400:]}", flush=True)
    counts = tally([ended]) + Counter(missed=int(not deaths))
    if ended.code == 0:
        return counts + compare_rows(rows_of(out), world.rows)
    return counts + Counter(differ=int(ended.code != 2 or "memory" not in ended.said))


def private(pid: int) -> int:
    """Bytes that a process has for itself; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 if "RssAnon:" in status else 0


def table(world: World | None, args: argparse.Namespace) -> Iterator[tuple[str, int, Counter[str]]]:
    """(fault, how many, counts) of each row."""
    rng, folder = random.Random(args.seed), str(args.photographs) if args.photographs else None
    if world:
        yield from _of_jobs(world, args, rng)
    if "images" in args.only:
        plans = [(start, args.files // 4, folder) for start in range(4)]
        yield "mutated images", args.files, broken_files.read(broken_files.judge_images, plans)
    if "labels" in args.only:
        plans = [(start, args.files // 4, format) for start, format in enumerate(sorted(hostile_files.CLASSES))]
        yield "mutated label files", args.files, broken_files.read(broken_files.judge_labels, plans)


def _of_jobs(world: World, args: argparse.Namespace, rng: random.Random) -> Iterator[tuple[str, int, Counter[str]]]:
    if "inference" in args.only:
        yield "killed in batch inference", args.kills, _kills(kill_inference, world, args.kills, rng)
    if "training" in args.only:
        yield "killed in training", args.train_kills, _kills(kill_training, world, args.train_kills, rng)
    if "storage" in args.only:
        plans = {kind: [_rule(kind, 0.05)] for kind in KINDS}
        mixed = [_rule(kind, 0.05 / len(KINDS)) for kind in KINDS]
        for name, rules in ({"all kinds": mixed} if args.small else plans).items():
            yield f"storage, 5 %: {name}", 1, failing_storage.whole_jobs(world, name, rules)
    if "referenced" in args.only:
        mixed = [_rule(kind, 0.05 / len(KINDS)) for kind in KINDS]
        yield "storage, 5 %: referenced images", 1, failing_storage.referenced(world, mixed)
    if "gone" in args.only:
        yield f"storage gone for {args.gone:.0f} s", 1 if args.small else 3, failing_storage.gone(world, args.gone)
    if "bits" in args.only:
        yield "flipped bit: shard, bundle, predictions", 3, failing_storage.bits(world, rng)
    if "memory" in args.only:
        yield "hard memory limit of an actor", 1, memory(world)


def _kills(one: Callable[..., Counter[str]], world: World, count: int, rng: random.Random) -> Counter[str]:
    names = {kill_inference: ["driver", "actor", "task worker", "raylet"],
             kill_training: ["train worker", "driver", "raylet", "task worker"]}[one]  # fmt: skip
    return sum((one(world, number, names[number % 4], rng) for number in range(count)), Counter[str]())


def _rule(kind: Kind, share: float) -> Rule:
    return Rule(kind, share=share, seconds=30, bytes_per_second=2**16, seed=len(kind))


@contextmanager
def worlds(args: argparse.Namespace) -> Iterator[World | None]:
    """A world, where a row wants one."""
    if not set(args.only) - {"images", "labels"}:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        with s3_server() as server, FaultProxy(server["endpoint"]) as proxy:
            yield World(folder, server, proxy, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, help="rows of the table (all; small: without referenced, gone and memory)"
    )
    parser.add_argument("--photographs", type=Path, help="real images to break as well, below this folder")
    parser.add_argument("--images", type=int, help="to ingest and to train on (120; small: 24)")
    parser.add_argument("--many", type=int, help="images to predict (1200; small: 96)")
    parser.add_argument("--epochs", type=int, help="of training (3; small: 2)")
    parser.add_argument("--kills", type=int, help="of batch inference (20; small: 1)")
    parser.add_argument("--train-kills", type=int, help="of training (10; small: 1)")
    parser.add_argument("--files", type=int, help="broken images, and broken label files (2000; small: 200)")
    parser.add_argument("--gone", type=float, help="seconds without storage (60; small: 3)")
    parser.add_argument("--actor-mb", type=float, default=420, help="most memory of an actor where that is limited")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="under 4 minutes on 2 cores")
    args = parser.parse_args(argv)
    sizes = {"kills": (20, 1), "train_kills": (10, 1), "files": (2000, 200), "gone": (60, 3), "images": (120, 24),
             "many": (1200, 96), "epochs": (3, 2),
             "only": (list(ROWS), [row for row in ROWS if row not in ("referenced", "gone", "memory")])}  # fmt: skip
    for name, (full, small) in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, small if args.small else full)
    return args


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the table and the JSON line; return figures and ratios."""
    args = parse(argv)
    rows, figures, began = [], {}, time.monotonic()
    with worlds(args) as world:
        for name, count, counts in table(world, args):
            print(f"{time.monotonic() - began:.0f} s: {name}", flush=True)
            figures[name] = {"count": count, **{key: counts[key] for key in FIGURES}, **counts}
            other = ", ".join(f"{key} {value}" for key, value in counts.items() if key not in FIGURES and value)
            rows.append({"fault": name, "count": count, **{key: counts[key] for key in FIGURES}, "other": other})
    print(harness.table(rows), flush=True)
    harness.finish("faults", figures, {})
    return figures, {}


if __name__ == "__main__":
    main()
