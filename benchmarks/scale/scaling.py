"""Do memory and cost per image stay flat as the dataset grows: an epoch of training, and batch inference.

    python -m benchmarks.scale.scaling
    python -m benchmarks.scale.scaling --small

The same jobs over 1, 4 and 16 times as many images (small: 1 and 16), each size in a process and a Ray session of its
own: what ``dubito train`` does for one pass over the train split (validation is of the same few images at every size),
then what ``dubito predict`` does over that split. The model is tiny, so that what is measured is the stream, decoding
and writing. Memory is what processes have for themselves (``RssAnon`` of Linux), looked at several times a second:
``driver`` is the process that calls, ``worker`` the largest of Ray's that was at work, ``all`` the sum of the driver
and of all of Ray's workers, idle ones too, where it was largest. There are more workers where there is more to read
at once, up to the CPUs: ``all`` levels off there. ``store`` is what was used of the object store, which all share.
``seconds`` is the whole job, whose start and end cost the same at every size; so the cost of an image is taken from
what a larger dataset takes more than the next smaller one (``images/s more``).
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import harness
from benchmarks.images import make, photographs
from jobs.session import ray_session
from pipeline import models
from pipeline.datasets import ingest
from pipeline.models import bundle
from pipeline.runtime.progress import SilentSink
from pipeline.scoring.job import predict
from pipeline.training.member_run import MemberRun
from pipeline.training.ray_train import train_member

SCALES = (1, 4, 16)
HELD_OUT = 16
"""Images of validation, at every size."""
SIDE, BATCH = 64, 16
MODEL = {"name": "unet", "width": 4, "depth": 2}
EVERY_S = 0.1
"""Between two looks at memory."""
FIGURES = ("driver", "worker", "all", "store")


class Watch:
    """Samples the memory of this process and of all that it started, while a Ray session is on; bytes."""

    def __init__(self) -> None:
        self.peaks = dict.fromkeys(FIGURES, 0)
        self.titles: dict[str, int] = {}
        """Peak of the largest process of each title: of each class of actors, and of each function's tasks."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.look()

    def look(self) -> None:
        """Take one sample."""
        import ray

        family = descendants()
        driver = family[os.getpid()]["private"]
        workers = [each for each in family.values() if each["title"].startswith("ray::")]
        for each in workers:
            title = each["title"].removeprefix("ray::").split(".")[0]
            self.titles[title] = max(self.titles.get(title, 0), each["private"])
        busy = max((each["private"] for each in workers if each["title"] != "ray::IDLE"), default=0)
        room, free = (
            every.get("object_store_memory", 0) for every in (ray.cluster_resources(), ray.available_resources())
        )
        now = driver, busy, driver + sum(each["private"] for each in workers), int(room - free)
        self.peaks = {name: max(self.peaks[name], value) for name, value in zip(FIGURES, now, strict=True)}


def descendants() -> dict[int, dict[str, Any]]:
    """This process and all below it, by pid: ``parent``, ``title``, and ``private`` memory in bytes."""
    every: dict[int, dict[str, Any]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            title = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:  # it has just ended
            continue
        size = int(status.get("RssAnon", "0 kB").split()[0]) * 1024
        every[int(folder.name)] = {"parent": int(status["PPid"]), "title": title, "private": size}
    family, more = set(), {os.getpid()} & set(every)
    while more:
        family |= more
        more = {pid for pid, each in every.items() if each["parent"] in family} - family
    return {pid: every[pid] for pid in family}


def train_once(uri: str, out: str, rows: int) -> None:
    """One epoch as ``dubito train`` runs it."""
    tree = {
        "task": "segmentation", "data": uri, "out": out, "model": MODEL,
        "input": {"size": [SIDE, SIDE], "fit": "stretch"}, "loss": {"cross_entropy": 1},
        "augment": {"hflip": 0.5, "rotate": 10, "brightness": 0.2},
        "train": {"batch_size": BATCH, "epochs": 1}, "stream": {"window_mb": 1},
    }  # fmt: skip
    found = train_member(MemberRun(tree, f"{out}/members/0", "train", torch.get_num_threads()))
    assert found["metrics"]["step"] == -(-rows // BATCH), found["metrics"]


def predict_once(uri: str, out: str, rows: int) -> None:
    """The train split as ``dubito predict`` runs it, with masks and maps."""
    result = predict(tiny_bundle(Path(out)), uri, f"{out}/predictions", split="train", sink=SilentSink())
    assert result["statuses"] == {"ok": rows}, result["statuses"]


def tiny_bundle(folder: Path, predict: dict[str, Any] | None = None) -> str:
    """One member with random weights; its URI. ``predict``: settings of its predictions."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    settings = models.parse(MODEL, "benchmark")
    save_file(settings.build(2).state_dict(), folder / "0.safetensors")
    manifest = {
        "task": settings.task, "model": models.describe(settings), "classes": ["thing", "background"], "background": 1,
        "input": {"size": [SIDE, SIDE], "fit": "stretch", "mean": [0.5] * 3, "std": [0.25] * 3},
        "predict": predict or {},
    }  # fmt: skip
    return bundle.write_bundle(str(folder / "bundle"), manifest, [folder / "0.safetensors"]).uri


JOBS: dict[str, Callable[[str, str, int], None]] = {"training epoch": train_once, "batch inference": predict_once}


def work(uri: str, out: str, rows: int, pipe: Any) -> None:
    """In a process of its own: every job, watched."""
    found = {}
    with ray_session():
        for job, run in JOBS.items():
            began = time.perf_counter()
            with Watch() as watch:
                run(uri, f"{out}/{job.split()[0]}", rows)
            found[job] = {"seconds": time.perf_counter() - began, "peaks": watch.peaks, "titles": watch.titles}
    pipe.send(found)


def make_datasets(folder: Path, args: argparse.Namespace) -> dict[int, str]:
    """Factor -> URI of a dataset whose train split has that many times ``args.images``; the smaller in the larger."""
    count = args.images * SCALES[-1]
    width, height = map(int, args.size.split("x"))
    files = make(folder / "images", photographs(None), (width, height), count + HELD_OUT)
    ids = np.zeros((height, width), np.uint8)
    ids[height // 4 : height // 2, width // 4 : width // 2] = 1
    (folder / "labels").mkdir()
    for path in files:
        Image.fromarray(ids).save(folder / "labels" / f"{path.stem}.png")
    names, uris = [path.stem for path in files], {}
    for scale in (SCALES[0], SCALES[-1]) if args.small else SCALES:
        lists = {"train": names[: scale * args.images], "val": names[count:]}
        (folder / f"{scale}.json").write_text(json.dumps(lists))
        uris[scale] = str(folder / f"dataset{scale}")
        ingest.ingest(
            "instances", str(folder / "images"), str(folder / "labels"), uris[scale], classes=["thing"],
            splits=str(folder / f"{scale}.json"), sink=SilentSink(),
        )  # fmt: skip
    return uris


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="of the smallest dataset (1000; small: 96)")
    parser.add_argument("--size", help="width x height of the JPEGs (500x375; small: 96x72)")
    parser.add_argument("--rounds", type=int, help="turns of each size (3; small: 1)")
    parser.add_argument("--small", action="store_true", help="under 2 minutes on 2 cores")
    args = parser.parse_args(argv)
    for name, (full, small) in {"images": (1000, 96), "size": ("500x375", "96x72"), "rounds": (3, 1)}.items():
        if getattr(args, name) is None:
            setattr(args, name, small if args.small else full)
    return args


Run = dict[str, dict[str, Any]]


def measure(uris: dict[int, str], folder: Path, args: argparse.Namespace) -> dict[int, list[Run]]:
    """Factor -> its runs."""
    runs: dict[int, list[Run]] = {scale: [] for scale in uris}

    def turn(scale: int) -> float:
        began, out = time.perf_counter(), folder / f"{scale}-{len(runs[scale])}"
        rows = scale * args.images
        runs[scale].append(harness.apart(work, uris[scale], str(out), rows))
        return rows / (time.perf_counter() - began)

    harness.in_turns({str(scale): partial(turn, scale) for scale in uris}, args.rounds)
    return runs


def summarise(runs: dict[int, list[Run]], job: str, images: int) -> dict[int, dict[str, Any]]:
    """By factor: seconds, and medians of peaks in MB, of one job; and the rate of what it has more than the smaller."""
    out: dict[int, dict[str, Any]] = {}
    before = None
    for scale in runs:
        own = [run[job] for run in runs[scale]]
        peaks = {name: float(np.median([run["peaks"][name] for run in own])) / 1e6 for name in FIGURES}
        titles = {title: size / 1e6 for title, size in sorted(own[-1]["titles"].items())}
        out[scale] = {
            "images": scale * images, "seconds": harness.spread([run["seconds"] for run in own]), "MB": peaks,
            "images/s more": None, "largest by title, MB": titles,
        }  # fmt: skip
        if before is not None:
            longer = out[scale]["seconds"][0] - before["seconds"][0]
            more = out[scale]["images"] - before["images"]
            out[scale]["images/s more"] = more / longer if longer > 0 else None
        before = out[scale]
    return out


def growth(found: dict[int, dict[str, Any]], job: str) -> tuple[dict[str, float | None], dict[str, float]]:
    """Ratios of the largest dataset to the smallest, and how much memory a further image took, in kB."""
    each = list(found.values())
    first, last = each[0], each[-1]
    ratios: dict[str, float | None] = {
        f"{job}: {name}, 16x / 1x": last["MB"][name] / max(first["MB"][name], 1e-9) for name in FIGURES
    }
    rates = [every["images/s more"] for every in each[1:]]
    ratios[f"{job}: images/s, 4x to 16x / 1x to 4x"] = rates[1] / rates[0] if len(rates) == 2 and all(rates) else None
    more = last["images"] - first["images"]
    return ratios, {name: 1e3 * (last["MB"][name] - first["MB"][name]) / more for name in FIGURES}


def report(found: dict[int, dict[str, Any]], job: str, slopes: dict[str, float]) -> None:
    """The table of one job."""
    rows = [
        {"images": each["images"], "seconds": each["seconds"][0],
         "quartiles": f"{each['seconds'][1]:.4g} to {each['seconds'][2]:.4g}", "images/s more": each["images/s more"]}
        | {f"{name} MB": round(size) for name, size in each["MB"].items()}
        for each in found.values()
    ]  # fmt: skip
    print(f"\n{job}: time, and peaks of memory\n{harness.table(rows)}")
    print("a further image: " + ", ".join(f"{name} {value:+.2f} kB" for name, value in slopes.items()), flush=True)


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Print the tables and the JSON line; return figures and ratios."""
    args = parse(argv)
    if not Path("/proc/self/status").exists():
        sys.exit(
            "benchmarks.scale.scaling reads the memory of processes from /proc, which this system has not: use Linux"
        )
    figures: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with ray_session():
            uris = make_datasets(folder, args)
        runs = measure(uris, folder, args)
    print(f"{args.images} JPEGs of {args.size}, and 4 and 16 times as many; {args.rounds} rounds")
    for job in JOBS:
        found = summarise(runs, job, args.images)
        grown, slopes = growth(found, job)
        report(found, job, slopes)
        figures[job] = {**{f"{scale}x": each for scale, each in found.items()}, "kB a further image": slopes}
        ratios |= grown
    harness.finish("scaling", figures, ratios)
    return figures, ratios


if __name__ == "__main__":
    main()
