"""How many images a second are predicted and written: ``dubito predict`` beside Ray's documented batch inference.

    python -m benchmarks.speed.predict --images FOLDER
    python -m benchmarks.speed.predict --small

The rival is what Ray's documentation shows for images: read_images (Pillow), ToTensor, Resize and Normalize in
tasks, a float32 eager model in an actor pool, write_parquet; in the best of several settings found in the same call.
Both sides read the same JPEGs from a folder and write each image's mask, at its own size, to Parquet. This side also
writes the measures of doubt that it always writes (``measures`` in the table; maps are off). Two models: a stub of
one 1 x 1 convolution, which leaves reading, decoding and writing; and the U-Net with a ResNet-34. The weights are
random: trained ones cost the same. ``job`` is the whole job, from the call to its return; ``steady`` leaves out its
start: what a job over a few of the images takes. The masks of both are compared: mIoU, and the share of equal pixels.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import v2

from benchmarks import harness
from benchmarks.speed import feed as images
from jobs.session import ray_session
from pipeline import models, predictions, schema
from pipeline.models import bundle
from pipeline.runtime.progress import SilentSink
from pipeline.scoring import job
from pipeline.scoring.scorer import Scorer

CLASSES = ["background", "first", "second", "third"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNET = {"name": "smp", "arch": "unet", "encoder": "resnet34", "encoder_weights": None}
CORES = os.cpu_count() or 1
OURS, RIVAL = "dubito predict", "Ray's documented pattern"


class Stub(nn.Module):
    """(N, 3, H, W) -> (N, C, H, W) at next to no cost."""

    stride = 1

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, len(CLASSES), 1, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])[..., None, None])

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.mix(batch)


class StubScorer(Scorer):
    """The actor with the stub in the place of every member."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.predictor.members[:] = [Stub().to(self.predictor.device) for _ in self.predictor.members]


def write_bundle(folder: Path, side: int, seeds: Sequence[int] = (0,)) -> str:
    """A bundle of U-Nets with random weights, one a seed, whose files ``<n>.safetensors`` lie beside it; its URI."""
    folder.mkdir(parents=True)
    settings, files = models.parse(UNET, "benchmark"), []
    for number, seed in enumerate(seeds):
        torch.manual_seed(seed)
        files.append(folder / f"{number}.safetensors")
        save_file({name: value.contiguous() for name, value in build_unet().state_dict().items()}, files[-1])
    manifest = {
        "task": settings.task, "model": models.describe(settings), "classes": CLASSES, "background": 0,
        "input": {"size": [side, side], "fit": "stretch", "mean": list(MEAN), "std": list(STD)},
        "predict": {"maps": False},
    }  # fmt: skip
    return bundle.write_bundle(str(folder / "bundle"), manifest, files).uri


def build_unet() -> nn.Module:
    """With weights of its own."""
    return models.parse(UNET, "benchmark").build(len(CLASSES)).eval()


def count(folder: Path) -> int:
    """Files in it."""
    return len(os.listdir(folder))


@dataclass
class Side:
    """One side's jobs on one model; each writes Parquet into a folder of its own."""

    run: Callable[[Path, Path], None]
    """Folder of images, folder to write to."""
    few: Path
    """A folder of some of the images: what they take is the start of the job."""
    whole: Path
    out: Path
    start_s: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Time the start, caches being warm."""
        for number in (0, 1):
            began = time.perf_counter()
            self.run(self.few, self.out / f"few{number}")
            self.start_s = time.perf_counter() - began

    def turn(self) -> float:
        """Images a second of one whole job."""
        began = time.perf_counter()
        self.run(self.whole, self.out / str(len(self.seconds)))
        self.seconds.append(time.perf_counter() - began)
        return count(self.whole) / self.seconds[-1]

    def last(self) -> Path:
        """What the last turn wrote."""
        return self.out / str(len(self.seconds) - 1)

    def steady(self) -> list[float]:
        """Images a second of each turn, once the job has started."""
        extra = count(self.whole) - count(self.few)
        return [extra / max(1e-3, seconds - self.start_s) for seconds in self.seconds]


def ours(uri: str, scorer: type[Scorer], folder: Path, target: Path) -> None:
    """``dubito predict``."""
    job.predict(uri, str(folder), str(target), sink=SilentSink(), scorer_class=scorer)


# The rival: Ray's documentation, "Image Classification Batch Inference with PyTorch", with a mask for a label.


class Segmenter:
    """Holds the model; float32, eager."""

    def __init__(self, weights: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = Stub() if weights is None else build_unet()
        model.load_state_dict(model.state_dict() if weights is None else load_file(weights))
        self.model = model.to(self.device).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Rows with their masks, at the images' own sizes."""
        with torch.inference_mode():
            logits = self.model(torch.as_tensor(batch["image"]).to(self.device))
            masks = []
            for each, height, width in zip(logits, batch["height"], batch["width"], strict=True):
                whole = nn.functional.interpolate(each[None], (int(height), int(width)), mode="bilinear")[0]
                masks.append(whole.argmax(0).to(torch.uint8).cpu().numpy().tobytes())
        return {name: batch[name] for name in ("path", "height", "width")} | {"mask": masks}


def preprocess(row: dict[str, Any], transform: v2.Compose) -> dict[str, Any]:
    """Decoded row -> float32 (3, H, W), and its size."""
    height, width = row["image"].shape[:2]
    return {"path": row["path"], "height": height, "width": width, "image": transform(row["image"]).numpy()}


def rival(weights: str | None, side: int, folder: Path, target: Path, *, batch: int, early: bool, apart: bool) -> None:
    """One job; ``weights`` None: the stub.

    ``early``: resize uint8 before ToTensor makes floats of it, which the documentation does not, but may be faster.
    ``apart``: preprocess in tasks, not in the model's actor, where Ray puts it on a CPU if both take as much.
    """
    import ray.data

    resize, as_float = v2.Resize((side, side), antialias=True), v2.ToDtype(torch.float32, scale=True)
    steps = [v2.ToImage(), *([resize, as_float] if early else [as_float, resize]), v2.Normalize(MEAN, STD)]
    cuda = torch.cuda.is_available()
    (
        ray.data.read_images(str(folder), mode="RGB", include_paths=True)
        .map(partial(preprocess, transform=v2.Compose(steps)))
        .map_batches(
            Segmenter,
            fn_constructor_args=(weights, 1 if cuda else CORES),
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=2 if apart else 1,
            num_gpus=1 if cuda else None,
            batch_size=batch,
        )
        .write_parquet(str(target))
    )


def settings(small: bool) -> dict[str, dict[str, Any]]:
    """Of the rival; the best takes part."""
    plans = [(16, True, True)]
    if not small:
        aparts = [True] if torch.cuda.is_available() else [True, False]
        plans = [(batch, early, apart) for batch in (16, 64) for early in (True, False) for apart in aparts]
    return {
        f"batch {batch}, resize {'uint8' if early else 'float'}, {'tasks apart' if apart else 'fused'}": {
            "batch": batch, "early": early, "apart": apart,
        }
        for batch, early, apart in plans
    }  # fmt: skip


def masks(folder: Path) -> dict[str, bytes]:
    """Name of an image -> its mask, row-major uint8; of either side."""
    out = {}
    if (folder / "_MANIFEST.json").exists():
        for row in predictions.read(str(folder)).to_pylist():
            out[row["image_id"]] = schema.unpack_map(row["mask"], row["height"], row["width"])
        return out
    for row in pq.read_table(folder, columns=["path", "mask"]).to_pylist():
        out[Path(row["path"]).name] = row["mask"]
    return out


def agreement(first: dict[str, bytes], second: dict[str, bytes]) -> tuple[float, float]:
    """(mIoU, share of equal pixels) of the masks of two sides, over the classes that either shows.

    Raises:
        RuntimeError: They are not of the same images.
    """
    if first.keys() != second.keys():
        raise RuntimeError(
            f"images differ: {len(first)} and {len(second)}, {len(first.keys() & second.keys())} in both"
        )
    table = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for name, mask in first.items():
        pair = np.frombuffer(mask, np.uint8).astype(np.int64) * len(CLASSES) + np.frombuffer(second[name], np.uint8)
        table += np.bincount(pair, minlength=table.size).reshape(table.shape)
    both, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    return float((both[union > 0] / union[union > 0]).mean()), float(both.sum() / table.sum())


def folders(root: Path, args: argparse.Namespace, number: int) -> tuple[Path, Path]:
    """(some, all) of ``number`` images."""
    few, whole = root / "few", root / "whole"
    width, height = (int(part) for part in args.size.split("x"))
    files = images.make(whole, images.photographs(args.images), (width, height), number)
    few.mkdir()
    for path in files[: max(2, min(16, number // 8))]:
        os.link(path, few / path.name)
    return few, whole


def compare(name: str, root: Path, args: argparse.Namespace, uri: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Both sides on one model; prints the table, returns figures and ratios."""
    stub = name == "stub"
    few, whole = folders(root / name, args, args.count if stub else args.model_count)
    weights = None if stub else str(Path(uri).parent / "0.safetensors")
    sides = {OURS: Side(partial(ours, uri, StubScorer if stub else Scorer), few, whole, root / f"{name}-ours")}
    best, figures = 0.0, dict[str, Any](images=count(whole))
    plans = settings(args.small)
    for text, setting in plans.items():
        side = Side(partial(rival, weights, args.side, **setting), few, whole, root / f"{name} {text}")
        side.begin()
        rate = side.turn() if len(plans) > 1 else 1.0
        if len(plans) > 1:
            print(f"  {name}, {RIVAL}, {text}: {rate:.1f} img/s", flush=True)
        if rate > best:
            best, figures["setting"], sides[RIVAL] = rate, text, side
    sides[OURS].begin()
    harness.in_turns({key: side.turn for key, side in sides.items()}, args.rounds)
    same = agreement(masks(sides[OURS].last()), masks(sides[RIVAL].last()))
    rows, figures["miou"], figures["equal_pixels"] = [], *same
    for key, side in sides.items():
        jobs, flow = (count(whole) / np.array(side.seconds[-args.rounds :])).tolist(), side.steady()[-args.rounds :]
        figures[key] = {"job_img_s": jobs, "steady_img_s": flow, "start_s": side.start_s}
        middle, low, high = harness.spread(flow)
        rows.append({
            "model": name, "side": key, "steady img/s": middle, "quartiles": f"{low:.1f} to {high:.1f}",
            "job img/s": harness.spread(jobs)[0], "start s": side.start_s, "mIoU of both": same[0],
        })  # fmt: skip
    print(harness.table(rows), flush=True)

    def ratio(kind: str) -> float:
        return float(np.median(figures[OURS][kind]) / np.median(figures[RIVAL][kind]))

    return figures, {f"{name} steady": ratio("steady_img_s"), f"{name} job": ratio("job_img_s")}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs; default: scikit-image's samples")
    parser.add_argument("--size", default="500x375", help="width x height of the JPEGs")
    parser.add_argument("--side", type=int, default=512, help="side of the network's square input in pixels")
    parser.add_argument("--models", nargs="+", default=["stub", "unet_r34"])
    parser.add_argument("--count", type=int, help="images for the stub (GPU: 40000, else 1000; small: 200)")
    parser.add_argument("--model-count", type=int, help="images for the U-Net (GPU: 20000, else 64; small: 8)")
    parser.add_argument("--rounds", type=int, help="turns of each side (3; small: 1)")
    parser.add_argument("--small", action="store_true", help="under 2 minutes on 2 cores: few settings, few images")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    args.count = args.count or (200 if args.small else 40_000 if cuda else 1000)
    args.model_count = args.model_count or (8 if args.small else 20_000 if cuda else 64)
    args.rounds = args.rounds or (1 if args.small else 3)
    return args


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the tables and the JSON line; return figures and ratios."""
    args = parse(argv)
    figures, ratios = {}, {}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        uri = write_bundle(Path(folder) / "model", args.side)
        for name in args.models:
            figures[name], found = compare(name, Path(folder), args, uri)
            ratios |= found
    harness.finish("predict", figures, ratios)
    return figures, ratios


if __name__ == "__main__":
    main()
