"""The generated data: exact labels, deterministic, split by handwriting."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline import schema
from pipeline.datasets.formats.base import Labels
from pipeline.errors import InputError

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from pipeline.datasets.formats import demo
from pipeline.datasets.formats.demo import BACKGROUND, Demo, DemoSettings, compose, handwriting, split_of

FORMAT = Demo()


def options(**values: int) -> DemoSettings:
    return DemoSettings.parse(values, "--set")


SMALL = options(images=40)
SHIFTED = options(images=20, shifted=True)


def generated(settings: DemoSettings) -> list[tuple[np.ndarray, Labels]]:
    index = FORMAT.index(None, None, None, settings)
    pairs = (FORMAT.generate(source, index.context) for source in index.sources)
    return [(np.asarray(Image.open(io.BytesIO(data))), labels) for data, labels in pairs]


def test_the_index_has_ten_digits_a_background_and_four_splits():
    index = FORMAT.index(None, None, None, options())
    assert index.context.classes == (*"0123456789", schema.BACKGROUND)
    assert index.context.things == tuple("0123456789")
    assert index.context.background == BACKGROUND == 10
    assert Counter(source.split for source in index.sources) == {
        "train": 1050,
        "val": 150,
        "calibration": 150,
        "test": 150,
    }
    assert len({source.image_id for source in index.sources}) == 1500
    assert all(source.labelled and source.image_uri is None for source in index.sources)


@pytest.mark.parametrize("images", [1, 2, 7, 10, 101])
def test_every_position_has_a_split_and_shares_are_kept(images: int):
    counts = Counter(split_of(position, images) for position in range(images))
    assert sum(counts.values()) == images
    assert all(abs(counts[split] - share * images) <= 1 for split, share in demo.SHARES.items())


def test_the_shifted_world_is_all_test_and_shares_no_photograph():
    index = FORMAT.index(None, None, None, SHIFTED)
    assert {source.split for source in index.sources} == {"test"}
    assert not {s.image_id for s in index.sources} & {s.image_id for s in FORMAT.index(None, None, None, SMALL).sources}
    assert not set(demo.PHOTOGRAPHS) & set(demo.OTHER_PHOTOGRAPHS)
    for name in (*demo.PHOTOGRAPHS, *demo.OTHER_PHOTOGRAPHS):
        assert min(demo.photograph(name).size) >= 300


def test_no_handwriting_is_shared_between_splits():
    seen: Counter[tuple[int, bytes]] = Counter()
    sizes = {}
    for split in demo.HANDWRITING:
        samples = handwriting(split)
        assert len(samples) == 10
        assert all(0 <= each.min() and each.max() == 1.0 for each in samples)
        sizes[split] = sum(map(len, samples))
        seen.update({(label, each.tobytes()) for label in range(10) for each in samples[label]})
    assert set(seen.values()) == {1}
    assert sum(sizes.values()) == 1797
    assert sizes["test"] > 250


def test_an_image_depends_on_seed_and_position_alone():
    index = FORMAT.index(None, None, None, SMALL)
    one, other = index.sources[3], index.sources[4]
    data, labels = FORMAT.generate(one, index.context)
    FORMAT.generate(other, index.context)
    again, labels_again = FORMAT.generate(one, index.context)
    assert data == again
    assert labels.boxes == labels_again.boxes
    assert labels.mask is not None
    assert labels_again.mask is not None
    assert np.array_equal(labels.mask, labels_again.mask)
    assert data != FORMAT.generate(other, index.context)[0]
    moved = FORMAT.index(None, None, None, options(images=40, seed=1))
    assert data != FORMAT.generate(moved.sources[3], moved.context)[0]


@pytest.mark.parametrize("settings", [SMALL, SHIFTED, options(images=6, size=128, max_digits=12)])
def test_boxes_are_the_extents_of_what_the_mask_shows(settings: DemoSettings):
    for pixels, labels in generated(settings):
        assert pixels.shape == (settings.size, settings.size, 3)
        assert pixels.dtype == np.uint8
        mask, boxes = labels.mask, labels.boxes
        assert mask is not None
        assert boxes is not None
        assert mask.dtype == np.uint8
        inside_a_box = np.zeros(mask.shape, bool)
        for box in boxes:
            assert not box["crowd"]
            edges = [box[name] for name in ("x1", "y1", "x2", "y2")]
            assert all(float(edge).is_integer() and 0 <= edge <= settings.size for edge in edges)
            x1, y1, x2, y2 = map(int, edges)
            part = mask[y1:y2, x1:x2] == box["label"]
            # Each of the four edges is touched by the digit.
            assert part[0].any()
            assert part[-1].any()
            assert part[:, 0].any()
            assert part[:, -1].any()
            inside_a_box[y1:y2, x1:x2] = True
        assert (mask[~inside_a_box] == BACKGROUND).all()
        assert set(np.unique(mask)) - {BACKGROUND} == {box["label"] for box in boxes}


def test_a_digit_below_another_keeps_most_of_itself_and_gives_up_the_rest():
    settings = options(images=1, max_digits=20)
    hidden = 0
    for position in range(12):
        _, owner, labels = compose(settings, position, "train")
        shown = np.bincount(owner[owner >= 0], minlength=len(labels))
        assert (shown > 40).all()
        for index in range(len(labels)):
            rows, columns = np.nonzero(owner == index)
            window = owner[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            hidden += int((window > index).any())
    assert hidden > 5  # the rule was put to use


def contrast(pixels: np.ndarray, mask: np.ndarray) -> float:
    grey = pixels.astype(float).mean(2)
    return grey[mask != BACKGROUND].mean() - grey[mask == BACKGROUND].mean()


def test_digits_are_brighter_than_the_photograph_and_darker_in_the_shifted_world():
    for settings, sign in ((SMALL, 1), (SHIFTED, -1)):
        for pixels, labels in generated(settings):
            assert labels.mask is not None
            if labels.boxes:
                assert sign * contrast(pixels, labels.mask) > 60


def test_the_label_border_is_where_the_ink_is_half(monkeypatch: pytest.MonkeyPatch):
    """On a black photograph with white ink, brightness alone tells the mask."""
    monkeypatch.setattr(demo, "DIM", (0.0, 0.0))
    monkeypatch.setattr(demo, "BRIGHTNESS", (300.0, 300.0))
    wrong = total = 0
    for position in range(20):
        pixels, owner, _ = compose(SMALL, position, "train")
        bright = pixels.min(2) > 150
        wrong += int((bright != (owner >= 0)).sum())
        total += int((owner >= 0).sum())
    assert total > 5000
    assert wrong < 0.03 * total


@pytest.mark.parametrize("split", demo.HANDWRITING)
def test_every_sample_leaves_ink_at_any_size(split: str):
    rng = np.random.default_rng(0)
    for samples in handwriting(split):
        for sample in samples:
            ink = demo._ink(sample, rng)
            assert 8 <= max(ink.shape) <= 60
            assert (ink > 0.5).sum() > 40


def test_an_upright_sample_is_only_scaled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "ANGLE", 0.0)
    monkeypatch.setattr(demo, "DIGIT_PX", (32.0, 32.0))
    square = np.zeros((8, 8), np.float32)
    square[2:6, 3:5] = 1.0
    ink = demo._ink(square, np.random.default_rng(0))
    # 4 x 2 pixels of 32 / 8 = 4 pixels each; interpolation moves the border by less than half a sample.
    assert abs(ink.shape[0] - 16) <= 2
    assert abs(ink.shape[1] - 8) <= 2
    assert np.allclose(ink, ink[::-1, ::-1], atol=1e-4)


def test_some_images_are_empty_and_labelled():
    empty = [labels for _, labels in generated(options(images=60)) if labels.boxes == []]
    assert empty
    assert all(labels.mask is not None and (labels.mask == BACKGROUND).all() for labels in empty)


def test_inputs_that_mean_nothing_here_are_refused():
    with pytest.raises(InputError, match="--format demo makes its own images and labels; leave out 's3://b/x'"):
        FORMAT.index("s3://b/x", None, None, SMALL)
    with pytest.raises(InputError, match="has the classes 0 to 9 and background; leave out --classes"):
        FORMAT.index(None, None, ["cat"], SMALL)
    with pytest.raises(InputError, match="unknown key 'image'. Did you mean 'images'"):
        DemoSettings.parse({"image": 3}, "--set")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs scikit-image, which is not installed; pip install 'dubito\[demo\]'"):
        FORMAT.index(None, None, None, SMALL)
