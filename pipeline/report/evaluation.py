"""The plots beside an evaluation's file, and its main figures as one line of text."""

from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.datasets.dataset import DatasetInfo
from pipeline.models.bundle import Bundle
from pipeline.report import detection, diagrams
from pipeline.report.gallery import gallery, most_doubtful
from pipeline.report.summary import rows_of
from pipeline.scoring.predictor import Predictor

NUM_DOUBTFUL = 8
"""Images of the gallery: the most doubtful."""
_MAIN_FIGURES = {
    "miou": "mIoU", "boundary_iou": "boundary IoU", "map50": "mAP@.5", "map75": "mAP@.75",
    "map": "mAP", "pdq": "PDQ", "laece": "LaECE", "lrp": "LRP", "auroc_tp": "AUROC of true boxes", "nll": "NLL",
    "brier": "Brier", "ece": "ECE", "auroc_error": "AUROC of error", "spearman_image": "Spearman of doubt and accuracy",
    "shift_auroc": "AUROC of shift",
}  # fmt: skip
"""Figures of the line on the terminal: key in the metrics, and its name."""


def write_plots(
    out: str, bundle: Bundle, info: DatasetInfo, split: str, metrics: dict[str, Any], scalars: pa.Table
) -> list[str]:
    """Plots beside the file ``out``: ``<stem>-reliability.png`` and so on; returns their URIs.

    The few images of the gallery are predicted again, on this machine.
    """
    stem = out.removesuffix(".json")
    pngs: dict[str, bytes] = {}
    title = f"{info.name}, {split}"
    if bundle.task == "segmentation" and metrics["pixels"]:
        pngs["reliability"] = diagrams.reliability_diagram(metrics, title)
        pngs["risk-coverage"] = diagrams.risk_coverage_curve(metrics)
        pngs["confusion"] = diagrams.confusion_matrix(metrics, bundle.classes)
    if bundle.task == "detection" and metrics["boxes"]:
        pngs["precision-recall"] = detection.pr_curves(metrics, bundle.classes, title)
        pngs["reliability"] = detection.box_reliability(metrics, title)
        pngs["risk-coverage"] = detection.box_risk_coverage(metrics)
        pngs["confusion"] = detection.box_confusion(metrics, bundle.classes)
    doubtful_ids = most_doubtful(scalars, NUM_DOUBTFUL)
    if doubtful_ids:
        rows = rows_of(info, split, doubtful_ids)
        predicted = Predictor(bundle)(rows)
        score_threshold = bundle.manifest["score_threshold"]
        pngs["doubtful"] = gallery(
            [(split, rows, predicted)], bundle.task, bundle.classes, bundle.background, score_threshold
        )
    uris = {name: f"{stem}-{name}.png" for name in pngs}
    for name, data in pngs.items():
        storage.write_bytes(uris[name], data)
    return list(uris.values())


def describe_evaluation(split: str, metrics: dict[str, Any]) -> str:
    """One line: the main figures of the pool, and in brackets those of its members."""
    # A single member is the pool itself.
    members = metrics["members"] if len(metrics["members"]) > 1 else []
    parts = []
    for key, name in _MAIN_FIGURES.items():
        if metrics.get(key) is None:
            continue
        described = f"{name} {metrics[key]:.4g}"
        member_values = ", ".join(f"{member[key]:.4g}" for member in members if member.get(key) is not None)
        parts.append(f"{described} ({member_values})" if member_values else described)
    if metrics.get("decisions"):
        accepted = metrics["decisions"]["accept"]
        review = metrics["decisions"]["review"]
        parts.append(f"accepted {accepted} of {accepted + review}")
    return f"{split}, {metrics['images']} images: " + "; ".join(parts)
