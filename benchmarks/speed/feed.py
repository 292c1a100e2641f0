"""How many encoded JPEGs a second reach the trainer as 512x512 uint8 batches: this stream beside its rivals.

    python -m benchmarks.speed.feed --images FOLDER
    python -m benchmarks.speed.feed --small

Sides: what a training worker of this project does (shards -> Ray Data -> decode and frame in the worker); torch
DataLoader with Pillow, and with torchvision's decoder, and torchvision's antialiased resize to uint8, in the best of
several settings found in the same call; Ray Data as first written (read_parquet, decode in map_batches); and a bare
Ray Data read that decodes nothing, for the time to its first batch. They take turns on the same images: crops of
photographs, resized and encoded again. Time to the first batch runs from an empty hand (Ray is up, and every side
has run once); the steady rate counts what comes after the first batch. Each turn checks that every image came once
a pass. The stream also carries and frames labels, one box an image; the rivals carry none.
"""

import argparse
import json
import math
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.images import make, photographs
from benchmarks.speed.feed_baselines import (  # fmt: skip
    Item,
    bare_ray,
    fast_decoder,
    loader,
    naive_ray,
    pil_then_image,
    pil_then_tensor,
)
from jobs.session import ray_session
from pipeline.datasets import ingest
from pipeline.datasets.dataset import open_dataset
from pipeline.stream.batches import decode_batches, prefetch
from pipeline.training.member_run import MemberRun
from pipeline.training.ray_dataset import training_dataset

Side = Callable[[int], Iterator[Item]]
"""Number of passes -> batches."""


@dataclass
class Data:
    """The same images in both forms, and what is wanted of them."""

    files: list[Path]
    uri: str
    """The ingested dataset."""
    shards: list[str]
    side: int
    batch: int


@dataclass
class Log:
    """What was seen of one side: seconds to first batches, and some images of the first of them."""

    setting: str = ""
    passes: int = 1
    first_s: list[float] = field(default_factory=list)
    sample: Item = ([], None)
    delivered: int = 0


def stream(data: Data, passes: int) -> Iterator[Item]:
    """This project's: what ``pipeline.training.ray_train.train_worker`` does before the model, in this process."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    tree = {
        "task": "detection", "data": data.uri, "out": f"{data.uri}-run", "model": {"name": "anchor_free"},
        "input": {"size": [data.side, data.side], "fit": "stretch"},
        "train": {"batch_size": data.batch, "steps": passes * len(data.files) // data.batch},
    }  # fmt: skip
    fit = MemberRun(tree, f"{data.uri}-run/members/0", "feed", threads)
    config = fit.settings()
    task = config.build_task(open_dataset(config.data), threads)
    rows = training_dataset(fit)

    tables: Any = rows.iter_batches(batch_size=data.batch, batch_format="pyarrow", prefetch_batches=1)
    make = partial(decode_batches, task, tables, train=True, seed=config.seed)
    for item in prefetch(make, config.stream.prefetch):
        assert not item.failures, item.failures
        yield item.batch.image_ids, item.batch.images


OURS, BARE, NAIVE = "stream", "bare Ray Data", "naive Ray Data"
PIL, PIL_UINT8, FAST = "DataLoader PIL", "DataLoader PIL, resize on uint8", "DataLoader fast decoder"
RIVALS = (PIL, PIL_UINT8, FAST, NAIVE)


def settings(data: Data, small: bool) -> dict[str, dict[str, Side]]:
    """Side -> setting -> how it is run; the best setting of each takes part."""
    cores = os.cpu_count() or 1
    counts = [cores] if small else sorted({max(1, cores - 1), cores, 2 * cores})
    plans = [(workers, prefetch) for workers in counts for prefetch in ([2] if small else [2, 4])]

    def loaders(load: Any) -> dict[str, Side]:
        return {
            f"{workers} workers, prefetch {prefetch}": partial(
                loader, data, load=load, workers=workers, prefetch=prefetch
            )
            for workers, prefetch in plans
        }

    return {
        OURS: {"": partial(stream, data)},
        PIL: loaders(pil_then_image),
        PIL_UINT8: loaders(pil_then_tensor),
        FAST: loaders(fast_decoder),
        NAIVE: {f"{n} rows a call": partial(naive_ray, data, task_rows=n) for n in ([32] if small else [16, 32, 64])},
        BARE: {"": partial(bare_ray, data)},
    }


def turn(side: Side, data: Data, log: Log) -> float:
    """One turn of ``log.passes`` passes: images a second after the first batch. Every image once a pass.

    Raises:
        RuntimeError: An image came too rarely or too often.
    """
    began = time.perf_counter()
    batches = side(log.passes)
    names, images = next(batches)
    start = time.perf_counter()
    log.first_s.append(start - began)
    seen, first = Counter(names), len(names)
    if not log.sample[0] and images is not None:
        log.sample = (list(names[:8]), np.stack([np.asarray(image) for image in images[:8]]))
    for names, _ in batches:
        seen.update(names)
    seconds = time.perf_counter() - start
    wanted = dict.fromkeys((path.name for path in data.files), log.passes)
    if seen != wanted:
        wrong = sum(seen[name] != wanted.get(name, 0) for name in {*seen, *wanted})
        raise RuntimeError(f"{wrong} images did not come {log.passes} times")
    log.delivered += seen.total()
    return (seen.total() - first) / seconds


def tuned(data: Data, args: argparse.Namespace) -> tuple[dict[str, Callable[[], float]], dict[str, Log]]:
    """Run every setting of every side once; each side's best, long enough for its share of ``--seconds``."""
    turns: dict[str, Callable[[], float]] = {}
    logs: dict[str, Log] = {}
    for name, choices in settings(data, args.small).items():
        rates = {}
        for setting, side in choices.items():
            rates[setting] = turn(side, data, Log())
            print(f"  {name}, {setting or 'as it is'}: {rates[setting]:.0f} img/s", flush=True)
        best = max(rates, key=rates.__getitem__)
        # The bare read is there for its first batch: one pass is enough.
        passes = 1 if name == BARE else math.ceil(args.seconds / args.rounds * rates[best] / len(data.files))
        logs[name] = Log(best, max(1, passes))
        turns[name] = partial(turn, choices[best], data, logs[name])
    return turns, logs


def difference(data: Data, sample: Item) -> float:
    """Mean absolute difference from Pillow's decoding and resizing, on the 0..255 scale."""
    by_name = {path.name: str(path) for path in data.files}
    wanted = np.stack([pil_then_image(by_name[name], data.side).numpy() for name in sample[0]])
    found = sample[1] if sample[1].shape[1] == 3 else sample[1].transpose(0, 3, 1, 2)
    return float(np.abs(found.astype(np.int16) - wanted).mean())


def ingest_images(folder: Path, files: list[Path], size: tuple[int, int], args: argparse.Namespace) -> Data:
    """The files, and a dataset of them: all in ``train``, one box an image, about 16 shards."""
    labels = folder / "labels.json"
    images = [{"id": n, "file_name": path.name, "width": size[0], "height": size[1]} for n, path in enumerate(files)]
    box = [size[0] / 4, size[1] / 4, size[0] / 2, size[1] / 2]
    notes = [{"id": n, "image_id": n, "category_id": 1, "bbox": box, "iscrowd": 0} for n in range(len(files))]
    tree = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "thing"}]}
    labels.write_text(json.dumps(tree))
    total = sum(path.stat().st_size for path in files)
    options = {
        "hold_out": {"val": 0, "calibration": 0, "test": 0},
        "shard_bytes": max(total // 16, min(64, len(files)) * total // len(files)),
    }
    uri = str(folder / "data")
    ingest.ingest("coco", str(files[0].parent), str(labels), uri, options=options)
    info = open_dataset(uri)
    shards = sorted(f"{uri}/{file['path']}" for file in info.meta["files"] if file.get("split") == "train")
    return Data(files, uri, shards, args.side, args.batch)


def measure(folder: Path, size: tuple[int, int], args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """One size: figures of all sides, and ratios."""
    name = f"{size[0]}x{size[1]}"
    count = math.ceil(args.count / args.batch) * args.batch  # so that passes end with whole batches
    files = make(folder / name / "images", photographs(args.images), size, count)
    data = ingest_images(folder / name, files, size, args)
    mean_kb = sum(path.stat().st_size for path in files) / len(files) / 1e3
    print(f"{name}: {count} images of {mean_kb:.0f} kB, {len(data.shards)} shards; settings:", flush=True)
    turns, logs = tuned(data, args)
    rates = harness.in_turns(turns, args.rounds)
    rows, figures = [], {}
    for side, log in logs.items():
        rate, first = harness.spread(rates[side]), harness.spread(log.first_s)
        far = None if side == BARE else difference(data, log.sample)
        figures[side] = {
            "img/s": rate, "first_batch_s": first, "difference": far, "setting": log.setting,
            "images": log.delivered, "passes": log.passes * args.rounds,
        }  # fmt: skip
        rows.append({
            "side": side, "img/s": f"{rate[0]:.0f}", "quartiles": f"{rate[1]:.0f} to {rate[2]:.0f}",
            "first batch s": f"{first[0]:.2f}", "quartiles s": f"{first[1]:.2f} to {first[2]:.2f}",
            "difference": "-" if far is None else f"{far:.2f}", "images": log.delivered, "setting": log.setting,
        })  # fmt: skip
    print(harness.table(rows), flush=True)
    ours = figures[OURS]
    ratios = {
        f"{name} rate / {side}": ours["img/s"][0] / figures[side]["img/s"][0] for side in (PIL, PIL_UINT8, FAST, NAIVE)
    }
    ratios[f"{name} first batch / {BARE}"] = ours["first_batch_s"][0] / figures[BARE]["first_batch_s"][0]
    return {"jpeg_kb": mean_kb, **figures}, ratios


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs; default: scikit-image's samples")
    parser.add_argument("--sizes", nargs="+", default=["500x375", "1024x768"], help="width x height of the JPEGs")
    parser.add_argument("--count", type=int, help="distinct images of a size (1216; small: 96)")
    parser.add_argument("--batch", type=int, help="images a batch (64; small: 32)")
    parser.add_argument("--seconds", type=float, help="seconds of data for each side in all its turns (60; small: 4)")
    parser.add_argument("--rounds", type=int, help="turns of each side (3; small: 2)")
    parser.add_argument("--side", type=int, default=512, help="side of the square output in pixels")
    parser.add_argument("--small", action="store_true", help="under 2 minutes on 2 cores: few settings, little data")
    args = parser.parse_args(argv)
    whole = {"count": (1216, 96), "batch": (64, 32), "seconds": (60.0, 4.0), "rounds": (3, 2)}
    for name, values in whole.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.small])
    return args


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the tables and the JSON line; return figures and ratios."""
    args = parse(argv)
    figures, ratios = {}, {}
    with tempfile.TemporaryDirectory() as folder, ray_session(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: meant
        warnings.filterwarnings("ignore", message="The image decoding and encoding", category=DeprecationWarning)
        for text in args.sizes:
            width, height = (int(part) for part in text.split("x"))
            figures[text], found = measure(Path(folder), (width, height), args)
            ratios |= found
    harness.finish("feed", figures, ratios)
    return figures, ratios


if __name__ == "__main__":
    main()
