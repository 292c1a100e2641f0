"""Masks by class ids and by colours."""

import numpy as np
import pytest

from pipeline import schema
from pipeline.datasets.formats import FORMATS, files
from pipeline.datasets.formats.base import LabelError, Labels, Source
from pipeline.errors import InputError
from tests.support.format_cases import SIZE, image_file, mask_of, png


def mask_labels(pixels: np.ndarray, classes: list[str] | None, mode: str | None = None, **options) -> Labels:
    form = FORMATS["masks"]
    settings = form.settings.parse(options, "--set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "paired_sources", lambda *_: ([], []))
        context = form.index("images", "masks", classes, settings).context
    return form.read(Source("a.png"), SIZE, png(pixels, mode), context)


GREY = np.array([[0, 1, 2, 0, 0, 0, 0, 0, 0, 255]] * 8, np.uint8)


def test_masks_values_are_classes_and_255_is_void():
    mask = mask_labels(GREY, ["background", "a", "b"]).mask
    np.testing.assert_array_equal(mask, GREY)
    np.testing.assert_array_equal(mask_labels(GREY, ["background", "a", "b"], mode="RGB").mask, GREY)


def test_masks_of_one_bit_are_0_and_1():
    bits = GREY == 1
    np.testing.assert_array_equal(mask_labels(bits, ["background", "vessel"]).mask, bits.astype(np.uint8))


def test_masks_map_values_in_the_order_of_the_classes():
    pixels = np.where(GREY == 1, 255, 0).astype(np.uint8)
    out = mask_labels(pixels, ["vessel", "background"], map={0: "background", 255: "vessel"})
    np.testing.assert_array_equal(out.mask, np.where(GREY == 1, 0, 1))
    void = mask_of(mask_labels(GREY, None, map={0: "x", 1: "void", 2: "y"}))
    np.testing.assert_array_equal(void[0, [0, 1, 2, 9]], [0, schema.VOID, 1, schema.VOID])


def test_masks_map_colours():
    pixels = np.zeros((8, 10, 3), np.uint8)
    pixels[0, 0] = (255, 0, 0)
    pixels[1, 1] = (1, 2, 3)
    names = {"#000000": "background", "#ff0000": "car", "1,2,3": "void"}
    mask = mask_of(mask_labels(pixels, None, map=names))
    assert (mask[0, 0], mask[1, 1], mask[5, 5]) == (1, schema.VOID, 0)
    assert mask_of(mask_labels(np.zeros((8, 10), np.uint8), None, map=names)).max() == 0


def test_masks_index_says_the_colours(tmp_path):
    image_file(tmp_path, "i/a.png")
    image_file(tmp_path, "m/a.png")
    form = FORMATS["masks"]
    settings = form.settings.parse({"map": {"#ff0000": "car", "#00ff00": "tree"}}, "--set")
    assert form.index(str(tmp_path / "i"), str(tmp_path / "m"), None, settings).colours == [
        "#ff0000",
        "#00ff00",
    ]


@pytest.mark.parametrize(
    ("pixels", "options", "reason", "text"),
    [
        (GREY[:4], {}, "wrong_size", "mask is 10x4, its image 10x8"),
        (GREY + np.uint8(5), {}, "mask_value", "value 4, 5, 6, 7 in the mask; .*have 0 to 2"),
        (GREY, {"map": {"0": "background", "2": "a"}}, "mask_value", "value 1 in the mask is not in map"),
        (np.dstack([GREY, GREY, GREY * 0]), {}, "mask_value", "colour #010100 in the mask"),
    ],
)
def test_masks_bad_labels(pixels, options, reason, text):
    with pytest.raises(LabelError, match=text) as found:
        mask_labels(pixels, ["background", "a", "b"], **options)
    assert found.value.reason == reason


def test_masks_bad_settings():
    with pytest.raises(InputError, match="masks do not name their classes"):
        mask_labels(GREY, None)
    with pytest.raises(InputError, match="'cra' is none of --classes. Did you mean 'car'"):
        mask_labels(GREY, ["car"], map={"1": "cra"})
    with pytest.raises(InputError, match="neither a value .* nor a colour"):
        mask_labels(GREY, ["car"], map={"red": "car"})
    with pytest.raises(InputError, match="unknown key 'mpa'. Did you mean 'map'"):
        mask_labels(GREY, ["car"], mpa={"1": "car"})


# --- instances
