"""Loss curves of a training run, as a PNG."""

import json
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pipeline import storage
from pipeline.report.drawing import to_png


def read_history(run_uri: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    lines = storage.read_bytes(storage.join(run_uri, "metrics.jsonl")).decode().splitlines()
    return [json.loads(line) for line in lines]


def write_loss_plot(out: str, members: int) -> str:
    """Loss curves of a finished run: ``plots/loss.png``; returns its URI."""
    histories = [read_history(storage.join(out, "members", str(k))) for k in range(members)]
    uri = storage.join(out, "plots", "loss.png")
    storage.write_bytes(uri, loss_plot(histories))
    return uri


def loss_plot(histories: list[list[dict[str, Any]]]) -> bytes:
    """A PNG with the training and validation loss of every member over the optimiser steps."""
    figure, axis = plt.subplots(figsize=(7, 4))
    # One colour a member: its training loss thin, its validation loss with marks.
    for k, history in enumerate(histories):
        colour = f"C{k}"
        training = [(row["step"], row["loss"]) for row in history if "loss" in row]
        validation = [(row["step"], row["val_loss"]) for row in history if "val_loss" in row]
        if training:
            axis.plot(*zip(*training, strict=True), color=colour, alpha=0.35, linewidth=0.8)
        axis.plot(*zip(*validation, strict=True), color=colour, marker="o", label=f"member {k}, validation")
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("loss")
    axis.legend()
    figure.tight_layout()
    return to_png(figure, dpi=100)
