"""What an evaluation of boxes looks like: precision-recall, reliability, risk-coverage, confusion. PNG bytes."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pipeline.report import diagrams
from pipeline.report.diagrams import _literal, _named, _png, _short

_MAX_NAMED = 10
"""Classes up to which each curve has a colour and a name."""


def pr_curves(metrics: dict[str, Any], classes: Sequence[str], title: str = "") -> bytes:
    """Precision against recall at IoU 0.5 by class, their mean, and where the boxes that are said lie.

    Args:
        metrics: ``DetectionMetric.compute()`` of the pool; ``members``, if there: a list of the same for each, whose
            means are drawn as thin lines.
        classes: Names, in order.
        title: Above the picture.
    """
    figure, axis = plt.subplots(figsize=(5.6, 5), layout="constrained")
    recall, curves = metrics["pr_curves"]["recall"], metrics["pr_curves"]["precision"]
    shown = [label for label, curve in enumerate(curves) if curve is not None]
    few = 1 < len(shown) <= _MAX_NAMED
    # A single class is its own mean.
    for at, label in enumerate(shown if len(shown) > 1 else []):
        name = _named(_short(classes[label]), "AP", metrics["per_class50"][label]) if few else None
        style = {"color": f"C{at + 2}", "alpha": 0.9} if few else {"color": "0.7", "alpha": 0.6}
        axis.plot(recall, curves[label], linewidth=1, label=name, **style)
    for k, member in enumerate(metrics.get("members") or []):
        axis.plot(*_mean_curve(member), color="C1", linewidth=0.8, alpha=0.6, label=None if k else "members")
    axis.plot(*_mean_curve(metrics), color="C0", linewidth=2, label=_named("pool", "mAP", metrics["map50"]))
    if metrics["precision"] is not None and metrics["recall"] is not None:
        name = f"said from {metrics['operating']:.2f} (F1 {metrics['f1']:.3f})"
        axis.plot([metrics["recall"]], [metrics["precision"]], color="black", marker="o", linestyle="", label=name)
    if not shown:
        axis.text(0.5, 0.5, "no true box", ha="center", transform=axis.transAxes)
    axis.set(xlabel="recall", ylabel="precision, IoU 0.5", xlim=(0, 1.01), ylim=(0, 1.01), title=_literal(title))
    axis.legend(frameon=False, loc="lower left", fontsize=8)
    return _png(figure)


def reliability(metrics: dict[str, Any], title: str = "") -> bytes:
    """Share of right boxes at IoU 0.5 against their score in 15 bins; D-ECE is of the said; arguments as above."""
    return diagrams.reliability(metrics, title, unit="boxes", error="d_ece")


def risk_coverage(metrics: dict[str, Any], title: str = "") -> bytes:
    """Mean 1 - F1 of the images accepted, by the share accepted, the surest first; arguments as above."""
    return diagrams.risk_coverage(metrics, title, loss="1 - F1")


def confusion(metrics: dict[str, Any], classes: Sequence[str], title: str = "") -> bytes:
    """Share of each class's true boxes by what they were said to be; the row "nothing" is of boxes that are not there.

    Args:
        metrics: As above; only the pool is drawn.
        classes: Names, in order.
        title: Above the picture.
    """
    return diagrams.confusion(metrics, classes, title, last="nothing")


def _mean_curve(metrics: dict[str, Any]) -> tuple[list[float], np.ndarray]:
    """(recall, mean precision over the classes that have true boxes); empty without one."""
    curves = [curve for curve in metrics["pr_curves"]["precision"] if curve is not None]
    return (metrics["pr_curves"]["recall"], np.mean(curves, axis=0)) if curves else ([], np.zeros(0))
