"""Diagrams of any figures of detection are PNGs, and no figure is left open."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from pipeline.metrics import DetectionMetric
from pipeline.report import detection as pictures
from tests.support.metric_cases import box_images, detection


def _figures(classes: int = 3) -> dict:
    members = [detection(box_images(k, 25, classes), classes).compute() for k in range(3)]
    return {**detection(box_images(3, 25, classes), classes).compute(), "members": members}


def _nothing() -> dict:
    return DetectionMetric(3).compute()


def _nothing_found() -> dict:
    found = {"boxes": [], "scores": [], "labels": [], "std": None, "probabilities": None}
    return detection([row | found for row in box_images(4, 3, 3)], 3).compute()


def _nothing_true() -> dict:
    rows = box_images(4, 3, 3)
    return detection([row | {"true_boxes": [], "true_labels": [], "crowd": []} for row in rows], 3).compute()


@pytest.mark.parametrize("figures", [_figures, _nothing, _nothing_found, _nothing_true])
def test_every_diagram_is_a_picture(figures):
    made, names = figures(), ["$a", "b" * 60, "_c"]
    data = [
        pictures.pr_curves(made, names, "a title with $ and 50 %"),
        pictures.box_reliability(made, "a $title$"),
        pictures.box_risk_coverage(made, "title"),
        pictures.box_confusion(made, names, "title"),
    ]
    for each in data:
        with Image.open(io.BytesIO(each)) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300
    assert plt.get_fignums() == []


@pytest.mark.parametrize("classes", [1, 2, 10, 80])
def test_any_number_of_classes_fits_a_picture(classes):
    made = _figures(classes)
    names = [f"class {k}" for k in range(classes)]
    for data in (pictures.pr_curves(made, names), pictures.box_confusion(made, names)):
        with Image.open(io.BytesIO(data)) as image:
            assert max(image.size) < 2500


def test_curves_are_drawn_where_the_figures_say(monkeypatch):
    kept = []
    monkeypatch.setattr(pictures, "to_png", lambda figure: kept.append(figure) or b"")
    made = _figures()
    pictures.pr_curves(made, ["a", "b", "c"])
    (axis,) = kept[0].axes
    lines = {line.get_label().split(" (")[0]: line for line in axis.lines}
    assert {"a", "b", "c", "members", "pool"} < set(lines)
    for name, curve in zip("abc", made["pr_curves"]["precision"], strict=True):
        assert lines[name].get_ydata() == pytest.approx(np.array(curve))
    assert np.mean(lines["pool"].get_ydata()) == pytest.approx(made["map50"])
    assert lines["score from 0.30"].get_xydata()[0] == pytest.approx([made["recall"], made["precision"]])
    plt.close(kept[0])
