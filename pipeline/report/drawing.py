"""What the plots share: labels for legends and axes, and a figure as a PNG."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

MAX_NAME_CHARACTERS = 24
"""Longer names of classes are cut off in plots."""


def legend_label(name: str, measure: str, value: float | None) -> str:
    """``name (measure value)``; ``name`` alone where the value is not defined."""
    return name if value is None else f"{name} ({measure} {value:.4f})"


def shortened(name: str) -> str:
    """The name in at most 24 characters, escaped."""
    return escaped(name if len(name) <= MAX_NAME_CHARACTERS else f"{name[: MAX_NAME_CHARACTERS - 1]}…")


def escaped(text: str) -> str:
    """Text that matplotlib draws as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG; it is closed, since pyplot keeps every open one in memory."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    plt.close(figure)
    return png.getvalue()
