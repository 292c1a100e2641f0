"""What an evaluation looks like: reliability, risk against coverage, confusion, and the most doubtful images."""

from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.datasets.dataset import DatasetInfo
from pipeline.models.bundle import Bundle
from pipeline.report import detection, diagrams
from pipeline.report.gallery import gallery, most_doubtful
from pipeline.report.summary import rows_of
from pipeline.scoring.predictor import Predictor

SHOWN = 8
"""Images of the gallery."""


def write(
    out: str, bundle: Bundle, info: DatasetInfo, split: str, metrics: dict[str, Any], scalars: pa.Table
) -> list[str]:
    """Plots beside the file ``out``: ``<stem>-reliability.png`` and so on; returns their URIs.

    The few images of the gallery are predicted again, on this machine.
    """
    stem = out.removesuffix(".json")
    made: dict[str, bytes] = {}
    title = f"{info.name}, {split}"
    if bundle.task == "segmentation" and metrics["pixels"]:
        made["reliability"] = diagrams.reliability(metrics, title)
        made["risk-coverage"] = diagrams.risk_coverage(metrics)
        made["confusion"] = diagrams.confusion(metrics, bundle.classes)
    if bundle.task == "detection" and metrics["boxes"]:
        made["precision-recall"] = detection.pr_curves(metrics, bundle.classes, title)
        made["reliability"] = detection.reliability(metrics, title)
        made["risk-coverage"] = detection.risk_coverage(metrics)
        made["confusion"] = detection.confusion(metrics, bundle.classes)
    names = most_doubtful(scalars, SHOWN)
    if names:
        rows = rows_of(info, split, names)
        predicted = Predictor(bundle)(rows)
        said = bundle.manifest["score_threshold"]
        made["doubtful"] = gallery([(split, rows, predicted)], bundle.task, bundle.classes, bundle.background, said)
    uris = {name: f"{stem}-{name}.png" for name in made}
    for name, data in made.items():
        storage.write_bytes(uris[name], data)
    return list(uris.values())


_SHOWN = {
    "miou": "mIoU", "boundary_iou": "boundary IoU", "map50": "mAP@.5", "map75": "mAP@.75",
    "map": "mAP", "pdq": "PDQ", "laece": "LaECE", "lrp": "LRP", "auroc_tp": "AUROC of true boxes", "nll": "NLL",
    "brier": "Brier", "ece": "ECE", "auroc_error": "AUROC of error", "spearman_image": "Spearman of doubt and accuracy",
    "shift_auroc": "AUROC of shift",
}  # fmt: skip


def describe_evaluation(split: str, metrics: dict[str, Any]) -> str:
    """The main figures, the members' in brackets."""
    members = metrics["members"] if len(metrics["members"]) > 1 else []
    parts = []
    for key, name in _SHOWN.items():
        if metrics.get(key) is None:
            continue
        each = ", ".join(f"{member[key]:.4g}" for member in members if member.get(key) is not None)
        parts.append(f"{name} {metrics[key]:.4g}" + (f" ({each})" if each else ""))
    if metrics.get("decisions"):
        accepted, review = metrics["decisions"]["accept"], metrics["decisions"]["review"]
        parts.append(f"accepted {accepted} of {accepted + review}")
    return f"{split}, {metrics['images']} images: " + "; ".join(parts)
