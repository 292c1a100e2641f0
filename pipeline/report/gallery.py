"""Images with their true labels and predictions side by side, as one PNG."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from pipeline.images.decode import decode
from pipeline.report.drawing import to_png
from pipeline.schema import VOID, unpack_map

MIN_SCORE = 0.3
"""Boxes below this score are not drawn, where no bundle says which score counts."""


def most_doubtful(predictions: pa.Table, count: int) -> list[str]:
    """image_ids of the ``count`` rows with the highest ``uncertainty``, highest first."""
    predicted = predictions.filter(pc.field("status") == "ok")
    return predicted.sort_by([("uncertainty", "descending"), ("image_id", "ascending")])["image_id"][:count].to_pylist()


def gallery(
    groups: list[tuple[str, pa.Table, pa.Table]],
    task: str,
    classes: list[str],
    background: int | None,
    min_score: float | None = None,
) -> bytes:
    """A PNG: one row an image, in the order of each group's ``rows``.

    Args:
        groups: (title, dataset rows, prediction rows of the same image_ids in any order).
        task: Segmentation draws input, truth, prediction, uncertainty; detection input and truth, prediction.
        classes: Names by label.
        background: Label of the background, drawn transparent; None: there is none.
        min_score: Predicted boxes below it are not drawn; None = ``MIN_SCORE``.
    """
    columns = 4 if task == "segmentation" else 2
    num_images = sum(rows.num_rows for _, rows, _ in groups)
    figure, axes = plt.subplots(num_images, columns, figsize=(2.6 * columns, 2.6 * num_images), squeeze=False)
    colours = plt.get_cmap("tab20" if len(classes) > 10 else "tab10")(np.arange(len(classes)) % 20)
    if background is not None:
        colours[background, 3] = 0.0
    least_score = MIN_SCORE if min_score is None else min_score
    row_number = 0
    for title, rows, predictions in groups:
        prediction_by_id = {row["image_id"]: row for row in predictions.to_pylist()}
        for row in rows.to_pylist():
            prediction = prediction_by_id[row["image_id"]]
            axes[row_number, 0].set_ylabel(f"{title}\nuncertainty {prediction['uncertainty']:.3g}", fontsize=8)
            if task == "segmentation":
                _draw_masks(axes[row_number], row, prediction, classes, colours)
            else:
                confident = [box for box in prediction["boxes"] if box["score"] >= least_score]
                _draw_boxes(axes[row_number], row, confident, classes, colours)
            row_number += 1
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    return to_png(figure, dpi=90)


def _unpacked_mask(packed: bytes, row: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8 class ids of a mask as the dataset and the predictions store it."""
    height, width = row["height"], row["width"]
    return np.frombuffer(unpack_map(packed, height, width), np.uint8).reshape(height, width)


def _draw_masks(
    axes: np.ndarray, row: dict[str, Any], prediction: dict[str, Any], classes: list[str], colours: np.ndarray
) -> None:
    """Input, true mask, predicted mask and uncertainty of one image, on four axes."""
    image = decode(row["image"])
    colormap = ListedColormap(colours)
    masks = [("truth", row["mask"]), ("prediction", prediction["mask"])]
    axes[0].imshow(image)
    axes[0].set_title("input", fontsize=8)
    for axis, (name, packed) in zip(axes[1:3], masks, strict=True):
        # Void is transparent, over a pale grey image that keeps the colours of the classes apart.
        mask = np.ma.masked_equal(_unpacked_mask(packed, row), VOID)
        axis.imshow(image.mean(2), cmap="gray", alpha=0.6)
        axis.imshow(mask, cmap=colormap, vmin=-0.5, vmax=len(classes) - 0.5, interpolation="nearest")
        present = [classes[int(value)] for value in np.unique(mask.compressed()) if colours[int(value), 3] > 0]
        axis.set_title(f"{name}: {', '.join(present[:6])}", fontsize=8)
    shape = prediction["map_height"], prediction["map_width"]
    packed = unpack_map(prediction["uncertainty_map"], *shape)
    axes[3].imshow(np.frombuffer(packed, np.uint8).reshape(shape), cmap="magma", vmin=0, vmax=255)
    axes[3].set_title("uncertainty (entropy / ln C)", fontsize=8)


def _draw_boxes(
    axes: np.ndarray, row: dict[str, Any], confident: list[dict[str, Any]], classes: list[str], colours: np.ndarray
) -> None:
    """True boxes and confident predicted boxes of one image, on two axes."""
    image = decode(row["image"])
    for axis, name, boxes in ((axes[0], "truth", row["boxes"]), (axes[1], "prediction", confident)):
        axis.imshow(image)
        axis.set_title(name, fontsize=8)
        for box in boxes:
            _draw_box(axis, box, classes, colours)


def _draw_box(axis: Axes, box: dict[str, Any], classes: list[str], colours: np.ndarray) -> None:
    """A box with its class; a predicted one with its score and entropy too."""
    # Edges are continuous, while imshow centres the first pixel on 0: hence the half pixel.
    x, y = box["x1"] - 0.5, box["y1"] - 0.5
    width, height = box["x2"] - box["x1"], box["y2"] - box["y1"]
    colour = colours[box["label"], :3]
    axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=1.5))
    doubt = f" {box['score']:.2f} H {box['entropy']:.2f}" if "score" in box else ""
    axis.text(
        x,
        y,
        f"{classes[box['label']]}{doubt}",
        fontsize=5,
        color="white",
        va="top",
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )
