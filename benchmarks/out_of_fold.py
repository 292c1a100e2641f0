"""Does the review threshold keep its promise on real images? Nuclei, every image predicted by models that never saw it.

    python -m benchmarks.out_of_fold --data ../shared/data/nuclei --out runs/out_of_fold --folds 4 --members 2

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

from benchmarks.promise import repeated_splits
from jobs.session import ray_session
from pipeline import datasets, ensemble, score
from pipeline.config import load, merge
from pipeline.errors import DoneError
from pipeline.recipe import TrainConfig
from pipeline.telemetry import Terminal


def fold_data(folder: Path, out: Path, fold: int, folds: int, seed: int, terminal: Terminal) -> str:
    """A dataset whose test split is the fold, and whose train and val splits are the rest."""
    names = sorted(path.stem for path in (folder / "images").iterdir())
    random.Random(seed).shuffle(names)
    test = names[fold::folds]
    rest = [name for name in names if name not in set(test)]
    out.mkdir(parents=True, exist_ok=True)
    splits = {"train": rest[len(rest) // 10 :], "val": rest[: len(rest) // 10], "test": test}
    (out / "splits.json").write_text(json.dumps(splits))
    made = datasets.ingest(
        "instances", str(folder / "images"), str(folder / "labels"), str(out / "data"),
        classes=["nucleus"], splits=str(out / "splits.json"), options={}, sink=terminal,
    )  # fmt: skip
    return made["uri"]


def predict_fold(args: Any, fold: int, terminal: Terminal) -> dict[str, np.ndarray]:
    """Rows (ids, score, loss...) of the fold, predicted by an ensemble of the other folds."""
    out = args.out / f"fold{fold}"
    data = fold_data(args.data.resolve(), out, fold, args.folds, args.seed, terminal)
    length = {"steps": args.steps, "epochs": None, "validate_every": args.steps, "patience": None}
    changes = {"data": data, "out": str(out / "model"), "train": length}
    config = TrainConfig.parse(merge(load(str(args.config), []), changes), str(args.config))
    try:
        bundle = ensemble.run(config, args.members, resume=True, sink=terminal).uri
    except DoneError:
        bundle = str(out / "model" / "bundle")
    return score.score(bundle, data, split="test", measure="metrics", sink=terminal)["meters"].pool.images_table()


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
    parser.add_argument("--delta", type=float, default=0.1)
    args = parser.parse_args()
    args.out, terminal = args.out.resolve(), Terminal()
    with ray_session():
        folds = [predict_fold(args, fold, terminal) for fold in range(args.folds)]
    terminal.close()
    ids, scores, losses = (np.concatenate([fold[key] for fold in folds]) for key in ("ids", "score", "loss"))
    np.savez(args.out / "rows.npz", ids=ids, scores=scores, losses=losses)
    mean = float(losses.mean())
    print(f"{len(ids)} images, mean loss {mean:.4f}, Spearman of score and loss {_spearman(scores, losses):.3f}")
    for factor in (0.5, 0.75, 1.0, 1.5):
        for n in (100, 200):
            found = repeated_splits(scores, losses, factor * mean, args.delta, n, args.repeats, args.seed)
            print(f"risk {factor} x mean = {factor * mean:.4f}, n {n}: {json.dumps(found)}")


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


if __name__ == "__main__":
    main()
