"""Where two people disagree, is the ensemble in doubt? CHASE: trained on observer 1, asked about observer 2.

    python -m benchmarks.quality.second_observer --data ../shared/data/chase --out runs/observers

Prints, over the test children: Dice of the pool against either observer, of observer 2 against observer 1, and how
well the pool's entropy and mutual information rank the pixels where observer 2 disagrees with observer 1 above the
others (AUROC), over all pixels and inside the retina alone, where the black rim can not help.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.session import ray_session
from pipeline import predictions, schema
from pipeline.datasets import ingest
from pipeline.errors import DoneError
from pipeline.metrics.ranking import auroc
from pipeline.models import bundle as bundles
from pipeline.runtime.progress import Terminal, redirect_output
from pipeline.scoring.job import predict
from pipeline.training import ensemble
from pipeline.training.train_config import TrainConfig

CLASSES = ["background", "vessel"]
CONFIG: dict[str, Any] = {
    "task": "segmentation",
    "model": {"name": "unet", "width": 12, "depth": 4},
    "loss": {"cross_entropy": 1, "dice": 1},
    "input": {"size": [128, 128], "fit": "crop", "mean": [0.5, 0.3, 0.1], "std": [0.25, 0.2, 0.1]},
    "augment": {
        "hflip": 0.5, "vflip": 0.5, "quarter_turns": 0.5, "rotate": 20, "scale": [0.8, 1.25],
        "brightness": 0.2, "contrast": 0.2,
    },
    "optim": {"name": "adamw", "lr": 3e-3, "warmup_steps": 20, "clip": 5, "ema": 0.98},
    "predict": {"map_scale": 1},
    "calibrate": {"kind": "temperature"},
}  # fmt: skip
SPLITS = {"train": range(1, 6), "val": [6], "calibration": [7], "test": [8, 9, 10]}
"""Children, both eyes of each."""


def ingest_images(folder: Path, out: Path, terminal: Terminal) -> str:
    """CHASE with observer 1's masks, split by child."""
    out.mkdir(parents=True, exist_ok=True)
    named = {
        split: [f"Image_{child:02d}{eye}" for child in children for eye in "LR"] for split, children in SPLITS.items()
    }
    (out / "splits.json").write_text(json.dumps(named))
    made = ingest.ingest(
        "masks", str(folder / "images"), str(folder / "observer1"), str(out / "data"),
        classes=CLASSES, splits=str(out / "splits.json"), options={}, sink=terminal,
    )  # fmt: skip
    return made["uri"]


def observer(folder: Path, number: int, image_id: str) -> np.ndarray:
    """(H, W) bool: vessel."""
    ending = {1: "1stHO", 2: "2ndHO"}[number]
    return np.asarray(Image.open(folder / f"observer{number}" / f"{Path(image_id).stem}_{ending}.png")) > 0


def retina(folder: Path, image_id: str) -> np.ndarray:
    """(H, W) bool: not the black rim."""
    return np.asarray(Image.open(folder / "images" / image_id).convert("RGB"))[..., 0] > 30


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Of two masks."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def compare(folder: Path, table: Any) -> dict[str, float]:
    """The figures, over the pixels of all test images together."""
    found: dict[str, list[np.ndarray]] = {"pool": [], "one": [], "two": [], "doubt": [], "inside": []}
    for row in table.to_pylist():
        shape = row["height"], row["width"]
        found["pool"].append(np.frombuffer(schema.unpack_map(row["mask"], *shape), np.uint8) == 1)
        found["doubt"].append(np.frombuffer(schema.unpack_map(row["uncertainty_map"], *shape), np.uint8))
        for name, number in (("one", 1), ("two", 2)):
            found[name].append(observer(folder, number, row["image_id"]).ravel())
        found["inside"].append(retina(folder, row["image_id"]).ravel())
    flat = {name: np.concatenate(parts) for name, parts in found.items()}
    disagree, inside, doubt = flat["one"] != flat["two"], flat["inside"], flat["doubt"]
    return {
        "Dice of observer 2 against observer 1": dice(flat["one"], flat["two"]),
        "Dice of the pool against observer 1": dice(flat["pool"], flat["one"]),
        "Dice of the pool against observer 2": dice(flat["pool"], flat["two"]),
        "pixels where the observers disagree": float(disagree.mean()),
        "mean entropy / ln 2 where they agree": float(doubt[~disagree].mean() / 255),
        "mean entropy / ln 2 where they disagree": float(doubt[disagree].mean() / 255),
        "AUROC of entropy for disagreement": auroc(doubt[~disagree], doubt[disagree]),
        "AUROC of entropy, inside the retina": auroc(doubt[~disagree & inside], doubt[disagree & inside]),
        "AUROC of entropy for the pool's own errors": auroc(
            doubt[flat["pool"] == flat["one"]], doubt[flat["pool"] != flat["one"]]
        ),
    }


def main() -> None:
    """Ingest, train, predict, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, observer1/ and observer2/")
    parser.add_argument("--out", type=Path, default=Path("runs/observers"))
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    folder, out = args.data.resolve(), args.out.resolve()
    with redirect_output(out / "log.txt") as terminal, ray_session():
        data = ingest_images(folder, out, terminal)
        length = {"batch_size": 8, "steps": args.steps, "validate_every": max(1, args.steps // 4)}
        config = TrainConfig.parse({**CONFIG, "data": data, "out": str(out / "model"), "train": length}, "observers")
        try:
            bundle = ensemble.train_ensemble(config, args.members, resume=True, sink=terminal).uri
        except DoneError:
            bundle = str(out / "model" / "bundle")
        made = predict(bundle, data, str(out / "predictions" / bundles.open_bundle(bundle).id), "test", terminal)
        terminal.close()
    figures = compare(folder, predictions.read(made["out"]))
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    for name, value in figures.items():
        print(f"{name:<45} {value:.4f}")


if __name__ == "__main__":
    main()
