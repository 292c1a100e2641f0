"""Loss curves of a run: a PNG, and the same numbers as TensorBoard events."""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboardX import SummaryWriter

from pipeline import storage


def read_history(run_uri: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    lines = storage.read_bytes(storage.join(run_uri, "metrics.jsonl")).decode().splitlines()
    return [json.loads(line) for line in lines]


def write(out: str, members: int) -> str:
    """Loss curves of a finished run: ``plots/loss.png``, and TensorBoard events; returns the plot's URI."""
    histories = []
    for k in range(members):
        run_uri = storage.join(out, "members", str(k))
        histories.append(read_history(run_uri))
        write_events(histories[-1], storage.join(out, "tensorboard", str(k)))
    uri = storage.join(out, "plots", "loss.png")
    storage.write_bytes(uri, loss_plot(histories))
    return uri


def loss_plot(histories: list[list[dict[str, Any]]]) -> bytes:
    """A PNG with the training and validation loss of every member over the optimiser steps."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for k, history in enumerate(histories):
        colour = f"C{k}"
        trained = [(row["step"], row["loss"]) for row in history if "loss" in row]
        looked = [(row["step"], row["val_loss"]) for row in history if "val_loss" in row]
        if trained:
            axis.plot(*zip(*trained, strict=True), color=colour, alpha=0.35, linewidth=0.8)
        axis.plot(*zip(*looked, strict=True), color=colour, marker="o", label=f"member {k}, validation")
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("loss")
    axis.legend()
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    plt.close(figure)
    return out.getvalue()


def write_events(history: list[dict[str, Any]], folder_uri: str) -> None:
    """TensorBoard events of one member, into ``folder_uri``."""
    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        for row in history:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])
        writer.close()
        for file in Path(folder).iterdir():
            storage.write_bytes(storage.join(folder_uri, file.name), file.read_bytes())
