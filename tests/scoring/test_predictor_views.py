"""Views, dropout passes and windows as further members of the pool."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.schema import pack_map, unpack_map
from pipeline.scoring.predictor import Predictor
from pipeline.tasks.pooled_maps import Prediction
from pipeline.uncertainty.tta import TtaSettings, tta_views
from tests.support.tiny import DETECTOR, INPUT, UNET, encode, make_bundle, png, table

CROP = {**INPUT, "fit": "crop"}
DROPOUT = {**UNET, "dropout": 0.4}


def predictor(folder: Path, model: dict[str, Any] = UNET, seeds: tuple[int, ...] = (0, 1), **changes: Any) -> Predictor:
    return Predictor(make_bundle(folder, model, seeds=seeds, **changes), "cpu", threads=1)


def probabilities(made: Predictor, images: torch.Tensor) -> torch.Tensor:
    return made.members[0](images).softmax(1)


def test_views_are_pooled_where_they_belong(tmp_path: Path):
    predict = {"tta": {"flips": True, "turns": True}}
    made = predictor(tmp_path, seeds=(5,), predict=predict)
    rows = table([png(32, 32, 0)])
    (row,) = made(rows).to_pylist()
    assert row["members"] == 8
    assert row["mutual_information_mean"] > 0
    batch, _ = made.task.collate(rows, train=False, seed=0)
    images = made._normalise(batch).images
    with torch.inference_mode():
        each = [
            view.invert(made.members[0](view.apply(images, made.forward.stride)), (32, 32)).softmax(1)
            for view in tta_views(TtaSettings.parse(predict["tta"], "x"))
        ]
    pool = made.task.fuse([Prediction(one) for one in each])
    wanted = made.task.to_columns(pool, batch)
    assert row["entropy_mean"] == pytest.approx(wanted["entropy_mean"][0], rel=1e-5)
    assert row["mask"] == wanted["mask"][0]


def test_the_answer_turns_with_the_image_when_all_symmetries_are_pooled(tmp_path: Path):
    made = predictor(tmp_path, predict={"tta": {"flips": True, "turns": True}, "map_scale": 1})
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    plain, turned = made(table([encode(pixels), encode(np.rot90(pixels).copy())])).to_pylist()
    a, b = (
        np.frombuffer(unpack_map(row["confidence_map"], 32, 32), np.uint8).reshape(32, 32) for row in (plain, turned)
    )
    assert np.abs(np.rot90(a).astype(int) - b).max() <= 1


def test_dropout_passes_are_members_that_come_out_the_same_each_time(tmp_path: Path):
    made = predictor(tmp_path, DROPOUT, predict={"dropout_passes": 6})
    rows = table([png(32, 32, 0)])
    first, again = made(rows).to_pylist(), made(rows).to_pylist()
    assert first == again
    assert first[0]["members"] == 12
    assert first[0]["mutual_information_mean"] > 0
    assert not any(
        type(layer).__name__.startswith("BatchNorm") and layer.training for layer in made.members[0].modules()
    )
    plain = predictor(tmp_path / "plain", DROPOUT, seeds=(0,))(rows).to_pylist()
    assert plain[0]["mutual_information_mean"] == pytest.approx(0, abs=1e-6)


def test_dropout_passes_of_a_model_without_dropout(tmp_path: Path):
    with pytest.raises(InputError, match=r"dropout_passes is 3, but its model has no dropout"):
        predictor(tmp_path, predict={"dropout_passes": 3})


def test_a_members_own_figures_are_those_of_its_mean(tmp_path: Path):
    rows = table([png(32, 32, 0)], mask=[pack_map(bytes(32 * 32))], height=[32], width=[32])
    predict = {"tta": {"flips": True}}
    both, alone = (predictor(tmp_path / str(seeds), seeds=seeds, predict=predict) for seeds in ((0, 1), (0,)))
    meters, single = both.measure(rows)[1].compute(), alone.measure(rows)[1].compute()
    assert len(meters["members"]) == 2
    assert meters["members"][0]["nll"] == pytest.approx(single["nll"], rel=1e-6)
    assert single["members"][0]["nll"] == pytest.approx(single["nll"], rel=1e-6)


def test_large_images_go_through_windows_at_their_own_size(tmp_path: Path):
    rows = table([png(100, 70, 0)])
    asked: list[tuple[int, ...]] = []
    made = {}
    for windows in ("never", "always"):
        made[windows] = predictor(tmp_path / windows, seeds=(0,), input=CROP, predict={"windows": windows})
        made[windows].members[0].register_forward_pre_hook(lambda _, args: asked.append(tuple(args[0].shape)))
    whole, seen = (made[windows](rows).to_pylist()[0] for windows in ("never", "always"))
    assert asked[0] == (1, 3, 128, 96)
    assert set(shape[-2:] for shape in asked[1:]) == {(32, 32)}
    a, b = (np.frombuffer(unpack_map(row["mask"], 100, 70), np.uint8) for row in (whole, seen))
    assert (seen["height"], seen["width"]) == (100, 70)
    assert (a != b).mean() < 0.05


def test_memory_of_the_pool_does_not_grow_with_its_members(tmp_path: Path):
    """At most two predictions are alive at a time; of the others only uint8 maps are left."""
    import gc
    import weakref

    made = predictor(tmp_path, seeds=(0, 1, 2, 3, 4, 5))
    alive: list[weakref.ref[Prediction]] = []
    most = 0
    original = made.task.predict

    def watched(*arguments: Any) -> Prediction:
        nonlocal most
        prediction = original(*arguments)
        alive.append(weakref.ref(prediction))
        gc.collect()
        most = max(most, sum(one() is not None for one in alive))
        return prediction

    made.task.predict = watched  # pyright: ignore[reportAttributeAccessIssue]
    made(table([png(32, 32, 0)]))
    assert len(alive) == 6
    assert most <= 2
    rows = table([png(32, 32, 0)], mask=[pack_map(bytes(32 * 32))], height=[32], width=[32])
    most = 0
    made.measure(rows)
    assert len(alive) == 12
    assert most <= 2


def _turned(box: dict[str, Any], width: int) -> list[float]:
    """Edges of a box after a quarter turn counter-clockwise of an image ``width`` wide."""
    return [box["y1"], width - box["x2"], box["y2"], width - box["x1"]]


def test_boxes_turn_with_the_image_when_all_symmetries_are_pooled(tmp_path: Path):
    predict = {"tta": {"flips": True, "turns": True}, "score_threshold": 0.0, "nms_iou": 1.0, "max_boxes": 1000}
    made = predictor(tmp_path, DETECTOR, seeds=(5,), predict=predict)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    plain, turned = made(table([encode(pixels), encode(np.rot90(pixels).copy())])).to_pylist()
    assert plain["members"] == 8
    assert len(plain["boxes"]) == len(turned["boxes"]) > 4
    assert turned["entropy_sum"] == pytest.approx(plain["entropy_sum"], rel=1e-4)
    wanted = sorted([*_turned(box, 32), box["score"]] for box in plain["boxes"])
    found = sorted([box["x1"], box["y1"], box["x2"], box["y2"], box["score"]] for box in turned["boxes"])
    assert np.abs(np.array(wanted) - np.array(found)).max() < 1e-2
    assert max(box["std_x1"] for box in plain["boxes"]) > 0


def test_views_of_other_sizes_are_clustered(tmp_path: Path):
    predict = {"tta": {"scales": [1.0, 0.5]}, "score_threshold": 0.0, "nms_iou": 1.0}
    (row,) = predictor(tmp_path, DETECTOR, seeds=(5,), predict=predict)(table([png(64, 64, 0)])).to_pylist()
    assert row["members"] == 2
    assert row["boxes"]
    assert {box["votes"] for box in row["boxes"]} <= {1, 2}


def test_dropout_passes_of_a_detector(tmp_path: Path):
    made = predictor(tmp_path, {**DETECTOR, "dropout": 0.4}, predict={"dropout_passes": 4, "score_threshold": 0.0})
    (row,) = made(table([png(32, 32, 0)])).to_pylist()
    assert row["members"] == 8
    assert row["mutual_information_sum"] > 0
    assert (row,) == tuple(made(table([png(32, 32, 0)])).to_pylist())
