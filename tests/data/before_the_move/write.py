"""Writes what lies beside this file, with the code of before the move: README.md says with which commit, and how."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import torch
from PIL import Image
from safetensors.torch import save_file

SIDE = 24
BUCKET = "s3://before-the-move"
SPLITS = {"train": range(6), "val": range(6, 8), "test": range(8, 11), "calibration": range(11, 14)}
INPUT = {"size": [32, 32], "fit": "letterbox", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
UNET = {"name": "unet", "width": 4, "depth": 2}
DETECTOR = {"name": "anchor_free", "width": 4, "strides": [8], "head_width": 8}
PREDICT_DETECTION = {"score_threshold": 0.001, "max_boxes": 5}
RUN = {
    "task": "segmentation",
    "data": f"{BUCKET}/packed",
    "out": f"{BUCKET}/run",
    "model": {**UNET, "stem": True},
    "loss": {"cross_entropy": 1, "dice": 1},
    "input": {"size": [32, 32]},
    "augment": {"hflip": 0.5, "rotate": 10, "brightness": 0.1},
    "optim": {"lr": 0.003, "ema": 0.9},
    "train": {"batch_size": 2, "threads": 1, "steps": 60, "validate_every": 20},
}


def encode(pixels: np.ndarray) -> bytes:
    """As PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_sources(storage: Any) -> None:
    """Images of a bright rectangle on noise, their label maps, and who belongs to which split."""
    random = np.random.default_rng(0)
    for number in (number for numbers in SPLITS.values() for number in numbers):
        ids = np.zeros((SIDE, SIDE), np.uint8)
        ids[3 + number % 4 : 16, 5 : 12 + number % 5] = 1
        pixels = random.integers(0, 12, (SIDE, SIDE, 1)) * 8 + 120 * (ids[..., None] > 0) + np.arange(3) * 20
        for folder, array in (("images", pixels), ("labels", ids)):
            storage.write_bytes(f"{BUCKET}/{folder}/image{number:02d}.png", encode(array.astype(np.uint8)))
    lists = {split: [f"image{number:02d}" for number in numbers] for split, numbers in SPLITS.items()}
    storage.write_bytes(f"{BUCKET}/splits.json", json.dumps(lists).encode())


def flat(value: Any) -> list[torch.Tensor]:
    """All tensors of what a network returns, in the order of its fields."""
    if isinstance(value, torch.Tensor):
        return [value.detach().float().flatten()]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in flat(item)] if isinstance(value, (list, tuple)) else []


def member_outputs(bundle: Any) -> list[np.ndarray]:
    """What each member says of one fixed image."""
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        return [torch.cat(flat(bundle.load_member(k)(image))).numpy() for k in range(bundle.members)]


def write_bundle(name: str, model: dict[str, Any], seeds: range, fingerprint: str, predict: dict[str, Any]) -> Any:
    """A bundle of random weights, a member for each seed."""
    from pipeline import bundle, models

    settings = models.parse(model, "write")
    paths = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            torch.manual_seed(seed)
            state = settings.build(2 if settings.task == "segmentation" else 1).state_dict()
            paths.append(Path(folder) / f"{seed}.safetensors")
            save_file({key: value.contiguous() for key, value in state.items()}, paths[-1])
        manifest = {
            "task": settings.task, "model": models.describe(settings), "classes": ["cell", "background"],
            "background": 1, "input": INPUT, "predict": predict, "seeds": list(seeds),
            "data": {"name": "packed", "fingerprint": fingerprint},
        }  # fmt: skip
        return bundle.write(f"{BUCKET}/{name}", manifest, paths)


def begin_run() -> int:
    """Train until the first checkpoint, and kill the run; the step that it came to."""
    from pipeline import checkpoint, storage

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(json.dumps(RUN))
        command = [sys.executable, "-m", "jobs.cli", "train", "config.yaml"]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        process = subprocess.Popen(command, cwd=folder, start_new_session=True, env=environment)
        while checkpoint.latest(f"{BUCKET}/run/members/0") is None:
            if process.poll() is not None:
                raise RuntimeError("the run ended before its first checkpoint")
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(10)  # Ray's workers end after their driver
    newest = checkpoint.latest(f"{BUCKET}/run/members/0")
    return json.loads(storage.read_bytes(f"{newest}/progress.json"))["step"]


def write_all(expected: dict[str, Any], arrays: dict[str, np.ndarray], tables: dict[str, pa.Table]) -> None:
    """Everything that needs Ray."""
    from pipeline.recipe import CalibrateSettings

    from pipeline import bundle as bundles
    from pipeline import calibrate, datasets, exams, predictions, registry, score, storage

    write_sources(storage)
    for name, referenced in (("packed", False), ("referenced", True)):
        datasets.ingest(
            "instances", f"{BUCKET}/images", f"{BUCKET}/labels", f"{BUCKET}/{name}",
            classes=["cell"], splits=f"{BUCKET}/splits.json", options={"referenced": referenced},
        )  # fmt: skip
        info = datasets.open_dataset(f"{BUCKET}/{name}")
        expected["datasets"][name] = {"fingerprint": info.fingerprint, "counts": info.counts, "classes": info.classes}
    fingerprint = info.fingerprint
    segmentation = write_bundle("bundle-segmentation", UNET, range(2), fingerprint, {})
    detection = write_bundle("bundle-detection", DETECTOR, range(1), fingerprint, PREDICT_DETECTION)
    staged = bundles.stage(f"{BUCKET}/bundle-calibrated", segmentation.manifest, bundles.member_uris(segmentation))
    settings = CalibrateSettings.parse({"risk": 0.99, "delta": 0.5}, "write")
    calibrated = bundles.commit(calibrate.calibrate(staged, f"{BUCKET}/packed", settings))
    for bundle in (segmentation, detection, calibrated):
        name = bundle.uri.rsplit("/", 1)[-1]
        expected["bundles"][name] = {"id": bundle.id, "members": bundle.members}
        if bundle is not calibrated:
            arrays |= {f"{name}-{k}": output for k, output in enumerate(member_outputs(bundle))}
        counts = exams.sit(f"{BUCKET}/metrics", bundle.uri, f"{BUCKET}/packed", "test")
        expected["metrics"][name] = counts.compute()
    for bundle, data in ((segmentation, "packed"), (detection, "referenced")):
        name = f"predictions-{bundle.task}"
        score.predict(bundle.uri, f"{BUCKET}/{data}", f"{BUCKET}/{name}", split="test")
        tables[name] = predictions.read(f"{BUCKET}/{name}")
    registry.promote(f"{BUCKET}/registry", "cells", segmentation.uri)
    registry.promote(f"{BUCKET}/registry", "cells", calibrated.uri)
    registry.rollback(f"{BUCKET}/registry", "cells")
    registry.decide(f"{BUCKET}/registry", "cells", "20260101-000000", {"decision": "reject", "reasons": ["no gain"]})
    expected["champion"] = {"number": 3, "kind": "rollback", "bundle": segmentation.uri, "bundle_id": segmentation.id}


def main(out: Path) -> None:
    """Write everything into an S3 server of this script's own, whose bucket is then packed into ``out``."""
    from infra.local.s3_server import environment, make_bucket, s3_server

    expected: dict[str, Any] = {"datasets": {}, "bundles": {}, "metrics": {}, "pyarrow": pa.__version__}
    arrays: dict[str, np.ndarray] = {}
    tables: dict[str, pa.Table] = {}
    with s3_server() as server:
        os.environ.update(environment(server))
        make_bucket(server, BUCKET.removeprefix("s3://"))
        import ray

        from pipeline import storage

        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        write_all(expected, arrays, tables)
        ray.shutdown()
        expected["run"] = {"step": begin_run(), "steps": RUN["train"]["steps"]}
        files = {
            f"bucket/{file.path}": storage.read_bytes(f"{BUCKET}/{file.path}") for file in storage.list_files(BUCKET)
        }
    files["expected/run.json"] = json.dumps(RUN, indent=1).encode()
    files["expected/values.json"] = json.dumps(expected, indent=1).encode()
    with io.BytesIO() as file:
        np.savez(file, **arrays)
        files["expected/member_outputs.npz"] = file.getvalue()
    for name, table in tables.items():
        with io.BytesIO() as file:
            pyarrow.feather.write_feather(table, file, compression="uncompressed")
            files[f"expected/{name}.arrow"] = file.getvalue()
    with tarfile.open(out / "files.tar.xz", "w:xz") as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(Path(__file__).resolve().parent)
