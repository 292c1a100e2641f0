"""Diagrams of any figures are PNGs, and no figure is left open."""

import io
import math

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from pipeline.metrics import SegmentationMetric
from pipeline.report import diagrams
from tests.support.metric_cases import pixels, segmentation


def _figures(members: int = 3) -> dict:
    figures = segmentation(pixels(0, 12)).compute()
    return {**figures, "members": [segmentation(pixels(k + 1, 12)).compute() for k in range(members)]}


def _nothing() -> dict:
    return SegmentationMetric(4).compute()


def _one_image_without_score() -> dict:
    return segmentation([(*pixels(0, 1)[0][:3], math.nan)]).compute()


@pytest.mark.parametrize("figures", [_figures, _nothing, _one_image_without_score])
def test_every_diagram_is_a_picture(figures):
    made = figures()
    pictures = [
        diagrams.reliability_diagram(made, "a title with $ and 50 %"),
        diagrams.risk_coverage_curve(made, "a $title$"),
        diagrams.confusion_matrix(made, ["$a", "b" * 60, "_c"], "title"),
    ]
    for data in pictures:
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300
    assert plt.get_fignums() == []


@pytest.mark.parametrize("classes", [1, 2, 16, 150])
def test_a_confusion_matrix_of_any_size_fits_a_picture(classes):
    metric = SegmentationMetric(classes)
    labels = torch.arange(classes, dtype=torch.uint8).reshape(1, -1)
    metric.update(torch.eye(classes)[:, None], labels)
    data = diagrams.confusion_matrix(metric.compute(), [f"class {k}" for k in range(classes)])
    with Image.open(io.BytesIO(data)) as image:
        assert max(image.size) < 2500
