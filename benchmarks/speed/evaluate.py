"""How long evaluation takes: average precision and mean IoU beside pycocotools, faster-coco-eval and torchmetrics.

    python -m benchmarks.speed.evaluate
    python -m benchmarks.speed.evaluate --small

The same made detections for all: boxes around the truth, boxes anywhere, several classes. A turn is everything from
arrays in memory to the figure: each library's own form of the input, matching and accumulation. The figures are
compared: mAP is the mean over IoU thresholds .50 to .95 and 101 recalls, at most 100 boxes of a class an image, as
pycocotools has it. Ours as a whole also makes what an evaluation reports beside mAP (LRP, LaECE, PDQ, D-ECE, F1 by
class); it has a row of its own.
"""

import argparse
import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from pipeline.metrics import DetectionMetric, SegmentationMetric
from pipeline.metrics.detection_precision import coco_precision

OURS, WHOLE, COCO, FAST = "dubito, mAP", "dubito, everything it reports", "pycocotools", "faster-coco-eval"
METRICS = "torchmetrics, faster-coco-eval inside"
Row = dict[str, Any]


def detections(images: int, found: int, true: int, classes: int, seed: int = 0) -> list[Row]:
    """Images with ``true`` objects and ``found`` boxes, half of those near an object; pixels, xyxy."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(images):
        corner, side = rng.uniform(0, 500, (true, 2)), rng.lognormal(4, 0.7, (true, 2))
        truth = np.concatenate([corner, corner + side], 1)
        labels = rng.integers(0, classes, true)
        near = rng.integers(0, true, found)
        shift = rng.normal(0, 0.12, (found, 4)) * np.tile(side[near], 2)
        boxes = truth[near] + shift
        anywhere = rng.random(found) < 0.5
        boxes[anywhere, :2] = rng.uniform(0, 500, (anywhere.sum(), 2))
        boxes[anywhere, 2:] = boxes[anywhere, :2] + rng.lognormal(4, 0.7, (anywhere.sum(), 2))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        said = np.where(rng.random(found) < 0.9, labels[near], rng.integers(0, classes, found))
        scores = np.clip(rng.normal(np.where(anywhere, 0.35, 0.6), 0.2), 0.001, 0.999)
        out.append({"boxes": boxes, "scores": scores, "labels": said, "true": truth, "true_labels": labels})
    return out


def filled(rows: list[Row], classes: int) -> DetectionMetric:
    """Ours with all rows counted in."""
    metric = DetectionMetric(classes)
    for n, row in enumerate(rows):
        metric.update(f"{n:06d}", row["boxes"], row["scores"], row["labels"], row["true"], row["true_labels"])
    return metric


def ours(rows: list[Row], classes: int) -> float:
    """MAP alone."""
    precision = coco_precision(filled(rows, classes).images(), classes)[..., 0]
    return float(precision[precision > -1].mean())


def whole(rows: list[Row], classes: int) -> float:
    """All that an evaluation reports."""
    return filled(rows, classes).compute()["map"]


def coco(rows: list[Row], classes: int, fast: bool) -> float:
    """Pycocotools or faster-coco-eval, from its own JSON form."""
    if fast:
        from faster_coco_eval import COCO  # noqa: N811 - as it is imported everywhere
        from faster_coco_eval import COCOeval_faster as Judge
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Judge

    def listed(boxes: np.ndarray, labels: np.ndarray, image: int) -> list[dict[str, Any]]:
        sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        return [
            {"image_id": image, "category_id": int(label), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for box, label in zip(sizes, labels, strict=True)
        ]

    true = [item for n, row in enumerate(rows) for item in listed(row["true"], row["true_labels"], n)]
    found = [
        {**item, "score": float(score)}
        for n, row in enumerate(rows)
        for item, score in zip(listed(row["boxes"], row["labels"], n), row["scores"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        truth.dataset = {
            "info": {}, "images": [{"id": n} for n in range(len(rows))],
            "categories": [{"id": k, "name": str(k)} for k in range(classes)],
            "annotations": [{**item, "id": n + 1} for n, item in enumerate(true)],
        }  # fmt: skip
        truth.createIndex()
        judge: Any = Judge(truth, truth.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0])


def torchmetrics_map(rows: list[Row], classes: int) -> float:
    """Torchmetrics with its faster backend."""
    from torchmetrics.detection import MeanAveragePrecision

    logging.getLogger("faster_coco_eval").setLevel(logging.ERROR)
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    for row in rows:
        tensors = {name: torch.from_numpy(row[name]) for name in ("boxes", "scores", "labels", "true", "true_labels")}
        preds = [{name: tensors[name] for name in ("boxes", "scores", "labels")}]
        metric.update(preds, [{"boxes": tensors["true"], "labels": tensors["true_labels"]}])
    return float(metric.compute()["map"])


Pixels = tuple[torch.Tensor, torch.Tensor]
"""(C, H, W) probabilities and (H, W) uint8 class ids."""


def masks(images: int, size: int, classes: int) -> list[Pixels]:
    """Probabilities that are often right."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(images):
        target = torch.randint(0, classes, (size, size), generator=generator)
        logits = torch.randn(classes, size, size, generator=generator)
        out.append((logits.scatter_add_(0, target[None], torch.full((1, size, size), 1.5)).softmax(0), target.byte()))
    return out


def our_iou(items: list[Pixels], classes: int) -> float:
    """Mean IoU, with everything else that our metric counts beside it: NLL, Brier, ECE, AUROC of error."""
    metric = SegmentationMetric(classes)
    for n, (probabilities, target) in enumerate(items):
        metric.update(probabilities, target, str(n))
    return metric.compute()["miou"]


def torchmetrics_iou(items: list[Pixels], classes: int) -> float:
    """Torchmetrics' Jaccard index alone."""
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(classes, validate_args=False)
    for probabilities, target in items:
        metric.update(probabilities[None], target[None].long())
    return float(metric.compute())


def compare(sides: dict[str, Callable[[], float]], items: int, rounds: int) -> tuple[list[dict[str, Any]], dict]:
    """(table rows, figures) of sides that all work through ``items`` images."""
    values: dict[str, float] = {}

    def turn(name: str) -> float:
        began = time.perf_counter()
        values[name] = sides[name]()
        return items / (time.perf_counter() - began)

    for name in sides:  # imports, and compiled helpers
        turn(name)
    rates = harness.in_turns({name: partial(turn, name) for name in sides}, rounds)
    rows, figures = [], {}
    for name in sides:
        rate = harness.spread(rates[name])
        figures[name] = {"images/s": rate, "value": values[name]}
        rows.append({
            "side": name, "images/s": rate[0], "quartiles": f"{rate[1]:.4g} to {rate[2]:.4g}",
            "s": items / rate[0], "value": f"{values[name]:.6f}",
        })  # fmt: skip
    return rows, figures


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="images with boxes (1000; small: 150)")
    parser.add_argument("--found", type=int, default=36, help="boxes found in each")
    parser.add_argument("--true", type=int, default=12, help="objects in each")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--masks", type=int, help="images with masks of 512 x 512 (40; small: 6)")
    parser.add_argument("--rounds", type=int, help="turns of each side (5; small: 3)")
    parser.add_argument("--small", action="store_true", help="under 2 minutes on 2 cores")
    args = parser.parse_args(argv)
    for name, (full, small) in {"images": (1000, 150), "masks": (40, 6), "rounds": (5, 3)}.items():
        if getattr(args, name) is None:
            setattr(args, name, small if args.small else full)
    return args


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the tables and the JSON line; return figures and ratios."""
    args = parse(argv)
    boxes = detections(args.images, args.found, args.true, args.classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the rivals' own code
        sides: dict[str, Callable[[], float]] = {
            OURS: partial(ours, boxes, args.classes),
            WHOLE: partial(whole, boxes, args.classes),
            COCO: partial(coco, boxes, args.classes, False),
            FAST: partial(coco, boxes, args.classes, True),
            METRICS: partial(torchmetrics_map, boxes, args.classes),
        }
        print(
            f"{args.images} images, {args.found} boxes found and {args.true} true in each, {args.classes} classes: mAP"
        )
        rows, precision = compare(sides, args.images, args.rounds)
        print(harness.table(rows), flush=True)
        pixels = masks(args.masks, 512, args.classes)
        print(f"\n{args.masks} images of 512 x 512, {args.classes} classes: mean IoU")
        named = {"dubito, everything": partial(our_iou, pixels, args.classes)}
        rows, iou = compare(
            {**named, "torchmetrics, IoU alone": partial(torchmetrics_iou, pixels, args.classes)},
            args.masks, args.rounds,
        )  # fmt: skip
        print(harness.table(rows), flush=True)
    ratios = {f"mAP, {name} / {OURS}": _ratio(precision, OURS, name) for name in (COCO, FAST, METRICS)}
    ratios[f"mAP, {COCO} / {WHOLE}"] = _ratio(precision, WHOLE, COCO)
    ratios["mIoU, torchmetrics / ours"] = _ratio(iou, *iou)
    harness.finish("evaluate", {"mAP": precision, "mIoU": iou}, ratios)
    return {"mAP": precision, "mIoU": iou}, ratios


def _ratio(figures: dict[str, Any], own: str, other: str) -> float:
    """How many times longer ``other`` takes."""
    return figures[own]["images/s"][0] / figures[other]["images/s"][0]


if __name__ == "__main__":
    main()
