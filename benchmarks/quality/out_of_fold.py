"""Does the review threshold keep its promise on real images? Nuclei, every image predicted by models that never saw it.

    python -m benchmarks.quality.out_of_fold --data ../shared/data/nuclei --out runs/out_of_fold --folds 4 --members 2

Cuts all images into folds, trains a small ensemble without each and predicts it: a score (mean entropy) and a loss
(1 - IoU) for every image. Then, again and again: draws a calibration set from these rows, sets the threshold on it,
and looks whether the accepted ones among the rest keep the risk. Prints violations and accepted shares.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.quality.review_threshold import repeated_splits
from jobs.session import ray_session
from pipeline.config import load, merge
from pipeline.datasets import ingest
from pipeline.errors import DoneError
from pipeline.metrics.ranking import spearman
from pipeline.runtime.progress import Terminal, redirect_output
from pipeline.scoring import job
from pipeline.training import ensemble
from pipeline.training.train_config import TrainConfig


def fold_data(folder: Path, out: Path, fold: int, folds: int, seed: int, terminal: Terminal) -> str:
    """A dataset whose test split is the fold, and whose train and val splits are the rest."""
    names = sorted(path.stem for path in (folder / "images").iterdir())
    random.Random(seed).shuffle(names)
    test = names[fold::folds]
    rest = [name for name in names if name not in set(test)]
    out.mkdir(parents=True, exist_ok=True)
    splits = {"train": rest[len(rest) // 10 :], "val": rest[: len(rest) // 10], "test": test}
    (out / "splits.json").write_text(json.dumps(splits))
    made = ingest.ingest(
        "instances", str(folder / "images"), str(folder / "labels"), str(out / "data"),
        classes=["nucleus"], splits=str(out / "splits.json"), options={}, sink=terminal,
    )  # fmt: skip
    return made["uri"]


def predict_fold(args: Any, fold: int, terminal: Terminal) -> pa.Table:
    """The numbers of the fold's images, and their ``loss``, predicted by an ensemble of the other folds."""
    out = args.out / f"fold{fold}"
    data = fold_data(args.data.resolve(), out, fold, args.folds, args.seed, terminal)
    length = {"steps": args.steps, "epochs": None, "validate_every": args.steps, "patience": None}
    changes = {"data": data, "out": str(out / "model"), "train": length}
    config = TrainConfig.parse(merge(load(str(args.config), []), changes), str(args.config))
    try:
        bundle = ensemble.train_ensemble(config, args.members, resume=True, sink=terminal).uri
    except DoneError:
        bundle = str(out / "model" / "bundle")
    found = job.score(bundle, data, split="test", measure="metrics", scalars=True, sink=terminal)
    rows = found["meters"].pool.images_table()
    losses = dict(zip(rows["ids"].tolist(), rows["loss"].tolist(), strict=True))
    names = found["scalars"]["image_id"].to_pylist()
    return found["scalars"].append_column("loss", pa.array([losses[name] for name in names], pa.float64()))


def doubts(table: pa.Table) -> dict[str, np.ndarray]:
    """Every measure of an image, as doubt."""
    names = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    columns = {name: table[name].to_numpy() for name in names if name not in ("loss", "uncertainty")}
    return {name: 1 - values if name == "member_dice" else values for name, values in columns.items()}


def main() -> None:
    """Train, predict, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--out", type=Path, default=Path("runs/out_of_fold"))
    parser.add_argument("--config", type=Path, default=Path("jobs/configs/nuclei_unet.yaml"))
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--scores", default="entropy_mean,member_dice", help="measures that thresholds act on")
    parser.add_argument("--delta", type=float, default=0.1)
    args = parser.parse_args()
    args.out = args.out.resolve()
    with redirect_output(args.out / "log.txt") as terminal, ray_session():
        folds = [predict_fold(args, fold, terminal) for fold in range(args.folds)]
        terminal.close()
    table = pa.concat_tables(folds)
    pq.write_table(table, args.out / "rows.parquet")
    losses, scores = table["loss"].to_numpy(), doubts(table)
    mean = float(losses.mean())
    print(f"{len(losses)} images, mean loss {mean:.4f}; Spearman of each measure and the loss:")
    for name, values in sorted(scores.items(), key=lambda item: -spearman(item[1], losses)):
        print(f"  {name:<25} {spearman(values, losses):.3f}")
    for name in args.scores.split(","):
        for factor in (0.75, 1.0, 1.25, 1.5):
            for n in (100, 200):
                found = repeated_splits(scores[name], losses, factor * mean, args.delta, n, args.repeats, args.seed)
                print(f"{name}, risk {factor} x mean = {factor * mean:.4f}, n {n}: {json.dumps(found)}")


if __name__ == "__main__":
    main()
