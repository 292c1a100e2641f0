"""Pascal VOC: pixels, sizes, classes, and labels that are refused."""

import pytest

from pipeline.datasets.formats import FORMATS
from pipeline.datasets.formats.base import LabelError
from pipeline.images.decode import ImageInfo
from tests.support.format_cases import edges, image_file, put, read, xml


def test_voc_pixels_are_one_based_and_inclusive():
    out = read("voc", xml(("cat", 1, 1, 10, 8), ("dog", 3, 2, 4, 2.5)), ("cat", "dog"))
    assert edges(out) == [(0, 0, 10, 8, 0), (2, 1, 4, 2.5, 1)]
    assert out.repairs == {}
    assert out.mask is None


def test_voc_zero_area_as_written_is_dropped_and_counted():
    out = read("voc", xml(("cat", 5, 5, 5, 9), ("cat", 0, 1, 20, 5), ("cat", 5, 3, 4, 9)), ("cat",))
    assert edges(out) == [(0, 0, 10, 5, 0)]
    assert out.repairs == {"zero_area_box": 2, "clipped_box": 1}


def test_voc_without_objects_is_labelled_and_empty():
    assert read("voc", xml(), ("cat",)).boxes == []
    assert read("voc", xml(size=(0, 0)), ("cat",)).boxes == []


@pytest.mark.parametrize(
    ("label", "reason", "text"),
    [
        (xml(("cta", 1, 1, 2, 2)), "unknown_class", "object 'cta' .* Did you mean 'cat'"),
        (xml(("cat", "x", 1, 2, 2)), "bad_box", "four numbers"),
        (xml(size=(8, 10)), "wrong_size", "8x10, its image 10x8"),
        (b"<annotation", "bad_label", "XML"),
        (b"<html></html>", "bad_label", "<annotation>"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "bad_label", "XML"),
    ],
)
def test_voc_bad_labels(label, reason, text):
    with pytest.raises(LabelError, match=text) as found:
        read("voc", label, ("cat", "dog"))
    assert found.value.reason == reason


def test_wrong_size_tells_of_exif():
    with pytest.raises(LabelError, match="EXIF orientation 6"):
        read("voc", xml(), ("cat",), ImageInfo(height=10, width=8, orientation=6))


def test_voc_index_finds_folders_and_classes(tmp_path):
    image_file(tmp_path, "JPEGImages/a.png")
    image_file(tmp_path, "JPEGImages/b.png")
    put(tmp_path, "Annotations/a.xml", xml(("dog", 1, 1, 2, 2), ("cat", 1, 1, 2, 2)))
    form = FORMATS["voc"]
    index = form.index(str(tmp_path), None, None, form.settings())
    assert index.context.classes == ("cat", "dog")
    assert [(s.image_id, s.labelled) for s in index.sources] == [("a.png", True), ("b.png", False)]
    direct = form.index(str(tmp_path / "JPEGImages"), str(tmp_path / "Annotations"), ["dog", "cat"], form.settings())
    assert direct.sources == index.sources
    assert direct.context.classes == ("dog", "cat")


# --- masks
