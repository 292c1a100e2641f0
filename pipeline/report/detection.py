"""Plots of detection's figures: precision-recall, and the diagrams with the words of boxes. PNG bytes."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pipeline.report import diagrams
from pipeline.report.drawing import escaped, legend_label, shortened, to_png

_MAX_CLASSES_NAMED = 10
"""Classes up to which each curve has a colour and a name."""


def pr_curves(metrics: dict[str, Any], classes: Sequence[str], title: str = "") -> bytes:
    """Precision against recall at IoU 0.5 by class, their mean, and the point of the operating score.

    Args:
        metrics: ``DetectionMetric.compute()`` of the pool; ``members``, if there: a list of the same for each, whose
            means are drawn as thin lines.
        classes: Names, in order.
        title: Above the plot.
    """
    figure, axis = plt.subplots(figsize=(5.6, 5), layout="constrained")
    recall = metrics["pr_curves"]["recall"]
    curves = metrics["pr_curves"]["precision"]
    present = [label for label, curve in enumerate(curves) if curve is not None]
    has_room = 1 < len(present) <= _MAX_CLASSES_NAMED
    # A single class is its own mean.
    for place, label in enumerate(present if len(present) > 1 else []):
        if has_room:
            name = legend_label(shortened(classes[label]), "AP", metrics["per_class50"][label])
            axis.plot(recall, curves[label], linewidth=1, label=name, color=f"C{place + 2}", alpha=0.9)
        else:
            axis.plot(recall, curves[label], linewidth=1, label=None, color="0.7", alpha=0.6)
    for k, member in enumerate(metrics.get("members") or []):
        axis.plot(*_mean_curve(member), color="C1", linewidth=0.8, alpha=0.6, label=None if k else "members")
    axis.plot(*_mean_curve(metrics), color="C0", linewidth=2, label=legend_label("pool", "mAP", metrics["map50"]))
    if metrics["precision"] is not None and metrics["recall"] is not None:
        name = f"score from {metrics['operating']:.2f} (F1 {metrics['f1']:.3f})"
        axis.plot([metrics["recall"]], [metrics["precision"]], color="black", marker="o", linestyle="", label=name)
    if not present:
        axis.text(0.5, 0.5, "no true box", ha="center", transform=axis.transAxes)
    axis.set(xlabel="recall", ylabel="precision, IoU 0.5", xlim=(0, 1.01), ylim=(0, 1.01), title=escaped(title))
    axis.legend(frameon=False, loc="lower left", fontsize=8)
    return to_png(figure)


def box_reliability(metrics: dict[str, Any], title: str = "") -> bytes:
    """Share of true positives at IoU 0.5 against score in 15 bins; the legend's D-ECE is of the confident detections.

    Args:
        metrics: As for ``pr_curves``.
        title: Above the plot.
    """
    return diagrams.reliability_diagram(metrics, title, unit="boxes", error="d_ece")


def box_risk_coverage(metrics: dict[str, Any], title: str = "") -> bytes:
    """Mean 1 - F1 of the images accepted, by the share accepted, the surest first.

    Args:
        metrics: As for ``pr_curves``.
        title: Above the plot.
    """
    return diagrams.risk_coverage_curve(metrics, title, loss_name="1 - F1")


def box_confusion(metrics: dict[str, Any], classes: Sequence[str], title: str = "") -> bytes:
    """Share of each class's true boxes by predicted class.

    The row "nothing" is of false positives, the column "nothing" of true boxes that are missed.

    Args:
        metrics: As for ``pr_curves``; members are not drawn.
        classes: Names, in order.
        title: Above the plot.
    """
    return diagrams.confusion_matrix(metrics, classes, title, last_row="nothing")


def _mean_curve(metrics: dict[str, Any]) -> tuple[list[float], np.ndarray]:
    """(recall, mean precision over the classes that have true boxes); empty without one."""
    curves = [curve for curve in metrics["pr_curves"]["precision"] if curve is not None]
    return (metrics["pr_curves"]["recall"], np.mean(curves, axis=0)) if curves else ([], np.zeros(0))
