"""Splits: lists that people give, and shares held out by hash."""

import json
from collections import Counter

import pytest

from pipeline.datasets import splits
from pipeline.datasets.formats.base import IngestSettings, Source
from pipeline.errors import InputError


def settings(**options) -> IngestSettings:
    return IngestSettings.parse(options, "--set")


def sources(count: int, labelled: bool = True) -> list[Source]:
    label = b"x" if labelled else None
    return [Source(f"{i:03d}.png", f"/images/{i:03d}.png", 10, label=label) for i in range(count)]


def sizes(assignment: splits.SplitAssignment) -> dict[str, int]:
    return dict(Counter(assignment.split_of.values()))


# --- splits


def test_without_lists_shares_are_held_out_by_hash_and_stay_when_images_come():
    small = splits.assign(sources(400), None, settings(), "voc").split_of
    large = splits.assign(sources(900), None, settings(), "voc").split_of
    assert {name: large[name] for name in small} == small
    counts = Counter(large.values())
    assert 580 < counts["train"] < 680
    assert all(60 < counts[name] < 120 for name in ("val", "calibration", "test"))


def test_a_split_that_was_asked_for_is_never_empty():
    for count in range(4, 12):
        found = sizes(splits.assign(sources(count), None, settings(), "voc"))
        assert set(found) == {"train", "val", "calibration", "test"}
    assert sizes(splits.assign(sources(2), None, settings(), "voc")) == {"train": 1, "val": 1}
    assert sizes(splits.assign(sources(1), None, settings(), "voc")) == {"train": 1}
    with pytest.raises(InputError, match="1 images cannot fill val, train"):
        splits.assign(sources(1), None, settings(hold_out={"val": 0.1, "test": 0, "calibration": 0}), "voc")


def test_groups_share_a_split():
    items = [Source(f"Image_{child:02d}{eye}.jpg", "x", label=b"") for child in range(30) for eye in "LR"]
    found = splits.assign(items, None, settings(group=r"_(\d+)[LR]"), "masks").split_of
    assert len(set(found.values())) == 4
    assert all(found[f"Image_{child:02d}L.jpg"] == found[f"Image_{child:02d}R.jpg"] for child in range(30))
    with pytest.raises(InputError, match="finds no group in image_id"):
        splits.assign(items, None, settings(group=r"child(\d+)"), "masks")


def test_bad_options_of_splits():
    with pytest.raises(InputError, match="one .group., found 2"):
        settings(group="(a)(b)")
    with pytest.raises(InputError, match="add up to 1 or more"):
        settings(hold_out={"val": 0.5, "test": 0.5})
    with pytest.raises(InputError, match="unknown key 'hold_out.vla'. Did you mean 'val'"):
        settings(hold_out={"vla": 0.5})
    with pytest.raises(InputError, match="'tset' is no split"):
        settings(split_names={"val": "tset"})


def test_named_splits_match_with_and_without_suffix_and_count_the_rest():
    named = {"train": ["000", "001.png", "nowhere"], "test": ["003"]}
    found = splits.assign(sources(6), named, settings(), "voc")
    assert found.split_of == {"000.png": "train", "001.png": "train", "003.png": "test"}
    assert found.left_out == 3
    assert [(item.uri, item.reason) for item in found.rejects] == [("nowhere", "missing")]


def test_hold_out_takes_from_the_named_train():
    named = {"train": [f"{i:03d}" for i in range(80)], "test": [f"{i:03d}" for i in range(80, 100)]}
    found = sizes(splits.assign(sources(100), named, settings(hold_out={"val": 0.2}), "voc"))
    assert found["test"] == 20
    assert found["train"] + found["val"] == 80
    assert 6 <= found["val"] <= 26
    with pytest.raises(InputError, match="takes from split 'train'"):
        splits.assign(sources(3), {"test": ["000"]}, settings(hold_out={"val": 0.2}), "voc")


def test_an_image_in_two_splits_is_refused():
    with pytest.raises(InputError, match="'000.png' is named in both 'train' and 'test'"):
        splits.assign(sources(3), {"train": ["000"], "test": ["000.png"]}, settings(), "voc")


def test_images_without_label():
    bare = sources(2, labelled=False)
    assert sizes(splits.assign(bare, None, settings(), "voc")) == {"unlabelled": 2}
    found = splits.assign(bare, {"train": ["000"], "unlabelled": ["001"]}, settings(), "voc")
    assert found.split_of == {"001.png": "unlabelled"}
    assert [item.reason for item in found.rejects] == ["no_label"]


def test_splits_are_read_from_json_and_from_lists(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"train": ["a"], "val": ["b"]}))
    assert splits.read_splits(str(tmp_path / "s.json"), {"val": "test"}) == {"train": ["a"], "test": ["b"]}
    (tmp_path / "train.txt").write_text("a\n\n b \n")
    (tmp_path / "cat_train.txt").write_text("a -1\n")
    assert splits.read_splits(str(tmp_path), {}) == {"train": ["a", "b"]}
    (tmp_path / "s.json").write_text(json.dumps({"trian": ["a"]}))
    with pytest.raises(InputError, match="unknown split 'trian'. Did you mean 'train'"):
        splits.read_splits(str(tmp_path / "s.json"), {})
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        splits.read_splits(str(tmp_path / "s.json"), {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none of them"):
        splits.read_splits(str(tmp_path / "empty"), {})


# --- manifest
