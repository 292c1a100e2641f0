"""COCO: boxes, polygons, run lengths, crowds, and entries that lack each other."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import schema
from pipeline.datasets.formats import FORMATS
from pipeline.datasets.formats.base import LabelError, Labels
from pipeline.errors import InputError
from tests.support.format_cases import SIZE, edges, image_file, put

SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]


def coco(tmp_path: Path, annotations: list[dict], **changes) -> dict:
    data = {
        "images": [{"id": 5, "file_name": "a.png", "height": 8, "width": 10}],
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [{"id": i, "image_id": 5, "iscrowd": 0, **a} for i, a in enumerate(annotations)],
        **changes,
    }
    image_file(tmp_path, "images/a.png")
    put(tmp_path, "labels.json", json.dumps(data))
    return data


def coco_index(tmp_path: Path, classes: list[str] | None = None):
    form = FORMATS["coco"]
    return form.index(str(tmp_path / "images"), str(tmp_path / "labels.json"), classes, form.settings())


def coco_read(tmp_path: Path, classes: list[str] | None = None) -> Labels:
    index = coco_index(tmp_path, classes)
    source = index.sources[0]
    assert source.label is not None
    return FORMATS["coco"].read(source, SIZE, source.label, index.context)


def test_coco_boxes_and_sparse_ids(tmp_path):
    coco(tmp_path, [{"category_id": 90, "bbox": [1, 2, 3, 4]}, {"category_id": 3, "bbox": [0, 0, 0, 4]}])
    index = coco_index(tmp_path)
    assert index.context.classes == ("cat", "dog")
    assert index.context.tasks == ("detection",)
    out = coco_read(tmp_path)
    assert edges(out) == [(1, 2, 4, 6, 1)]
    assert out.repairs["zero_area_box"] == 1
    assert out.mask is None
    assert edges(coco_read(tmp_path, ["dog", "cat"])) == [(1, 2, 4, 6, 0)]


def test_coco_polygon_and_rle_paint_the_same_pixels(tmp_path):
    expected = np.zeros((8, 10), bool)
    expected[1:5, 2:6] = True
    columns = expected.T.ravel().astype(int)
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[1 - columns[0]], columns, [2]]))))
    counts = ([0] if columns[0] else []) + runs.tolist()
    for segmentation in ([SQUARE], {"size": [8, 10], "counts": counts}):
        coco(tmp_path, [{"category_id": 3, "bbox": [2, 1, 4, 4], "segmentation": segmentation}])
        out = coco_read(tmp_path)
        np.testing.assert_array_equal(out.mask, np.where(expected, 0, 2))
        assert out.shapes is not None
        shape = out.shapes[0]
        if shape["kind"] == "mask":
            pixels = np.frombuffer(schema.unpack_map(shape["mask"], 8, 10), np.uint8).reshape(8, 10)
            np.testing.assert_array_equal(pixels, expected)
        else:
            assert (shape["points"], shape["rings"]) == (SQUARE, [4])


def test_coco_compressed_rle(tmp_path):
    from faster_coco_eval.core import mask as rle

    expected = np.zeros((8, 10), np.uint8)
    expected[3:8, 4:9] = 1
    packed = rle.encode(np.asfortranarray(expected))
    note = {"size": [8, 10], "counts": packed["counts"].decode()}
    coco(tmp_path, [{"category_id": 3, "bbox": [4, 3, 5, 5], "segmentation": note, "iscrowd": 1}])
    out = coco_read(tmp_path)
    np.testing.assert_array_equal(out.mask, np.where(expected, 0, 2))
    assert (out.boxes or [])[0]["crowd"] is True


def test_coco_small_objects_lie_on_large_ones_and_boxes_alone_are_void(tmp_path):
    notes = [
        {"category_id": 3, "bbox": [3, 2, 1, 1], "segmentation": [[3, 2, 4, 2, 4, 3, 3, 3]]},
        {"category_id": 90, "bbox": [2, 1, 4, 4], "segmentation": [SQUARE]},
        {"category_id": 90, "bbox": [5, 4, 4, 4], "segmentation": []},
    ]
    coco(tmp_path, notes)
    out = coco_read(tmp_path)
    assert out.mask is not None
    assert (out.mask[2, 3], out.mask[1, 2], out.mask[4, 5], out.mask[7, 8], out.mask[0, 0]) == (
        0,
        1,
        1,
        255,
        2,
    )
    assert out.repairs["box_without_segmentation"] == 1


def test_coco_images_and_entries_that_lack_each_other(tmp_path):
    entries = [{"id": 5, "file_name": "a.png"}, {"id": 6, "file_name": "gone.png"}]
    coco(tmp_path, [{"category_id": 3, "bbox": [1, 1, 2, 2], "image_id": 77}], images=entries)
    image_file(tmp_path, "images/extra.png")
    index = coco_index(tmp_path)
    assert [(s.image_id, s.labelled) for s in index.sources] == [("a.png", True), ("extra.png", False)]
    assert sorted(reject.reason for reject in index.rejects) == ["no_image", "no_image"]
    assert any("unknown image id 77" in reject.detail for reject in index.rejects)


@pytest.mark.parametrize(
    ("note", "reason", "text"),
    [
        ({"category_id": 4, "bbox": [1, 1, 2, 2]}, "unknown_class", "category id 4 is not in categories"),
        ({"category_id": 3, "bbox": [1, 1]}, "bad_box", "wanted bbox"),
        ({"category_id": 3, "bbox": [1, 1, 2, 2], "segmentation": [[1, 2]]}, "bad_label", "three x, y pairs"),
        (
            {"category_id": 3, "bbox": [1, 1, 2, 2], "segmentation": [[0, 0, 1e9, 0, 5, 5]]},
            "bad_label",
            "pairs",
        ),
        (
            {"category_id": 3, "bbox": [1, 1, 2, 2], "segmentation": {"size": [9, 9], "counts": [81]}},
            "wrong_size",
            "9x9, its image 10x8",
        ),
        (
            {"category_id": 3, "bbox": [1, 1, 2, 2], "segmentation": {"size": [8, 10], "counts": [3]}},
            "bad_label",
            "segmentation cannot be read",
        ),
    ],
)
def test_coco_bad_labels(tmp_path, note, reason, text):
    coco(tmp_path, [note])
    with pytest.raises(LabelError, match=text) as found:
        coco_read(tmp_path)
    assert found.value.reason == reason


def test_coco_class_that_was_not_named(tmp_path):
    coco(tmp_path, [{"category_id": 90, "bbox": [1, 1, 2, 2]}])
    with pytest.raises(LabelError, match="'dog' is none of the classes.*Known: cat, dogs") as found:
        coco_read(tmp_path, ["cat", "dogs"])
    assert found.value.reason == "unknown_class"


def test_coco_file_that_is_none(tmp_path):
    image_file(tmp_path, "images/a.png")
    put(tmp_path, "labels.json", "[1, 2]")
    with pytest.raises(InputError, match="no COCO file"):
        coco_index(tmp_path)
    put(tmp_path, "labels.json", "{")
    with pytest.raises(InputError, match="not valid JSON"):
        coco_index(tmp_path)
