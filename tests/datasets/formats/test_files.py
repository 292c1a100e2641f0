"""Pairing of images and labels by name, and boxes that are clipped to their image."""

from collections import Counter

import pytest

from pipeline import storage
from pipeline.datasets.formats import files
from pipeline.datasets.formats.base import LabelError, box_row, fit_box
from pipeline.errors import InputError
from tests.support.format_cases import SIZE, image_file


def listed(*names: str) -> list[storage.Listed]:
    return [storage.Listed(name, 1) for name in names]


def pairs(images: list[str], labels: list[str]) -> tuple[dict[str, str], list[str]]:
    found, rejects = files.pair(listed(*images), listed(*labels), "labels")
    return {images[i]: label.path for i, label in found.items()}, [reject.reason for reject in rejects]


def test_a_label_belongs_to_the_longest_prefix():
    found, rejects = pairs(["a.jpg", "a_b.jpg"], ["a_b_mask.png", "a_mask.png"])
    assert found == {"a.jpg": "a_mask.png", "a_b.jpg": "a_b_mask.png"}
    assert rejects == []


def test_a_number_is_never_cut():
    assert pairs(["img_1.jpg"], ["img_12.png"]) == ({}, ["no_image"])
    assert pairs(["img_1.jpg"], ["img_1_2.png"])[0] == {"img_1.jpg": "img_1_2.png"}


def test_folders_tell_equal_names_apart():
    images = ["x/1.jpg", "y/1.jpg"]
    assert pairs(images, ["y/1.png", "x/1.png"])[0] == {"x/1.jpg": "x/1.png", "y/1.jpg": "y/1.png"}
    assert pairs(images, ["1.png"]) == ({}, ["no_image"])
    assert pairs(["x/1.jpg"], ["1.png"])[0] == {"x/1.jpg": "1.png"}


def test_a_second_label_is_rejected_and_the_exact_one_wins():
    assert pairs(["a.jpg"], ["a_2.png", "a.png"]) == ({"a.jpg": "a.png"}, ["second_label"])


def test_a_label_without_image_names_the_nearest():
    _, rejects = files.pair(listed("cell_001.jpg"), listed("cel_001.png"), "labels")
    assert rejects[0].reason == "no_image"
    assert "Did you mean 'cell_001'?" in rejects[0].detail


def test_folder_of_labels_inside_the_images_is_no_source(tmp_path):
    image_file(tmp_path, "a.png")
    image_file(tmp_path, "masks/a.png")
    sources, rejects = files.paired_sources(str(tmp_path), str(tmp_path / "masks"), (".png",))
    assert [source.image_id for source in sources] == ["a.png"]
    assert rejects == []


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match="folder '.*nowhere' not found"):
        files.images_in(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no images in .*check --images"):
        files.images_in(str(tmp_path))


# --- boxes


def test_boxes_are_clipped_dropped_and_counted():
    repairs: Counter[str] = Counter()
    clipped = fit_box(box_row(-2, 1, 12, 9, 0), SIZE, repairs)
    assert clipped is not None
    assert (clipped["x1"], clipped["y1"], clipped["x2"], clipped["y2"]) == (0, 1, 10, 8)
    assert fit_box(box_row(3, 3, 3, 5, 0), SIZE, repairs) is None
    assert fit_box(box_row(10, 0, 12, 5, 0), SIZE, repairs) is None
    whole = box_row(0, 0, 10, 8, 0)
    assert fit_box(whole, SIZE, repairs) == whole
    assert repairs == {"clipped_box": 1, "zero_area_box": 1, "outside_box": 1}
    with pytest.raises(LabelError, match="not finite"):
        fit_box(box_row(0, 0, float("nan"), 5, 0), SIZE, repairs)


# --- voc
