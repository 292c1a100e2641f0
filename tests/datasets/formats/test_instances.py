"""Label maps: a mask and a box for each object."""

import numpy as np
import pytest

from pipeline.datasets.formats import FORMATS
from pipeline.datasets.formats.base import LabelError
from pipeline.errors import InputError
from tests.support.format_cases import edges, png, read


def test_instances_become_mask_and_boxes():
    ids = np.zeros((8, 10), np.uint16)
    ids[1:3, 2:5] = 300
    ids[7, 9] = 7
    out = read("instances", png(ids), ("nucleus", "background"))
    np.testing.assert_array_equal(out.mask, np.where(ids == 0, 1, 0))
    assert edges(out) == [(9, 7, 10, 8, 0), (2, 1, 5, 3, 0)]
    assert [box["instance"] for box in out.boxes or []] == [7, 300]


def test_instances_without_any_are_labelled_and_empty():
    out = read("instances", png(np.zeros((8, 10), np.uint8)), ("cell", "background"))
    assert out.boxes == []
    assert (out.mask == 1).all()


def test_instances_have_one_class():
    form = FORMATS["instances"]
    with pytest.raises(InputError, match="one class; found --classes a,b"):
        form.index("i", "l", ["a", "b"], form.settings())
    with pytest.raises(LabelError, match="colour image"):
        read("instances", png(np.zeros((8, 10, 3), np.uint8)), ("cell", "background"))


# --- coco
