"""Detection against pycocotools; the laws of merging for both tasks."""

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import METRICS, DetectionMetric
from tests.support.metric_cases import CLASSES, check_equal, pixels, segmentation


def _random_boxes(seed: int, images: int, classes: int, spread: float = 40.0) -> list[dict]:
    """Images with found boxes near the true ones, beside them, several on one; crowds; ties in score."""
    rng = np.random.default_rng(seed)
    out = []
    for n in range(images):
        true = rng.integers(0, 8)
        corner, size = rng.uniform(0, 100, (true, 2)), rng.uniform(2, spread, (true, 2))
        boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
        labels = rng.integers(0, classes, true)
        picks = rng.integers(0, true, rng.integers(0, 12)) if true else np.zeros(0, int)
        near = boxes[picks] + rng.normal(0, 3, (len(picks), 4))
        stray = rng.uniform(0, 60, (rng.integers(0, 4), 4)) + [0, 0, 60, 60]
        found = np.concatenate([near, stray]).astype(np.float32)
        names = np.concatenate([labels[picks], rng.integers(0, classes, len(stray))])
        out.append(
            {
                "image_id": f"image-{n:03d}",
                "boxes": found,
                "scores": (rng.integers(1, 20, len(found)) / 20).astype(np.float32),
                "labels": names,
                "true_boxes": boxes,
                "true_labels": labels,
                "crowd": rng.random(true) < 0.15,
            }
        )
    return out


def _detection(images: list[dict], classes: int) -> DetectionMetric:
    metric = DetectionMetric(classes)
    for image in images:
        metric.update(**image)
    return metric


def _pycocotools(images: list[dict], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(COCO's twelve figures, AP of each class with -1 for none)."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box):
        x1, y1, x2, y2 = box.astype(np.float64).tolist()
        return [x1, y1, x2 - x1, y2 - y1]

    true: list[dict[str, Any]] = []
    found: Any = []
    for n, image in enumerate(images):
        for box, label, crowd in zip(image["true_boxes"], image["true_labels"], image["crowd"], strict=True):
            bbox = xywh(box)
            true.append(
                {"id": len(true) + 1, "image_id": n, "category_id": int(label), "bbox": bbox,
                 "area": bbox[2] * bbox[3], "iscrowd": int(crowd)}
            )  # fmt: skip
        for box, label, score in zip(image["boxes"], image["labels"], image["scores"], strict=True):
            found.append({"image_id": n, "category_id": int(label), "bbox": xywh(box), "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        content: Any = {
            "info": {}, "images": [{"id": n} for n in range(len(images))],
            "categories": [{"id": k, "name": str(k)} for k in range(classes)], "annotations": true,
        }  # fmt: skip
        truth.dataset = content
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][:, :, :, 0, -1]
    each = [p[p > -1].mean() if (p > -1).any() else -1 for p in precision.transpose(2, 0, 1)]
    return np.asarray(judge.stats), np.array(each)


@pytest.mark.parametrize(("seed", "images", "classes"), [(0, 12, 3), (1, 40, 5), (2, 3, 1), (3, 25, 20)])
def test_average_precision_equals_pycocotools(seed, images, classes):
    pytest.importorskip("pycocotools")
    rows = _random_boxes(seed, images, classes)
    got = _detection(rows, classes).compute()
    stats, each = _pycocotools(rows, classes)
    assert 0.05 < stats[0] < 0.95
    for name, value in zip(("map", "map50", "map75"), stats, strict=False):
        assert got[name] == pytest.approx(value, abs=1e-9)
    assert [-1 if value is None else value for value in got["per_class"]] == pytest.approx(each, abs=1e-9)
    assert got["images"] == images
    assert got["boxes"] == sum(int((~row["crowd"]).sum()) for row in rows)
    json.dumps(got, allow_nan=False)


def test_average_precision_equals_pycocotools_with_more_boxes_than_count():
    pytest.importorskip("pycocotools")
    rng = np.random.default_rng(4)
    rows = _random_boxes(4, 2, 1)
    many = rng.uniform(0, 60, (250, 4)).astype(np.float32) + np.array([0, 0, 60, 60], np.float32)
    rows[0] |= {"boxes": many, "scores": rng.random(250).astype(np.float32), "labels": np.zeros(250, int)}
    rows[0] |= {"true_boxes": many[:120], "true_labels": np.zeros(120, int), "crowd": np.zeros(120, bool)}
    got, (stats, _) = _detection(rows, 1).compute(), _pycocotools(rows, 1)
    assert got["map"] == pytest.approx(stats[0], abs=1e-9)
    assert stats[0] < 0.9


def test_perfect_boxes_have_precision_one_and_none_found_zero():
    rows = [row | {"crowd": np.zeros(len(row["true_labels"]), bool)} for row in _random_boxes(5, 6, 2)]
    nothing = {"boxes": np.zeros((0, 4)), "scores": [], "labels": []}
    perfect = [
        row
        | {
            "boxes": row["true_boxes"],
            "labels": row["true_labels"],
            "scores": np.ones(len(row["true_labels"])),
        }
        for row in rows
    ]
    assert _detection(perfect, 2).compute()["map"] == pytest.approx(1)
    assert _detection([row | nothing for row in rows], 2).compute()["map"] == 0


def test_without_a_true_box_there_is_no_precision():
    rows = [row | {"true_boxes": [], "true_labels": [], "crowd": []} for row in _random_boxes(6, 4, 2)]
    wanted = {"map": None, "map50": None, "map75": None, "per_class": [None, None], "images": 4, "boxes": 0}
    for metric, known in ((_detection(rows, 2), wanted), (DetectionMetric(2), wanted | {"images": 0})):
        got = metric.compute()
        assert {key: got[key] for key in known} == known


@pytest.mark.parametrize("task", ["segmentation", "detection"])
@settings(max_examples=10)
@given(data=st.data())
def test_merging_does_not_depend_on_how_rows_are_split(task, data):
    items = pixels(7, 7) if task == "segmentation" else _random_boxes(7, 7, CLASSES)
    build = segmentation if task == "segmentation" else lambda rows: _detection(rows, CLASSES)
    parts = data.draw(st.lists(st.integers(0, 2), min_size=7, max_size=7))
    order = data.draw(st.permutations(range(3)))
    pieces = [build([item for item, part in zip(items, parts, strict=True) if part == k]) for k in order]
    whole = build(items).compute()
    total = build([])
    for piece in pieces:
        total.merge(METRICS[task].from_state(_through_bytes(piece.state())))  # pyright: ignore[reportArgumentType]
    check_equal(total.compute(), whole)


def _through_bytes(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As units store it: without pickle."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **state)
    buffer.seek(0)
    with np.load(buffer, allow_pickle=False) as loaded:
        return dict(loaded)


def test_merging_leaves_the_other_metric_alone():
    first, second = _detection(_random_boxes(8, 3, 2), 2), _detection(_random_boxes(9, 2, 2), 2)
    first.merge(second)
    assert (first.compute()["images"], second.compute()["images"]) == (5, 2)
    one, two = segmentation(pixels(8)), segmentation(pixels(9))
    before = two.compute()
    one.merge(two)
    assert two.compute() == before
