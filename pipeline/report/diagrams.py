"""Pictures of what ``evaluate`` found: reliability, risk against coverage, confusion. PNG bytes."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

_MAX_NUMBERS = 15
"""Classes up to which a confusion matrix has its numbers written in."""

_MIN_COUNT = 30
"""Bins that hold fewer are left out of a reliability line: their accuracy is chance."""


def reliability(metrics: dict[str, Any], title: str = "", unit: str = "pixels", error: str = "ece") -> bytes:
    """Accuracy against confidence in 15 bins, and below it each bin's share of the pixels.

    Args:
        metrics: What a metric's ``compute()`` gives of the pool; ``members``, if there: a list of the same for
            each, drawn as thin lines.
        title: Above the picture.
        unit: What is counted.
        error: Key of the calibration error that the legend gives.
    """
    figure, (axis, below) = plt.subplots(
        2, 1, figsize=(4.8, 5.6), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    for k, member in enumerate(metrics.get("members") or []):
        axis.plot(*_bins(member), color="C1", linewidth=0.8, alpha=0.6, label=None if k else "members")
    axis.plot(
        *_bins(metrics),
        color="C0",
        marker="o",
        markersize=4,
        label=_named("pool", error.upper().replace("_", "-"), metrics.get(error)),
    )
    if metrics.get("operating") is not None:
        name = f"said from {metrics['operating']:.2f} on"
        axis.axvline(metrics["operating"], color="0.3", linestyle=":", linewidth=1, label=name)
    counts = np.array(metrics["reliability"]["count"], np.float64)
    edges = np.linspace(0, 1, len(counts) + 1)
    below.bar(edges[:-1], counts / max(1, counts.sum()), width=1 / len(counts), align="edge", color="C0", alpha=0.6)
    axis.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=_literal(title))
    # Most are in one bin at the end; on a logarithmic axis the others can be seen too.
    scale = {"yscale": "log", "ylim": (max(1e-6, 0.3 / counts.sum()), 1.5)} if counts.any() else {"ylim": (0, 1)}
    below.set(xlabel="confidence of the prediction", ylabel=f"share of {unit}", **scale)
    axis.legend(loc="upper left", frameon=False)
    return _png(figure)


def risk_coverage(metrics: dict[str, Any], title: str = "", loss: str = "1 - IoU") -> bytes:
    """Mean loss of the images accepted, by the share accepted, the surest first.

    Args:
        metrics: As above.
        title: Above the picture.
        loss: Its name.
    """
    figure, axis = plt.subplots(figsize=(5.6, 4), layout="constrained")
    for k, member in enumerate(metrics.get("members") or []):
        axis.plot(*_curve(member), color="C1", linewidth=0.8, alpha=0.6, label=None if k else "members")
    coverage, risk = _curve(metrics)
    axis.plot(coverage, risk, color="C0", linewidth=2, label=_named("pool", "area", metrics.get("aurc_image")))
    if len(risk):
        axis.axhline(risk[-1], color="0.6", linestyle="--", linewidth=1, label="random order")
    else:
        axis.text(0.5, 0.5, "no image has a score", ha="center", transform=axis.transAxes)
    axis.set(
        xlabel="share of images accepted, the surest first",
        ylabel=f"mean {loss} of the accepted",
        title=_literal(title),
    )
    axis.set(xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="best")
    return _png(figure)


def confusion(metrics: dict[str, Any], classes: Sequence[str], title: str = "", last: str = "background") -> bytes:
    """Share of each true class by what it was said to be; rows sum to 1.

    Args:
        metrics: As above; only the pool is drawn.
        classes: Names, in order; where there is one fewer than rows, the last row is ``last``.
        title: Above the picture.
        last: Its name.
    """
    counts = np.array(metrics["confusion"], np.float64)
    number = len(counts)
    names = [*classes, *[last] * (number - len(classes))][:number]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = number <= _MAX_NUMBERS
    size = max(3.5, 2.5 + 0.5 * number) if few else min(4 + 0.18 * number, 12)
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    shown = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    # A picture has room for some 60 names.
    ticks = list(range(0, number, -(-number // 60)))
    labels = [_short(names[k]) for k in ticks]
    axis.set_xticks(ticks, labels, rotation=45 if few else 90, ha="right" if few else "center")
    axis.set_yticks(ticks, labels)
    axis.tick_params(labelsize=9 if few else 6)
    if few:
        for row, column in np.ndindex(number, number):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{shares[row, column]:.3f}" if counts[row].sum() else "-"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axis.set(xlabel="prediction", ylabel="truth", title=_literal(title))
    figure.colorbar(shown, ax=axis, label="share of the true class", shrink=0.8)
    return _png(figure)


def _bins(metrics: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(confidence, accuracy) of bins that hold enough."""
    rows = zip(*(metrics["reliability"][name] for name in ("confidence", "accuracy", "count")), strict=True)
    kept = [(c, a) for c, a, n in rows if n >= _MIN_COUNT and None not in (c, a)]
    return [c for c, _ in kept], [a for _, a in kept]


def _curve(metrics: dict[str, Any]) -> tuple[list[float], list[float]]:
    curve = metrics.get("risk_coverage") or {"coverage": [], "risk": []}
    return curve["coverage"], curve["risk"]


def _named(name: str, what: str, value: float | None) -> str:
    return name if value is None else f"{name} ({what} {value:.4f})"


def _short(name: str) -> str:
    """At most 24 characters."""
    return _literal(name if len(name) <= 24 else f"{name[:23]}…")


def _literal(text: str) -> str:
    """As it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()
