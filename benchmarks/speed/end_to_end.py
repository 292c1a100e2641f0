"""Training fed by the real stream beside the same training on one batch that already lies on the device.

The second is what the network alone takes: nothing is fetched, decoded, copied or augmented. Both sides take the same
step of the same worker, in turns of some steps each. Before each timed turn the stream side takes as many steps
untimed as batches may have gathered while the other side ran. The share of time that the network stands idle for
want of a batch (stall) is 1 - stream / resident. Labels are carried: a mask, or boxes.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from benchmarks.speed import feed as images
from pipeline.datasets import ingest
from pipeline.datasets.dataset import open_dataset
from pipeline.runtime.progress import SilentSink
from pipeline.stream.batches import DEPTH
from pipeline.training import loop
from pipeline.training.member_run import MemberRun
from pipeline.training.ray_dataset import training_dataset
from pipeline.training.worker import build_worker

MODELS: dict[str, dict[str, Any]] = {
    "unet_r34": {
        "task": "segmentation",
        "model": {"name": "smp", "arch": "unet", "encoder": "resnet34", "encoder_weights": None},
        "loss": {"cross_entropy": 1, "dice": 1},
    },
    "anchor_free_s": {"task": "detection", "model": {"name": "anchor_free", "size": "s"}},
}
AUGMENT = {"hflip": 0.5, "rotate": 10, "scale": [0.8, 1.2], "brightness": 0.2, "contrast": 0.2}


def make_dataset(folder: Path, sources: list[Image.Image], size: tuple[int, int], count: int) -> str:
    """An ingested dataset of distinct JPEGs of ``size`` (width, height) with five objects each; its URI."""
    files = images.make(folder / "images", sources, size, count)
    (folder / "labels").mkdir()
    for n, path in enumerate(files):
        ids, random = np.zeros((size[1], size[0]), np.uint8), np.random.default_rng(n)
        for number in range(1, 6):
            top, left = random.integers(0, size[1] // 2), random.integers(0, size[0] // 2)
            ids[top : top + size[1] // 4, left : left + size[0] // 4] = number
        Image.fromarray(ids).save(folder / "labels" / f"{path.stem}.png", compress_level=1)
    ingest.ingest(
        "instances", str(folder / "images"), str(folder / "labels"), str(folder / "dataset"),
        classes=["thing"], sink=SilentSink(),
        options={"hold_out": {"val": 0, "calibration": 0, "test": 0}},
    )  # fmt: skip
    return str(folder / "dataset")


class Run:
    """One model's worker, its stream, and one batch of it that stays."""

    def __init__(self, name: str, uri: str, args: argparse.Namespace, device: torch.device) -> None:
        turns = args.rounds * (args.turn + self._untimed(args)) + args.warmup + 1
        tree = {
            **MODELS[name], "data": uri, "out": f"{uri}-{name}",
            "input": {"size": [args.size, args.size], "fit": "stretch"}, "augment": AUGMENT,
            "optim": {"name": "adamw", "lr": 1e-4},
            "train": {"batch_size": args.batch, "steps": turns + 1, "precision": args.precision,
                      "compile": args.compile},
            "stream": {"decode": args.decode, "cache": args.cache, "prefetch": args.prefetch},
        }  # fmt: skip
        fit = MemberRun(tree, f"{uri}-{name}/members/0", "benchmark", torch.get_num_threads())
        self.args, self.device, config = args, device, fit.settings()
        self.worker = build_worker(config, open_dataset(uri), device, threads=fit.threads)
        began = time.perf_counter()
        tables: Any = training_dataset(fit).iter_batches(
            batch_size=args.batch, batch_format="pyarrow", prefetch_batches=1
        )
        self.steps = loop.steps_of(self.worker, tables, args.prefetch)
        self.resident = next(self.steps).batches
        self.wait()
        self.first_s = time.perf_counter() - began
        self.trained = 0
        for _ in range(args.warmup):
            self._train(next(self.steps).batches)
        self.wait()

    @staticmethod
    def _untimed(args: argparse.Namespace) -> int:
        return args.prefetch + DEPTH

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _train(self, batches: list[Any]) -> None:
        loop.train_step(self.worker, batches, 1e-4)
        self.trained += sum(len(batch) for batch in batches)

    def stream_turn(self) -> float:
        """Images a second, fed by the stream."""
        for _ in range(self._untimed(self.args)):
            self._train(next(self.steps).batches)
        return self._timed(next(self.steps).batches for _ in range(self.args.turn))

    def resident_turn(self) -> float:
        """Images a second on the batch that stays."""
        return self._timed(self.resident for _ in range(self.args.turn))

    def _timed(self, turn: Iterator[list[Any]]) -> float:
        self.wait()
        began, before = time.perf_counter(), self.trained
        for batches in turn:
            self._train(batches)
        self.wait()
        return (self.trained - before) / (time.perf_counter() - began)


def measure(
    uri: str, args: argparse.Namespace, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, float]]:
    """Rows of the table, figures and ratios (stream / resident), model after model."""
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name in args.models:
        run = Run(name, uri, args, device)
        rates = harness.in_turns({"stream": run.stream_turn, "resident": run.resident_turn}, args.rounds)
        run.steps.close()
        fed, alone = (harness.spread(rates[side]) for side in ("stream", "resident"))
        # Neighbouring turns are compared, so that a slower minute falls on both.
        ratio = harness.spread([a / b for a, b in zip(rates["stream"], rates["resident"], strict=True)])
        rows.append({
            "model": name, "stream img/s": fed[0], "quartiles": f"{fed[1]:.1f} to {fed[2]:.1f}",
            "resident img/s": alone[0], "quartiles ": f"{alone[1]:.1f} to {alone[2]:.1f}",
            "stream / resident": ratio[0], "stall": max(0.0, 1 - ratio[0]), "first batch s": run.first_s,
        })  # fmt: skip
        figures[name] = {
            "stream_img_s": rates["stream"], "resident_img_s": rates["resident"], "first_batch_s": run.first_s,
            "stall": 1 - ratio[0], "trained_images": run.trained, "steps_a_turn": args.turn,
        }  # fmt: skip
        ratios[f"{name}: stream / resident"] = ratio[0]
    return rows, figures, ratios
