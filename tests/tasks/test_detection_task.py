"""Detection: members pooled by location, suppressed, measured; on hand-made outputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import schema
from pipeline.errors import InputError
from pipeline.tasks import Detection
from tests.support.task_cases import Output, as_rows, box, detection, framed, output_of, table_of


def test_detection_columns_are_those_of_the_schema():
    task = detection()
    batch = framed(task, [(32, 32)])
    columns = task.to_columns(task.fuse([task.predict(output_of(1, (32, 32), 0), batch)]), batch)
    common = {"image_id", "uri", "sha256", "height", "width", "status", "error", "bundle_id", "members", "decision"}
    assert set(columns) | common == set(schema.DETECTION_PREDICTIONS.names)
    fields = {field.name for field in schema.PREDICTED_BOX}
    assert columns["boxes"][0]
    assert all(row.keys() == fields for row in columns["boxes"][0])
    for row in as_rows(task, columns)[0]["boxes"]:
        assert len(row["probabilities"]) == 3
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 5))
def test_copies_of_a_detector_are_that_detector_with_all_votes(seed, copies):
    task = detection()
    batch = framed(task, [(32, 32), (40, 64)])
    member = task.predict(output_of(2, (32, 32), seed), batch)
    one, many = (task.to_columns(task.fuse([member] * count), batch) for count in (1, copies))
    assert many["uncertainty"] == one["uncertainty"]
    assert many["missed_votes"] == [0, 0]
    for single, pooled in zip(one["boxes"], many["boxes"], strict=True):
        assert [row | {"votes": 1} for row in pooled] == single
        for row in pooled:
            assert row["votes"] == copies
            assert row["mutual_information"] == 0
            assert all(row[name] == 0 for name in ("std_x1", "std_y1", "std_x2", "std_y2"))


def _single(task: Detection, spots: dict[int, tuple[float, list[float]]], quality: float = 20.0) -> Output:
    """A detector sure of nothing but the given locations: index -> (logit of class 1, box)."""
    empty = output_of(1, (32, 32), 0)
    logits = torch.full_like(empty.logits, -20.0)
    boxes = torch.cat([empty.centres - 1, empty.centres + 1], -1)[None].clone()
    for index, (logit, edges) in spots.items():
        logits[0, index, 1] = logit
        boxes[0, index] = torch.tensor(edges)
    del task
    return empty._replace(logits=logits, boxes=boxes, quality=torch.full_like(empty.quality, quality))


def test_members_are_pooled_at_each_location():
    task = detection()
    batch = framed(task, [(32, 32)])
    first = _single(task, {5: (0.0, [4, 4, 20, 20])})
    second = _single(task, {5: (0.0, [8, 4, 20, 24]), 10: (0.0, [16, 16, 30, 30])})
    fused = task.fuse([task.predict(first, batch), task.predict(second, batch)])
    columns = task.to_columns(fused, batch)
    both, lone = columns["boxes"][0]
    assert [both[name] for name in ("x1", "y1", "x2", "y2")] == [6, 4, 20, 22]
    assert [both[f"std_{name}"] for name in ("x1", "y1", "x2", "y2")] == [2, 0, 0, 2]
    assert (both["label"], both["votes"], lone["votes"]) == (1, 2, 1)
    assert both["score"] == pytest.approx(0.5)
    # Only one member sees the second: half the score, and its own box.
    assert lone["score"] == pytest.approx(0.25)
    assert [lone[name] for name in ("x1", "y1", "x2", "y2")] == pytest.approx([16, 16, 30, 30], abs=1e-3)
    assert lone["probabilities"] == pytest.approx([0, 0.25, 0.75], abs=1e-6)
    total = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert lone["entropy"] == pytest.approx(total, abs=1e-6)
    assert lone["mutual_information"] == pytest.approx(total - math.log(2) / 2, abs=1e-6)
    assert both["mutual_information"] == pytest.approx(0, abs=1e-6)
    assert columns["missed_votes"] == [pytest.approx(0.5 * lone["score"])]


def test_score_is_class_probability_times_quality():
    task = detection()
    batch = framed(task, [(32, 32)])
    output = _single(task, {5: (1.0, [4, 4, 20, 20])}, quality=0.5)
    row = task.to_columns(task.fuse([task.predict(output, batch)]), batch)["boxes"][0][0]
    sigmoid = [1 / (1 + math.exp(-value)) for value in (1.0, 0.5)]
    assert row["score"] == pytest.approx(sigmoid[0] * sigmoid[1])
    assert row["probabilities"] == pytest.approx([0, sigmoid[0], 1 - sigmoid[0]], abs=1e-6)


def test_overlapping_boxes_of_one_class_are_suppressed():
    task = detection(predict={"nms_iou": 0.5})
    batch = framed(task, [(32, 32)])
    output = _single(task, {5: (2.0, [4, 4, 20, 20]), 6: (1.0, [4, 4, 20, 21]), 10: (0.0, [16, 16, 30, 30])})
    rows = task.to_columns(task.fuse([task.predict(output, batch)]), batch)["boxes"][0]
    assert [row["x1"] for row in rows] == [4, 16]
    output.logits[0, 6] = torch.tensor([1.0, -20.0])
    rows = task.to_columns(task.fuse([task.predict(output, batch)]), batch)["boxes"][0]
    assert [row["label"] for row in rows] == [1, 0, 1]
    few = detection(predict={"max_boxes": 1})
    assert len(few.to_columns(few.fuse([few.predict(output, batch)]), batch)["boxes"][0]) == 1


def test_boxes_come_back_in_the_images_own_pixels():
    task = detection()
    # 64 x 32 pixels in a frame of 32 x 32: half the size, 8 pixels of padding left and right.
    batch = framed(task, [(64, 32)])
    boxes = {
        5: (5.0, [9.0, 2.0, 20.0, 16.0]),
        10: (5.0, [15.0, 15.0, 30.0, 31.0]),
        12: (5.0, [0.0, 20.0, 7.0, 30.0]),
    }
    members = [task.predict(_single(task, boxes), batch) for _ in range(2)]
    members[1].boxes[0, 5, 0] += 2
    row, clipped = task.to_columns(task.fuse(members), batch)["boxes"][0]
    assert [row[name] for name in ("x1", "y1", "x2", "y2")] == [4, 4, 24, 32]
    assert [row[f"std_{name}"] for name in ("x1", "y1", "x2", "y2")] == [2, 0, 0, 0]
    assert clipped["x2"] == 32
    assert clipped["y2"] == 62


def test_locations_in_the_padding_and_boxes_beyond_the_image_are_not_found():
    task = detection()
    # The image lies in columns 8 to 23. The first location is beside it, the second box ends before it begins.
    batch = framed(task, [(64, 32)])
    spots = {4: (5.0, [0.0, 4.0, 20.0, 20.0]), 9: (5.0, [1.0, 2.0, 8.0, 20.0]), 10: (5.0, [10.0, 2.0, 20.0, 20.0])}
    rows = task.to_columns(task.fuse([task.predict(_single(task, spots), batch)]), batch)["boxes"][0]
    assert [(row["x1"], row["x2"]) for row in rows] == [(4, 24)]


def test_doubt_of_the_image_is_summed_over_its_own_locations():
    task = detection()
    batch = framed(task, [(64, 32), (32, 32)])
    output = output_of(2, (32, 32), 3)
    columns = task.to_columns(task.fuse([task.predict(output, batch)]), batch)
    scores = output.logits.double().sigmoid()
    best = scores.amax(-1, keepdim=True)
    p = torch.cat([best * scores / scores.sum(-1, keepdim=True), 1 - best], -1)
    entropy = -(p * p.log()).sum(-1)
    within = (output.centres[:, 0] > 8) & (output.centres[:, 0] < 24)
    assert within.sum() == 8
    wanted = [entropy[0, within].sum().item(), entropy[1].sum().item()]
    assert columns["uncertainty"] == pytest.approx(wanted, rel=1e-5)


def test_an_image_with_nothing_in_it_still_has_its_doubt():
    task = detection()
    batch = framed(task, [(32, 32)])
    columns = task.to_columns(task.fuse([task.predict(_single(task, {}), batch)]), batch)
    assert columns["boxes"] == [[]]
    assert columns["missed_votes"] == [0]
    assert 0 < columns["uncertainty"][0] < 1e-4


def test_answers_do_not_depend_on_the_batch():
    task = detection()
    batch = framed(task, [(32, 32)] * 3)
    output = output_of(3, (32, 32), 7)
    whole = task.to_columns(task.fuse([task.predict(output, batch)]), batch)
    alone = framed(task, [(32, 32)])
    one = output._replace(logits=output.logits[2:], boxes=output.boxes[2:], quality=output.quality[2:])
    single = task.to_columns(task.fuse([task.predict(one, alone)]), alone)
    assert single["boxes"][0] == whole["boxes"][2]


@pytest.mark.parametrize("threshold", [0.05, 0.9])
def test_detection_is_measured_whatever_threshold_is_stored(threshold):
    task = detection(predict={"score_threshold": threshold})
    truth = [[box(8, 8, 40, 40, 1), box(0, 0, 20, 20, 0, True)], None]
    table = table_of([(64, 64), (64, 64)], boxes=truth)
    batch, _ = task.collate(table, train=False, seed=0)
    output = _single(task, {5: (0.0, [4, 4, 20, 20])})
    two = output._replace(
        logits=output.logits.repeat(2, 1, 1),
        boxes=output.boxes.repeat(2, 1, 1),
        quality=output.quality.repeat(2, 1),
    )
    prediction = task.predict(two, batch)
    metric, pool = task.metric(), task.metric()
    task.update_metric(prediction, batch, table, metric)
    task.update_metric(task.fuse([prediction]), batch, table, pool)
    got = metric.compute()
    assert got == pool.compute()
    assert (got["images"], got["boxes"]) == (1, 1)
    assert got["map"] == pytest.approx(1)
    assert got["per_class"] == [None, pytest.approx(1)]
    with pytest.raises(InputError, match="no column 'boxes': metrics of detection need"):
        task.update_metric(prediction, batch, None, metric)
