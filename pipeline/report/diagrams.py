"""Plots of any metric's figures: reliability, risk against coverage, confusion. PNG bytes."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pipeline.report.drawing import escaped, legend_label, shortened, to_png

_MAX_CLASSES_WRITTEN = 15
"""Classes up to which a confusion matrix has its numbers written in."""
_MIN_BIN_COUNT = 30
"""Bins that hold fewer are left out of a reliability line: their accuracy is chance."""


def reliability_diagram(metrics: dict[str, Any], title: str = "", unit: str = "pixels", error: str = "ece") -> bytes:
    """Accuracy against confidence in 15 bins, and below it each bin's share of the predictions.

    Args:
        metrics: What a metric's ``compute()`` gives of the pool; ``members``, if there: a list of the same for
            each, drawn as thin lines.
        title: Above the plot.
        unit: What is counted, for the axis.
        error: Key of the calibration error that the legend gives.
    """
    figure, (axis, below) = plt.subplots(
        2, 1, figsize=(4.8, 5.6), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    for k, member in enumerate(metrics.get("members") or []):
        axis.plot(*_reliability_points(member), color="C1", linewidth=0.8, alpha=0.6, label=None if k else "members")
    axis.plot(
        *_reliability_points(metrics),
        color="C0",
        marker="o",
        markersize=4,
        label=legend_label("pool", error.upper().replace("_", "-"), metrics.get(error)),
    )
    if metrics.get("operating") is not None:
        name = f"operating score {metrics['operating']:.2f}"
        axis.axvline(metrics["operating"], color="0.3", linestyle=":", linewidth=1, label=name)
    # Below: how many predictions each bin stands for.
    counts = np.array(metrics["reliability"]["count"], np.float64)
    edges = np.linspace(0, 1, len(counts) + 1)
    below.bar(edges[:-1], counts / max(1, counts.sum()), width=1 / len(counts), align="edge", color="C0", alpha=0.6)
    axis.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=escaped(title))
    # Most are in one bin at the end; on a logarithmic axis the others can be seen too.
    scale: dict[str, Any] = {"ylim": (0, 1)}
    if counts.any():
        scale = {"yscale": "log", "ylim": (max(1e-6, 0.3 / counts.sum()), 1.5)}
    below.set(xlabel="confidence of the prediction", ylabel=f"share of {unit}", **scale)
    axis.legend(loc="upper left", frameon=False)
    return to_png(figure)


def risk_coverage_curve(metrics: dict[str, Any], title: str = "", loss_name: str = "1 - IoU") -> bytes:
    """Mean loss of the images accepted, by the share accepted, the surest first.

    Args:
        metrics: What a metric's ``compute()`` gives of the pool; ``members``, if there: a list of the same for
            each, drawn as thin lines.
        title: Above the plot.
        loss_name: What the loss of an image is, for the axis.
    """
    figure, axis = plt.subplots(figsize=(5.6, 4), layout="constrained")
    for k, member in enumerate(metrics.get("members") or []):
        axis.plot(*_risk_coverage_points(member), color="C1", linewidth=0.8, alpha=0.6, label=None if k else "members")
    coverage, risk = _risk_coverage_points(metrics)
    axis.plot(coverage, risk, color="C0", linewidth=2, label=legend_label("pool", "area", metrics.get("aurc_image")))
    if len(risk):
        axis.axhline(risk[-1], color="0.6", linestyle="--", linewidth=1, label="random order")
    else:
        axis.text(0.5, 0.5, "no image has a score", ha="center", transform=axis.transAxes)
    axis.set(
        xlabel="share of images accepted, the surest first",
        ylabel=f"mean {loss_name} of the accepted",
        title=escaped(title),
    )
    axis.set(xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="best")
    return to_png(figure)


def confusion_matrix(
    metrics: dict[str, Any], classes: Sequence[str], title: str = "", last_row: str = "background"
) -> bytes:
    """Share of each true class by predicted class; rows sum to 1.

    Args:
        metrics: What a metric's ``compute()`` gives of the pool; members are not drawn.
        classes: Names, in order.
        title: Above the plot.
        last_row: Name of the last row and column where there is one more than classes.
    """
    counts = np.array(metrics["confusion"], np.float64)
    num_rows = len(counts)
    names = [*classes, *[last_row] * (num_rows - len(classes))][:num_rows]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # Many classes: no numbers, smaller and upright names, and cells that shrink so that the plot does not grow.
    has_room = num_rows <= _MAX_CLASSES_WRITTEN
    size = max(3.5, 2.5 + 0.5 * num_rows) if has_room else min(4 + 0.18 * num_rows, 12)
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    colours = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    # An axis has room for some 60 names.
    ticks = list(range(0, num_rows, -(-num_rows // 60)))
    labels = [shortened(names[k]) for k in ticks]
    axis.set_xticks(ticks, labels, rotation=45 if has_room else 90, ha="right" if has_room else "center")
    axis.set_yticks(ticks, labels)
    axis.tick_params(labelsize=9 if has_room else 6)
    if has_room:
        for row, column in np.ndindex(num_rows, num_rows):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{shares[row, column]:.3f}" if counts[row].sum() else "-"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axis.set(xlabel="prediction", ylabel="truth", title=escaped(title))
    figure.colorbar(colours, ax=axis, label="share of the true class", shrink=0.8)
    return to_png(figure)


def _reliability_points(metrics: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(confidence, accuracy) of the bins that hold enough predictions."""
    bins = metrics["reliability"]
    confidences, accuracies = [], []
    for confidence, accuracy, count in zip(bins["confidence"], bins["accuracy"], bins["count"], strict=True):
        if count >= _MIN_BIN_COUNT and None not in (confidence, accuracy):
            confidences.append(confidence)
            accuracies.append(accuracy)
    return confidences, accuracies


def _risk_coverage_points(metrics: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(coverage, risk); empty where no image has a score."""
    curve = metrics.get("risk_coverage") or {"coverage": [], "risk": []}
    return curve["coverage"], curve["risk"]
