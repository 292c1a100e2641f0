"""A server, a proxy before it, data, and what undisturbed jobs made of them: what faults are measured against."""

import argparse
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.faults.jobs import Ended, run
from infra.local.fault_proxy import FaultProxy
from infra.local.s3_server import Server, environment, make_bucket
from pipeline import predictions, storage
from pipeline.datasets.dataset import open_dataset
from pipeline.training import checkpoint

CLASSES = ["background", "square"]
NOISE = 0.02
"""Of validation losses between runs: another worker's rows enter a step in another order of sums."""


class World:
    """The server, the proxy, the data, and what undisturbed jobs made of them."""

    def __init__(self, folder: Path, server: Server, proxy: FaultProxy, args: argparse.Namespace) -> None:
        self.folder, self.server, self.proxy, self.args = folder, server, proxy, args
        self.bucket = make_bucket(server, "faults")
        # Faults that last seconds: a minute of patience, so that the table does not take hours.
        quiet = {"OMP_NUM_THREADS": "1", "DUBITO_STORAGE_PATIENCE_S": "90"}
        self.direct = {**environment(server), **quiet}
        self.through = {**self.direct, "AWS_ENDPOINT_URL": proxy.endpoint}
        os.environ.update(self.direct)
        self._upload()
        self._count = 0
        self.fingerprint, self.losses, self.rows, self.seconds = self._undisturbed()

    def uri(self, name: str) -> str:
        """Below the bucket."""
        return f"{self.bucket}/{name}"

    def fresh(self, name: str) -> str:
        """One that nobody has used."""
        self._count += 1
        return self.uri(f"{name}-{self._count}")

    def ingest(self, out: str, *options: str) -> list[str]:
        """Arguments of the job."""
        images, masks = self.uri("source/images"), self.uri("source/masks")
        sets = [part for option in ("shard_bytes=60000", *options) for part in ("--set", option)]
        return ["ingest", "--format", "masks", "--images", images, "--labels", masks, "--classes", ",".join(CLASSES),
                "--out", out, *sets]  # fmt: skip

    def train(self, data: str, out: str, resume: bool = False) -> list[str]:
        """Arguments of the job."""
        path = self.folder / f"{out.rsplit('/', 1)[-1]}.yaml"
        path.write_text(json.dumps({
            "task": "segmentation", "data": data, "out": out, "model": {"name": "unet", "width": 4, "depth": 2},
            "input": {"size": [64, 64], "fit": "letterbox"},
            "train": {"batch_size": 4, "epochs": self.args.epochs, "validate_every": 6, "workers": 2, "threads": 1},
        }))  # fmt: skip
        return ["train", str(path), *(["--resume"] if resume else [])]

    def predict(self, out: str, data: str | None = None) -> list[str]:
        """Arguments of the job."""
        return ["predict", "--bundle", self.uri("run/bundle"), "--data", data or self.uri("many"), "--out", out]

    def _upload(self) -> None:
        """Squares on noise with their masks, and as many again as a dataset to predict."""
        rng = np.random.default_rng(0)
        for n in range(self.args.images):
            mask = np.zeros((64, 64), np.uint8)
            mask[8 + n % 9 : 40, 10 : 30 + n % 13] = 1
            picture = rng.integers(0, 90, (64, 64, 3)) + 120 * mask[..., None]
            for kind, pixels in (("images", picture.astype(np.uint8)), ("masks", mask)):
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "PNG")
                storage.write_bytes(self.uri(f"source/{kind}/image{n:04d}.png"), stream.getvalue())

    def _undisturbed(self) -> tuple[str, dict[int, float], pa.Table, dict[str, float]]:
        seconds = {}
        many = ["ingest", "--format", "demo", "--out", self.uri("many"), "--set", f"images={self.args.many}"]
        plans = {
            "many": many, "ingest": self.ingest(self.uri("data")),
            "train": self.train(self.uri("data"), self.uri("run")),
            "predict": self.predict(self.uri("predictions")),
        }  # fmt: skip
        for name, args in plans.items():
            ended = run(self.folder, self.direct, *args)
            if ended.code != 0:
                raise RuntimeError(f"the undisturbed {name} failed ({ended.code}):\n{ended.said[-3000:]}")
            seconds[name] = ended.seconds
        print("undisturbed: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()), flush=True)
        info = open_dataset(self.uri("data"))
        return info.fingerprint, losses(self.uri("run")), rows_of(self.uri("predictions")), seconds


def losses(run_uri: str) -> dict[int, float]:
    """Validation loss by step, as the last checkpoint tells it."""
    newest = checkpoint.latest(f"{run_uri}/members/0")
    history = json.loads(storage.read_bytes(f"{newest}/progress.json"))["history"]
    return {row["step"]: row["val_loss"] for row in history if "val_loss" in row}


def far_from(world: World, run_uri: str) -> float:
    """Largest difference of a run's validation losses from those of the undisturbed one."""
    found = losses(run_uri)
    return max((abs(found.get(step, 9e9) - loss) for step, loss in world.losses.items()), default=9e9)


def rows_of(uri: str) -> pa.Table:
    """Predictions by image_id."""
    return predictions.read(uri).sort_by("image_id")


def tally(ended: list[Ended]) -> Counter[str]:
    """Crashes and hangs."""
    return Counter(crashes=sum(each.crashed for each in ended), hangs=sum(each.code is None for each in ended))


def compare_rows(found: pa.Table, wanted: pa.Table) -> Counter[str]:
    """Lost, doubled, and whether any of the rest differs."""
    have, want = Counter(found["image_id"].to_pylist()), set(wanted["image_id"].to_pylist())
    same = found.num_rows == wanted.num_rows and found.equals(wanted)
    return Counter(
        lost=len(want - have.keys()), doubled=sum(count > 1 for count in have.values()) + len(have.keys() - want),
        differ=int(not same),
    )  # fmt: skip


def units(out: str) -> list[str]:
    """Finished unit files."""
    return [item.path for item in storage.list_files(out, (".parquet",)) if "/unit-" in item.path]
