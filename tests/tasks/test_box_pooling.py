"""Detectors' views pooled by location or by clustering, unlike members, calibration: on hand-made outputs."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.images.affine import transform_boxes
from pipeline.tasks import Detection
from pipeline.tasks.box_pooling import same_locations
from pipeline.tasks.pooled_boxes import expected_error
from pipeline.uncertainty.tta import TtaSettings, View, tta_views
from tests.support.task_cases import Output, detection, framed, output_of

ALL = TtaSettings(flips=True, turns=True)


def shown(output: Output, look: View, size: tuple[int, int]) -> tuple[Output, tuple[int, int]]:
    """What a perfectly symmetric detector would say of a view: the same boxes, at the view's own locations."""
    seen = (size[1], size[0]) if look.turns % 2 else size
    matrix = look.matrix(size, seen)
    moved = transform_boxes(output.boxes.double(), matrix).float()
    centres = (output.centres.double() @ matrix[:2, :2].T + matrix[:2, 2]).float()
    order = sorted(range(len(centres)), key=lambda at: (centres[at, 1].item(), centres[at, 0].item()))
    return output._replace(
        logits=output.logits[:, order], boxes=moved[:, order], quality=output.quality[:, order], centres=centres[order]
    ), seen


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([(32, 32), (32, 64)]))
def test_views_of_a_symmetric_detector_are_that_detector(seed, size):
    task = detection(size=size, predict={"tta": ALL.to_dict()})
    batch = framed(task, [size])
    output = output_of(1, size, seed)
    said = [(*shown(output, look, size), look) for look in tta_views(ALL)]
    members = [task.predict(each, batch, look, seen) for each, seen, look in said]
    (row,) = task.to_columns(task.fuse(members), batch)["boxes"]
    plain = detection(size=size)
    (wanted,) = plain.to_columns(plain.fuse([plain.predict(output, batch)]), batch)["boxes"]
    assert len(row) == len(wanted)
    for a, b in zip(row, wanted, strict=True):
        assert a["votes"] == 8
        assert [a[name] for name in ("x1", "y1", "x2", "y2", "score")] == pytest.approx(
            [b[name] for name in ("x1", "y1", "x2", "y2", "score")], abs=1e-3
        )
        assert a["mutual_information"] == pytest.approx(0, abs=1e-5)
        assert max(a[name] for name in ("std_x1", "std_y2")) == pytest.approx(0, abs=1e-2)


def test_a_view_sends_pixels_where_its_matrix_says():
    image = torch.arange(24.0).reshape(1, 1, 4, 6)
    for look in tta_views(ALL):
        there = look.apply(image, 1)
        matrix = look.matrix((4, 6), (there.shape[-2], there.shape[-1]))
        for row in range(4):
            for column in range(6):
                x, y, _ = (matrix @ torch.tensor([column + 0.5, row + 0.5, 1.0]).double()).tolist()
                assert there[0, 0, int(y), int(x)] == image[0, 0, row, column], look


def test_where_locations_do_not_fall_onto_each_other_boxes_are_clustered():
    task = detection(predict={"tta": {"flips": True}})
    batch = framed(task, [(32, 32)])
    first = task.predict(output_of(1, (32, 32), 0), batch)
    assert same_locations(first, tta_views(task.settings.tta))
    assert not same_locations(first, tta_views(TtaSettings(scales=(1.0, 0.5))))
    assert not same_locations(replace(first, fixed=False), tta_views(TtaSettings()))
    shifted = replace(first, centres=first.centres - 4)
    assert same_locations(shifted, tta_views(TtaSettings()))
    assert not same_locations(shifted, tta_views(task.settings.tta))
    wide = detection(size=(32, 64))
    grid = wide.predict(output_of(1, (32, 64), 0), framed(wide, [(32, 64)]))
    turns = tta_views(TtaSettings(turns=True))
    assert same_locations(grid, turns)
    assert not same_locations(replace(grid, centres=grid.centres - 4), [View(), View(turns=1)])
    twice = replace(first, centres=first.centres.repeat(2, 1), strides=first.strides.repeat(2))
    assert same_locations(twice, tta_views(task.settings.tta))
    assert not same_locations(twice, tta_views(ALL))
    strict = detection(predict={"tta": {"scales": [1.0, 0.5]}, "fuse": "locations"})
    with pytest.raises(InputError, match="fuse: locations wants members and views that predict at the same places"):
        strict.fuse([first])


def _sure(boxes: list[list[float]], labels: list[int]) -> Output:
    """One location a box, sure of it."""
    count = len(boxes)
    logits = torch.full((1, count, 2), -20.0)
    logits[0, range(count), labels] = 4.0
    centres = torch.full((count, 2), 16.0)
    return Output(logits, torch.tensor([boxes]), torch.full((1, count), 20.0), centres, torch.full((count,), 8.0))


@pytest.mark.parametrize("kind", ["wbf", "bsas"])
def test_boxes_of_members_that_look_elsewhere_are_clustered(kind):
    task = detection(predict={"fuse": kind})
    batch = framed(task, [(32, 32)])
    one, two = _sure([[2, 2, 12, 12], [18, 18, 30, 30]], [0, 1]), _sure([[2, 2, 12, 13]], [0])
    columns = task.to_columns(task.fuse([task.predict(each, batch) for each in (one, two)]), batch)
    both, lone = columns["boxes"][0]
    assert (both["votes"], lone["votes"], lone["label"]) == (2, 1, 1)
    assert [both[name] for name in ("x1", "y1", "x2", "y2")] == pytest.approx([2, 2, 12, 12.5])
    assert both["std_x1"] == 0
    assert both["std_y2"] > 0
    assert lone["std_x1"] is None, "one member of two says nothing of the spread"
    assert lone["score"] < both["score"]
    assert lone["mutual_information"] > 0.2
    assert columns["missed_votes"] == [pytest.approx(0.5 * lone["score"])]


def _calibrated(**parameters) -> Detection:
    task = detection()
    task.calibration = {"kind": "isotonic", "parameters": parameters}
    return task


def test_a_calibration_changes_scores_and_spread_and_nothing_else():
    curve = {"x": [0.0, 1.0], "y": [0.0, 0.5]}
    task = _calibrated(pool=curve, spread={"scale": 2.0, "floor": 0.0})
    batch = framed(task, [(32, 32)])
    members = [task.predict(output_of(1, (32, 32), seed), batch) for seed in (0, 1)]
    fused = task.fuse(members)
    plain = detection()
    before, after = (each.to_columns(each.fuse(members), batch) for each in (plain, task))
    wanted = [row for row in before["boxes"][0] if row["score"] / 2 >= task.settings.score_threshold]
    assert 0 < len(wanted) < len(before["boxes"][0])
    for a, b in zip(after["boxes"][0], wanted, strict=True):
        assert a["score"] == pytest.approx(b["score"] / 2, abs=1e-6)
        assert a["std_x1"] == pytest.approx(2 * b["std_x1"], rel=1e-5)
        same = ("x1", "label", "entropy", "mutual_information", "votes", "probabilities")
        assert [a[name] for name in same] == [b[name] for name in same]
    assert after["entropy_sum"] == before["entropy_sum"]
    rows = task.without_calibration(fused).in_image_pixels(batch)[0]
    assert rows.scores.tolist() == fused.kept[0].scores.tolist()


def test_unlike_members_are_calibrated_before_they_are_joined():
    half, same = {"x": [0.0, 1.0], "y": [0.0, 0.5]}, {"x": [0.0, 1.0], "y": [0.0, 1.0]}
    task = _calibrated(members=[half, same])
    task.same_model = False
    batch = framed(task, [(32, 32)])
    one, two = _sure([[2, 2, 12, 12]], [0]), _sure([[18, 18, 30, 30]], [1])
    (rows,) = task.to_columns(task.fuse([task.predict(each, batch) for each in (one, two)]), batch)["boxes"]
    assert [row["label"] for row in rows] == [1, 0]
    assert rows[1]["score"] == pytest.approx(rows[0]["score"] / 2, rel=1e-5)


def test_expected_error():
    precision = torch.tensor([0.9, 0.8, 0.3])
    said = torch.tensor([True, True, False])
    # Two said, 1.7 of them right; 2 true ones expected in all.
    assert expected_error(precision, said).item() == pytest.approx(1 - 2 * 1.7 / (2 + 2.0))
    assert expected_error(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).item() == 0
    assert expected_error(torch.ones(3), torch.ones(3, dtype=torch.bool)).item() == pytest.approx(0)
    assert math.isclose(expected_error(torch.tensor([0.2]), torch.tensor([False])).item(), 1.0)


def test_windows_are_refused():
    with pytest.raises(InputError, match="windows: always is for segmentation"):
        detection(predict={"windows": "always"})
