"""Do 1, 2, 4 and 8 workers keep a linear rate of images, and what of the driver's time does an image take?

    python -m benchmarks.scale.workers
    python -m benchmarks.scale.workers --small

The model is a stub that sleeps so long an image as a GPU would be at work, one batch at a time in each worker. So
many workers fit on a few cores, and what is measured is what feeds them. Each has as many images to do, however many
workers there are (weak scaling). Two jobs:

- ``batch inference``: ``pipeline.scoring.job`` with so many actors over a dataset of tiny JPEGs, predictions written;
  the members are replaced in the actors, maps are off.
- ``training stream``: ``pipeline.training.ray_dataset.training_dataset`` split for so many consumers as Ray Train
  does it (``streaming_split(equal=True)``); each takes batches of encoded images, and sleeps.

Rates are steady ones: from when the last worker has begun until the first one has no more to do, as the workers
themselves noted it batch by batch; medians over parts of that time, in which ``share`` of the images were done
(workers start one after the other where cores are few, and the early ones do more). ``linear`` is the rate over so
many times that of one worker, ``busy`` the share of their time that the workers slept. CPU times are of the same while:
``driver`` of the process that called, and of the actor that deals out rows to consumers for it (Ray's
SplitCoordinator); ``all`` of everything that Ray has started too. ``cores`` is what that kept busy, ``others`` what all
else on this machine did: where both together come near the number of cores, that is what bounds the rate.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from torch import nn

from benchmarks import harness
from benchmarks.images import make, photographs
from benchmarks.scale.cpu_time import Busy
from benchmarks.scale.scaling import BATCH, MODEL, SIDE, tiny_bundle
from jobs.session import ray_session
from pipeline import schema
from pipeline.datasets import ingest
from pipeline.runtime.progress import SilentSink
from pipeline.scoring import job
from pipeline.scoring.plan import UNIT_ROWS
from pipeline.scoring.scorer import Scorer
from pipeline.training.member_run import MemberRun
from pipeline.training.ray_dataset import training_dataset

PARTS = 5
"""Of the steady time of a job; each gives a rate."""
CPUS_EACH = 2
"""Logical CPUs of an actor that scores, and as many for tasks that read."""
INFERENCE, TRAINING = "batch inference", "training stream"


@dataclass(frozen=True)
class Batch:
    """What a worker did at a stretch; times in seconds as by ``time.time``."""

    begin: float
    end: float
    images: int


class SleepingModel(nn.Module):
    """(N, 3, H, W) -> (N, 2, H, W), after so many seconds an image; one batch at a time, as a GPU has it."""

    stride = 1

    def __init__(self, image_s: float, notes: Path) -> None:
        super().__init__()
        self.image_s, self.notes, self.turn = image_s, notes, threading.Lock()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits."""
        with self.turn:
            begin = time.time()
            time.sleep(self.image_s * len(batch))
            line = json.dumps([begin, time.time(), len(batch)])
        with self.notes.open("a") as file:
            file.write(line + "\n")
        return batch[:, :2]


class SleepingScorer(Scorer):
    """The actor with the sleeping model in the place of every member; its notes go into a file of its own."""

    def __init__(self, image_s: float, folder: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        model = SleepingModel(image_s, Path(folder) / f"{os.getpid()}.jsonl")
        self.predictor.members[:] = [model for _ in self.predictor.members]


class Consumer:
    """What stands for a training worker: takes its batches of the stream, and sleeps."""

    def consume(self, shard: Any, image_s: float) -> list[tuple[float, float, int]]:
        """(begin, end, images) of each batch."""
        notes = []
        for table in shard.iter_batches(batch_size=BATCH, batch_format="pyarrow", prefetch_batches=1):
            begin = time.time()
            time.sleep(image_s * table.num_rows)
            notes.append((begin, time.time(), table.num_rows))
        return notes


Job = Callable[[int, Path], list[list[Batch]]]
"""(number of workers, folder of its own) -> what each worker did."""


def inference(uri: str, model: str, args: argparse.Namespace, workers: int, folder: Path) -> list[list[Batch]]:
    """``dubito predict`` over the split that has so many images."""
    notes = folder / "notes"
    notes.mkdir(parents=True)
    found = job.predict(
        model, uri, str(folder / "out"), split=splits(args)[workers], sink=SilentSink(), actors=workers, batch=BATCH,
        scorer_class=partial(SleepingScorer, args.image_ms / 1e3, str(notes)),
    )  # fmt: skip
    assert found["statuses"] == {"ok": workers * args.images}, found["statuses"]
    return [[Batch(*json.loads(line)) for line in file.read_text().splitlines()] for file in notes.iterdir()]


def training(uri: str, args: argparse.Namespace, workers: int, folder: Path) -> list[list[Batch]]:
    """The stream of ``dubito train``, for so many steps as give each worker its images."""
    tree = {
        "task": "segmentation", "data": uri, "out": str(folder), "model": MODEL,
        "input": {"size": [SIDE, SIDE], "fit": "stretch"}, "loss": {"cross_entropy": 1},
        "train": {"batch_size": BATCH, "steps": args.images // BATCH, "workers": workers},
    }  # fmt: skip
    shards = training_dataset(MemberRun(tree, f"{folder}/members/0", "train", 1)).streaming_split(workers, equal=True)
    actor: Any = ray.remote(num_cpus=1)(Consumer)
    consumers = [actor.remote() for _ in shards]
    asked = [each.consume.remote(shard, args.image_ms / 1e3) for each, shard in zip(consumers, shards, strict=True)]
    found = [[Batch(*note) for note in notes] for notes in ray.get(asked)]
    assert all(sum(batch.images for batch in each) == args.images for each in found)
    return found


def splits(args: argparse.Namespace) -> dict[int, str]:
    """Number of workers -> the split that holds their images; the most have the train split."""
    return dict(zip(sorted(args.workers, reverse=True), schema.SPLITS, strict=False))


def make_dataset(folder: Path, args: argparse.Namespace) -> str:
    """Tiny JPEGs, in a split for each number of workers; its URI. Ray must be running."""
    files = make(folder / "images", photographs(None), (SIDE, SIDE), sum(args.workers) * args.images)
    (folder / "labels").mkdir()
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[: SIDE // 2] = 1
    names, lists = iter(path.stem for path in files), dict[str, list[str]]()
    for workers, split in splits(args).items():
        lists[split] = [next(names) for _ in range(workers * args.images)]
    for path in files:
        Image.fromarray(mask).save(folder / "labels" / f"{path.stem}.png")
    (folder / "splits.json").write_text(json.dumps(lists))
    ingest.ingest(
        "instances", str(folder / "images"), str(folder / "labels"), str(folder / "dataset"), classes=["thing"],
        splits=str(folder / "splits.json"), sink=SilentSink(),
    )  # fmt: skip
    return str(folder / "dataset")


def done(batches: Iterable[Batch], begin: float, end: float) -> float:
    """Images done from one time to another; a batch that was on then counts by its share."""
    inside = (
        batch.images * max(0.0, min(end, batch.end) - max(begin, batch.begin)) / (batch.end - batch.begin)
        for batch in batches
    )
    return sum(inside)


def steady(found: list[list[Batch]]) -> tuple[float, float]:
    """From when the last worker has begun until the first one ends.

    Raises:
        RuntimeError: They were never all at work.
    """
    begin = max(min(batch.begin for batch in each) for each in found)
    end = min(max(batch.end for batch in each) for each in found)
    if begin >= end:
        raise RuntimeError(f"{len(found)} workers were never all at work: give each more images (--images)")
    return begin, end


def run(job: Job, workers: int, folder: Path, image_s: float) -> dict[str, Any]:
    """One job: rates of the parts of its steady time, and what that cost."""
    began = time.time()
    with Busy() as busy:
        found = job(workers, folder)
    assert len(found) == workers, f"{len(found)} of {workers} workers did something"
    seconds, every = time.time() - began, [batch for each in found for batch in each]
    begin, end = steady(found)
    edges = np.linspace(begin, end, PARTS + 1)
    images, cpu = done(every, begin, end), busy.between(begin, end)
    return {
        "job s": seconds, "steady s": end - begin, "share": images / sum(batch.images for batch in every),
        "rates": [done(every, *pair) / (pair[1] - pair[0]) for pair in zip(edges[:-1], edges[1:], strict=True)],
        "busy": images * image_s / (workers * (end - begin)),
        "driver CPU ms": 1e3 * cpu["driver"] / images, "all CPU ms": 1e3 * cpu["all"] / images,
        "cores": cpu["all"] / (end - begin), "others": cpu["others"] / (end - begin),
    }  # fmt: skip


def summarise(runs: dict[int, list[dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """By number of workers: medians over all rounds, and the share of linear."""
    out: dict[int, dict[str, Any]] = {}
    fewest = min(runs)
    for workers, each in sorted(runs.items()):
        rate, low, high = harness.spread([rate for one in each for rate in one["rates"]])
        one = rate if workers == fewest else out[fewest]["img/s"]
        kept = [key for key in each[0] if key != "rates"]
        figures = {key: float(np.median([one[key] for one in each])) for key in kept}
        out[workers] = {"img/s": rate, "quartiles": [low, high], "linear": rate * fewest / (workers * one), **figures}
    return out


def report(name: str, found: dict[int, dict[str, Any]]) -> None:
    """The table of one job."""
    rows = [
        {"workers": workers, **each, "quartiles": f"{each['quartiles'][0]:.4g} to {each['quartiles'][1]:.4g}"}
        for workers, each in found.items()
    ]
    print(f"\n{name}\n{harness.table(rows)}", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", help="how many (1 2 4 8; small: 1 8)")
    parser.add_argument("--images", type=int, help="of each worker (512; small: 256)")
    parser.add_argument("--image-ms", type=float, default=25, help="the stub sleeps so long an image")
    parser.add_argument("--rounds", type=int, help="turns of each number of workers (1)", default=1)
    parser.add_argument("--small", action="store_true", help="under 2 minutes on 2 cores")
    args = parser.parse_args(argv)
    args.workers = args.workers or ([1, 8] if args.small else [1, 2, 4, 8])
    wanted = args.images or (256 if args.small else 512)
    args.images = -(-wanted // UNIT_ROWS) * UNIT_ROWS
    return args


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the tables and the JSON line; return figures and ratios."""
    args = parse(argv)
    print(f"load before: {', '.join(f'{load:.1f}' for load in os.getloadavg())}; {args.images} images a worker")
    figures: dict[str, Any] = {"image ms": args.image_ms}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary, ray_session(CPUS_EACH * (max(args.workers) + 1)):
        folder = Path(temporary)
        uri, model = make_dataset(folder, args), tiny_bundle(folder / "model", {"maps": False})
        jobs: dict[str, Job] = {
            INFERENCE: partial(inference, uri, model, args),
            TRAINING: partial(training, uri, args),
        }
        runs = {name: {workers: list[dict[str, Any]]() for workers in args.workers} for name in jobs}

        def turn(name: str, workers: int) -> float:
            own = runs[name][workers]
            own.append(
                run(jobs[name], workers, folder / f"{name.split()[0]}-{workers}-{len(own)}", args.image_ms / 1e3)
            )
            return float(np.median(own[-1]["rates"]))

        sides = {f"{name} {workers}": partial(turn, name, workers) for name in jobs for workers in args.workers}
        harness.in_turns(sides, args.rounds)
    for name in jobs:
        found = summarise(runs[name])
        report(name, found)
        figures[name] = {str(workers): each for workers, each in found.items()}
        ratios |= {f"{name}: linear, {workers} workers": each["linear"] for workers, each in found.items()}
    harness.finish("workers", figures, ratios)
    return figures, ratios


if __name__ == "__main__":
    main()
