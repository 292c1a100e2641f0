"""Segmentation: members to doubt, doubt to columns, metrics at the image's own size; on hand-made logits."""

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import schema
from pipeline.errors import InputError
from tests.support.task_cases import as_rows, framed, logits_of, random_mask, segmentation, table_of


def test_segmentation_columns_are_those_of_the_schema():
    task = segmentation()
    batch = framed(task, [(16, 24)])
    columns = task.to_columns(task.fuse([task.predict(logits_of(1, (16, 24), 0), batch)]), batch)
    common = {field.name for field in schema.PREDICTIONS["segmentation"]} - columns.keys()
    assert common == {
        "image_id", "uri", "sha256", "height", "width", "status", "error", "bundle_id", "members", "decision"
    }  # fmt: skip


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([0.1, 2.0, 50.0]))
def test_copies_of_a_member_are_that_member_without_mutual_information(seed, copies, sharpness):
    task = segmentation(size=(8, 12))
    batch = framed(task, [(8, 12), (8, 8)])
    member = task.predict(logits_of(2, (8, 12), seed, sharpness), batch)
    one, many = (task.to_columns(task.fuse([member] * count), batch) for count in (1, copies))
    assert one == many
    assert many["mutual_information_mean"] == [0, 0]
    assert many["mutual_information_p95"] == [0, 0]
    assert many["member_dice"] == [1, 1]


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 5), st.sampled_from([0.1, 2.0, 50.0]))
def test_members_that_differ_have_information_and_entropy_adds_up(seed, members, sharpness):
    task = segmentation(size=(8, 12))
    batch = framed(task, [(8, 12), (8, 8)])
    fused = task.fuse(task.predict(logits_of(2, (8, 12), seed + m, sharpness), batch) for m in range(members))
    for row in as_rows(task, task.to_columns(fused, batch)):
        assert row["mutual_information_mean"] > 0
        parts = row["expected_entropy_mean"] + row["mutual_information_mean"]
        assert row["entropy_mean"] == pytest.approx(parts, abs=1e-5)
        assert row["uncertainty"] == row["entropy_mean"]
        assert row["entropy_mean"] <= row["entropy_p95"] * 1.3
        assert 0 <= row["member_dice"] < 1
        assert all(each["mutual_information"] >= 0 for each in row["classes"])


def test_order_of_members_does_not_matter():
    task = segmentation()
    batch = framed(task, [(16, 24)])
    members = [task.predict(logits_of(1, (16, 24), m), batch) for m in range(4)]
    ahead, back = task.fuse(members), task.fuse(reversed(members))
    torch.testing.assert_close(ahead.probabilities, back.probabilities)
    torch.testing.assert_close(ahead.expected_entropy, back.expected_entropy)
    stacked = torch.stack([member.probabilities for member in members])
    torch.testing.assert_close(ahead.probabilities, stacked.mean(0))


def test_members_are_taken_one_at_a_time():
    task = segmentation()
    batch = framed(task, [(16, 24)])
    alive: list[int] = []

    def members():
        seen: list[weakref.ref] = []
        for m in range(4):
            member = task.predict(logits_of(1, (16, 24), m), batch)
            seen.append(weakref.ref(member.probabilities))
            yield member
            del member
            alive.append(sum(each() is not None for each in seen))

    fused = task.fuse(members())
    assert alive == [0, 0, 0, 0]
    assert [(each.dtype, each.shape) for each in fused.maps] == [(torch.uint8, (1, 16, 24))] * 4


@pytest.mark.parametrize("flat", [False, True])
def test_padding_takes_no_part_in_any_measure(flat):
    task = segmentation(size=(24, 16) if flat else (16, 24))
    batch = framed(task, [(16, 16)])
    inside = torch.zeros(24, 16, dtype=torch.bool)
    inside[4:20] = True
    inside = inside if flat else inside.T
    clean, dirty = (logits_of(1, task.input.size, seed) for seed in (0, 1))
    other = clean.clone()
    other[..., ~inside] = dirty[..., ~inside] * 50
    answers = [
        task.to_columns(task.fuse([task.predict(each, batch), task.predict(each * 2, batch)]), batch)
        for each in (clean, other)
    ]
    assert answers[0] == answers[1]
    probabilities = clean[0, ..., inside].softmax(0)
    doubled = (clean[0, ..., inside] * 2).softmax(0)
    pool = (probabilities + doubled) / 2
    wanted = -(pool * pool.log()).sum(0).mean().item()
    assert answers[0]["entropy_mean"] == [pytest.approx(wanted, rel=1e-5)]
    assert np.array_equal(_unpacked(answers[0]["mask"][0], 16, 16), pool.argmax(0).reshape(16, 16).numpy())


def _unpacked(packed: bytes, height: int, width: int) -> np.ndarray:
    return np.frombuffer(schema.unpack_map(packed, height, width), np.uint8).reshape(height, width)


def test_masks_have_the_images_own_size_and_maps_a_quarter_of_it():
    task = segmentation(size=(16, 24))
    batch = framed(task, [(32, 48), (33, 21)])
    columns = task.to_columns(task.fuse([task.predict(logits_of(2, (16, 24), 0), batch)]), batch)
    for n, (height, width) in enumerate([(32, 48), (33, 21)]):
        assert _unpacked(columns["mask"][n], height, width).max() <= 2
        small = (math.ceil(height / 4), math.ceil(width / 4))
        assert (columns["map_height"][n], columns["map_width"][n]) == small
        for name in ("confidence_map", "uncertainty_map"):
            _unpacked(columns[name][n], *small)


def test_maps_are_area_means_of_confidence_and_relative_entropy():
    task = segmentation(size=(8, 12))
    batch = framed(task, [(8, 12)])
    p = task.predict(logits_of(1, (8, 12), 3), batch).probabilities[0].double()
    columns = task.to_columns(task.fuse([task.predict(logits_of(1, (8, 12), 3), batch)]), batch)
    relative = -(p * p.log()).sum(0) / math.log(3)
    for name, values in (("confidence_map", p.amax(0)), ("uncertainty_map", relative)):
        wanted = values.reshape(2, 4, 3, 4).mean((1, 3)) * 255
        got = _unpacked(columns[name][0], 2, 3)
        assert np.abs(got - wanted.numpy()).max() <= 0.51
    off = segmentation(size=(8, 12), predict={"maps": False})
    bare = off.to_columns(off.fuse([off.predict(logits_of(1, (8, 12), 3), batch)]), batch)
    assert (bare["confidence_map"], bare["map_width"]) == ([None], [None])
    assert bare["mask"] == columns["mask"]


def test_class_summaries_are_means_over_the_pixels_of_the_class():
    task = segmentation(size=(8, 12))
    batch = framed(task, [(8, 8)])
    members = [task.predict(logits_of(1, (8, 12), seed), batch) for seed in (0, 1)]
    columns = task.to_columns(task.fuse(members), batch)
    each = torch.stack([member.probabilities[0, :, :, 2:10] for member in members]).double()
    pool = each.mean(0)
    total = -(pool * pool.log()).sum(0)
    mutual = total + (each * each.log()).sum(1).mean(0)
    mask = torch.from_numpy(_unpacked(columns["mask"][0], 8, 8).copy())
    assert [row["label"] for row in columns["classes"][0]] == mask.unique().tolist()
    assert sum(row["area_fraction"] for row in columns["classes"][0]) == pytest.approx(1)
    for row in columns["classes"][0]:
        here = mask == row["label"]
        assert row["area_fraction"] == pytest.approx(here.double().mean().item())
        assert row["probability"] == pytest.approx(pool.amax(0)[here].mean().item(), rel=1e-5)
        assert row["entropy"] == pytest.approx(total[here].mean().item(), rel=1e-5)
        assert row["mutual_information"] == pytest.approx(mutual[here].mean().item(), abs=1e-6)


def test_one_class_only_is_certain():
    task = segmentation(size=(8, 12), classes=["all"], background=None)
    batch = framed(task, [(8, 12)])
    columns = task.to_columns(task.fuse([task.predict(torch.zeros(1, 1, 8, 12), batch)]), batch)
    assert columns["uncertainty"] == [0]
    assert _unpacked(columns["uncertainty_map"][0], 2, 3).max() == 0


def test_segmentation_is_measured_at_the_images_own_size():
    task = segmentation(size=(16, 24))
    masks = [random_mask(32, 48, 0), random_mask(16, 24, 1), None]
    sizes = [(32, 48), (16, 24), (16, 24)]
    packed = [None if mask is None else schema.pack_map(mask.tobytes()) for mask in masks]
    table = table_of(sizes, mask=packed)
    batch, _ = task.collate(table, train=False, seed=0)
    prediction = task.predict(logits_of(3, (16, 24), 0), batch)
    metric, pool = task.metric(), task.metric()
    task.update_metric(prediction, batch, table, metric)
    task.update_metric(task.fuse([prediction, prediction]), batch, table, pool)
    got = metric.compute()
    assert got == pool.compute()
    assert got["images"] == 2
    assert got["pixels"] == sum(int((mask != 255).sum()) for mask in masks if mask is not None)
    columns = task.to_columns(task.fuse([prediction]), batch)
    hits = 0
    for packed, mask in zip(columns["mask"], masks, strict=True):
        hits += 0 if mask is None else int((_unpacked(packed, *mask.shape) == mask).sum())
    assert got["accuracy"] == pytest.approx(hits / got["pixels"])
    with pytest.raises(InputError, match="no column 'mask': metrics of segmentation need"):
        task.update_metric(prediction, batch, table.drop_columns(["mask"]), metric)


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(2, 4), st.sampled_from([0.5, 5.0, 60.0]))
def test_pool_is_never_worse_than_the_mean_member(seed, members, sharpness):
    task = segmentation(size=(8, 12))
    table = table_of(
        [(8, 12), (16, 16)], mask=[schema.pack_map(random_mask(*s).tobytes()) for s in [(8, 12), (16, 16)]]
    )
    batch, _ = task.collate(table, train=False, seed=0)
    predictions = [task.predict(logits_of(2, (8, 12), seed + m, sharpness), batch) for m in range(members)]
    figures = []
    for predicted in [*predictions, task.fuse(predictions)]:
        metric = task.metric()
        task.update_metric(predicted, batch, table, metric)
        figures.append(metric.compute())
    for name in ("nll", "brier"):
        mean = np.mean([each[name] for each in figures[:-1]])
        assert figures[-1][name] <= mean * (1 + 1e-5) + 1e-9
