import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import schema, storage
from pipeline.datasets.formats import FORMATS, files
from pipeline.datasets.formats.base import Context, LabelError, Labels, Source, box_row, fit_box
from pipeline.errors import InputError
from pipeline.images.decode import ImageInfo

SIZE = ImageInfo(height=8, width=10)


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder: Path, name: str, data: bytes | str) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())


def image_file(folder: Path, name: str, height: int = 8, width: int = 10) -> None:
    put(folder, name, png(np.full((height, width, 3), 90, np.uint8)))


def mask_of(labels: Labels) -> np.ndarray:
    assert labels.mask is not None
    return labels.mask


def edges(labels: Labels) -> list[tuple]:
    return [(b["x1"], b["y1"], b["x2"], b["y2"], b["label"]) for b in labels.boxes or []]


# --- pairing


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


def xml(*objects: tuple, size: tuple[int, int] | None = (10, 8)) -> bytes:
    parts = [
        f"<object><name>{name}</name><difficult>1</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for name, a, b, c, d in objects
    ]
    wide = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation><path>/home/somebody/x.jpg</path>{wide}{''.join(parts)}</annotation>".encode()


def read(name: str, label: bytes, classes: tuple[str, ...], image: ImageInfo = SIZE, **extra) -> Labels:
    form = FORMATS[name]
    background = classes.index("background") if "background" in classes else None
    context = Context(classes, background, ("detection",), form.settings(), extra)
    return form.read(Source("a.png"), image, label, context)


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
