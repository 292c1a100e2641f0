"""The benchmark of augmentation with little data: what it counts and compares, never how fast it is."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.speed import augment
from pipeline.images.input_settings import InputSettings

TINY = [
    "--side",
    "48",
    "--count",
    "8",
    "--batch",
    "4",
    "--seconds",
    "0.3",
    "--rounds",
    "2",
    "--device",
    "cpu",
    "--small",
]


def test_the_json_line_comes_last_and_says_what_the_table_says(capsys: pytest.CaptureFixture[str]):
    figures, ratios = augment.main(TINY)
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert list(record) == ["benchmark", "machine", "figures", "ratios"]
    assert record["benchmark"] == "augment"
    assert record["ratios"] == ratios
    assert {"cpu", "cores", "gpu", "python", "torch", "ray", "kornia"} <= set(record["machine"])
    sides = [augment.OURS, augment.KORNIA, augment.TORCHVISION]
    assert list(figures) == sides
    for name in sides[1:]:
        assert ratios[f"images / {name}"] == figures[sides[0]]["img/s"][0] / figures[name]["img/s"][0]
        assert sum(line.startswith(f"| {name}") for line in lines) == 1
    # Every setting of every side was tried at every size of batch: 1, 2 and 2.
    assert sum(line.startswith("  ") and line.endswith("img/s") for line in lines) == 5


def test_rivals_make_the_same_images_masks_and_boxes():
    input, device = InputSettings(size=(64, 64)), torch.device("cpu")
    batch = augment.label(augment.photographs(None, 6, 64), device)
    for moved, mirrored in ((augment.moved_by_kornia, 1.0), (augment.moved_by_torchvision, 1e-3)):
        far = augment.difference(batch, input, moved)
        assert far["max"] < 0.05
        assert far["masks_equal"] == 1
        assert far["boxes_max"] < 1.5 * mirrored
        assert 0.3 < far["inside"] < 1


def test_a_difference_is_found():
    input, device = InputSettings(size=(64, 64)), torch.device("cpu")
    batch = augment.label(augment.photographs(None, 4, 64), device)

    def wrong(*given: Any):
        images, masks, boxes = augment.moved_by_torchvision(*given)
        return images.roll(1, -1), masks + 1, boxes + 3

    far = augment.difference(batch, input, wrong)
    assert far["mean"] > 0.5
    assert far["masks_equal"] < 0.5
    assert far["boxes_max"] > 2.5


def test_a_turn_counts_every_image_of_whole_batches(monkeypatch: pytest.MonkeyPatch):
    clock = 0.0

    def side(batch: Any) -> None:
        nonlocal clock
        clock += 0.5

    monkeypatch.setattr("benchmarks.speed.augment.time.perf_counter", lambda: clock)
    given = augment.batches(augment.label(augment.photographs(None, 8, 16), torch.device("cpu")), 4)
    assert len(given) == 2
    assert augment.turn(side, given, 1.5) == 4 * 4 / 2.0


def test_images_are_distinct_and_masks_are_where_the_boxes_are():
    images = augment.photographs(None, 10, 32)
    assert len({image.numpy().tobytes() for image in images}) == 10
    batch = augment.batches(augment.label(images, torch.device("cpu")), 5)[1]
    assert batch.positions.tolist() == [5, 6, 7, 8, 9]
    assert batch.boxes is not None
    assert batch.masks is not None
    for box, mask in zip(batch.boxes, batch.masks, strict=True):
        ys, xs = torch.where(mask == augment.BOXES)
        if len(xs):
            x1, y1, x2, y2 = box[-1].tolist()
            assert x1 - 1 <= xs.min() <= xs.max() <= x2
            assert y1 - 1 <= ys.min() <= ys.max() <= y2


def test_sides_take_turns_and_every_other_round_goes_backwards():
    order: list[str] = []

    def turn(name: str) -> Callable[[], float]:
        return lambda: (order.append(name), float(len(order)))[1]

    rates = harness.in_turns({name: turn(name) for name in "abc"}, 3)
    assert "".join(order) == "abccbaabc"
    assert rates == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_spread_and_table():
    assert harness.spread([4.0, 1, 2, 3, 5]) == (3, 2, 4)
    assert harness.table([]) == ""
    rows = [{"side": "ours", "img/s": 12345.6, "x": None}, {"side": "a", "img/s": 1.23456, "x": 2}]
    assert harness.table(rows).splitlines() == [
        "| side | img/s | x   |",
        "| ---- | ----: | --- |",
        "| ours | 12346 | -   |",
        "| a    | 1.235 | 2   |",
    ]
