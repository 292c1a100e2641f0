"""Predictor: one row out for each row in, whatever the images are."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.errors import InputError
from pipeline.schema import PREDICTIONS, pack_map, unpack_map
from pipeline.scoring import member_forward
from pipeline.scoring.batch_size import BatchSize
from pipeline.scoring.ensemble_metrics import EnsembleMetrics
from pipeline.scoring.predictor import Predictor
from tests.support.tiny import DETECTOR, INPUT, UNET, encode, make_bundle, png, table

MODELS = [UNET, DETECTOR]
by_model = pytest.mark.parametrize("model", MODELS, ids=["unet", "anchor_free"])
CROP = {**INPUT, "fit": "crop"}


def jpeg_turned(height: int, width: int) -> bytes:
    """Stored height x width, with an EXIF tag that turns it."""
    image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif)
    return out.getvalue()


@by_model
def test_one_row_an_image_in_the_order_of_the_input(tmp_path: Path, model: dict[str, Any]):
    predictor = Predictor(make_bundle(tmp_path, model), "cpu", threads=1)
    images = [png(20, 30, 0), b"no image", png(40, 24, 1), None, png(20, 30, 2), jpeg_turned(16, 48)]
    out = predictor(table(images))
    assert out.schema == PREDICTIONS[predictor.bundle.task]
    assert out["image_id"].to_pylist() == [f"image{n}.png" for n in range(6)]
    assert out["status"].to_pylist() == ["ok", "corrupt", "ok", "missing", "ok", "ok"]
    assert out["height"].to_pylist() == [20, None, 40, None, 20, 48]
    assert out["width"].to_pylist() == [30, None, 24, None, 30, 16]
    assert set(out["bundle_id"].to_pylist()) == {predictor.bundle.id}
    assert set(out["members"].to_pylist()) == {2}
    assert [error is None for error in out["error"].to_pylist()] == [True, False, True, False, True, True]
    payload = out["mask"] if model is UNET else out["boxes"]
    assert [value.is_valid for value in payload] == [True, False, True, False, True, True]
    assert [value.is_valid for value in out["uncertainty"]] == [True, False, True, False, True, True]
    if model is UNET:
        assert len(unpack_map(out["mask"][5].as_py(), 48, 16)) == 48 * 16


@by_model
def test_a_row_does_not_depend_on_its_neighbours(tmp_path: Path, model: dict[str, Any]):
    predictor = Predictor(make_bundle(tmp_path, model), "cpu", threads=2)
    images = [png(20 + n, 30, n) for n in range(5)]
    together = predictor(table(images)).to_pylist()
    for n, image in enumerate(images):
        (alone,) = predictor(table([image])).to_pylist()
        assert alone["uncertainty"] == pytest.approx(together[n]["uncertainty"], rel=1e-5)
        if model is UNET:
            assert alone["mask"] == together[n]["mask"]


def test_native_size_images_are_grouped_by_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    predictor = Predictor(make_bundle(tmp_path, UNET, input=CROP), "cpu", threads=1)
    seen: list[tuple[int, ...]] = []
    collate = predictor.task.collate

    def watched(*args: Any, **more: Any) -> Any:
        batch, failures = collate(*args, **more)
        seen.append(tuple(batch.images.shape))
        return batch, failures

    monkeypatch.setattr(predictor.task, "collate", watched)
    sizes = [(40, 40), (100, 70), (42, 44), (100, 70)]
    out = predictor(table([png(*size, n) for n, size in enumerate(sizes)]))
    assert list(zip(out["height"].to_pylist(), out["width"].to_pylist(), strict=True)) == sizes
    assert sorted(shape[0] for shape in seen) == [2, 2]
    predictor.size = BatchSize(torch.device("cpu"), 1)
    seen.clear()
    again = predictor(table([png(*size, n) for n, size in enumerate(sizes)]))
    assert [shape[0] for shape in seen] == [1, 1, 1, 1]
    assert again["mask"].to_pylist() == out["mask"].to_pylist()


class Chokes(nn.Module):
    """Works until it meets a batch with an image that is almost black."""

    def __init__(self, inner: nn.Module, error: Exception | None = None) -> None:
        super().__init__()
        self.inner, self.calls, self.stride = inner, 0, inner.stride
        self.error = error or RuntimeError("too dark")

    def forward(self, images: torch.Tensor) -> Any:
        self.calls += 1
        if images.flatten(1).mean(1).min() < -1.5:
            raise self.error
        return self.inner(images)


@by_model
def test_an_image_that_the_model_chokes_on_costs_its_own_row_alone(tmp_path: Path, model: dict[str, Any]):
    predictor = Predictor(make_bundle(tmp_path, model), "cpu", threads=1)
    predictor.members[1] = Chokes(predictor.members[1])
    dark = encode(np.zeros((32, 32, 3), np.uint8))
    out = predictor(table([png(32, 32, 0), dark, png(32, 32, 1), png(32, 32, 2)]))
    assert out["status"].to_pylist() == ["ok", "error", "ok", "ok"]
    assert out["error"][1].as_py() == "RuntimeError: too dark"


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
]  # fmt: skip


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_does_not_do_for_one_frame_ends_the_job(tmp_path: Path, error: Exception):
    predictor = Predictor(make_bundle(tmp_path, UNET), "cpu", threads=1)
    predictor.members[1] = Chokes(predictor.members[1], error)
    dark = encode(np.zeros((32, 32, 3), np.uint8))
    assert predictor(table([png(32, 32, 0)]))["status"].to_pylist() == ["ok"]
    with pytest.raises(InputError, match="image 'image1.png': one image of 32x32 does not fit into the memory"):
        predictor(table([png(32, 32, 0), dark]))


def test_a_model_that_never_worked_is_no_matter_of_rows(tmp_path: Path):
    uri = make_bundle(tmp_path, UNET)
    predictor = Predictor(uri, "cpu", threads=1)
    predictor.members[0] = Chokes(predictor.members[0])
    dark = encode(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(RuntimeError, match="too dark"):
        predictor(table([dark, dark]))


def test_words_of_the_reader_are_kept(tmp_path: Path):
    predictor = Predictor(make_bundle(tmp_path, UNET), "cpu", threads=1)
    rows = table([png(8, 8, 0), None], status=["ok", "forbidden"], error=[None, "403"])
    out = predictor(rows)
    assert out["status"].to_pylist() == ["ok", "forbidden"]
    assert out["error"].to_pylist() == [None, "403"]


def test_the_threshold_decides(tmp_path: Path):
    images = table([png(32, 32, n) for n in range(6)] + [b"?"])
    free = Predictor(make_bundle(tmp_path / "free", UNET), "cpu", threads=1)(images)
    assert set(free["decision"].to_pylist()) == {None}
    scores = free["uncertainty"].to_pylist()
    middle = sorted(scores[:-1])[2]
    bound = Predictor(make_bundle(tmp_path / "bound", UNET, threshold={"value": middle}), "cpu", threads=1)(images)
    wanted = ["accept" if score <= middle else "review" for score in scores[:-1]]
    assert set(wanted) == {"accept", "review"}
    assert bound["decision"].to_pylist() == [*wanted, None]
    nothing = Predictor(make_bundle(tmp_path / "none", UNET, threshold={"value": None}), "cpu", threads=1)(images)
    assert nothing["decision"].to_pylist() == ["review"] * 6 + [None]


def truth(seeds: list[int]) -> pa.Table:
    """32 x 32 images with the left half of class 0, and a box around it."""
    mask = np.ones((32, 32), np.uint8)
    mask[:, :16] = 0
    box = {"x1": 0.0, "y1": 0.0, "x2": 16.0, "y2": 32.0, "label": 0, "crowd": False, "instance": 1}
    count = len(seeds)
    labels = {"mask": [pack_map(mask.tobytes())] * count, "boxes": [[box]] * count}
    sizes = {"height": [32] * count, "width": [32] * count}
    return table([png(32, 32, seed) for seed in seeds], **labels, **sizes)


@by_model
def test_metrics_add_up_over_tables_and_cross_process_borders(tmp_path: Path, model: dict[str, Any]):
    predictor = Predictor(make_bundle(tmp_path, model), "cpu", threads=1)
    whole, meters = predictor.measure(truth([0, 1, 2, 3]))
    assert whole.to_pylist() == predictor(truth([0, 1, 2, 3])).to_pylist()
    parts = [predictor.measure(truth(seeds))[1] for seeds in ([0, 1, 2], [3])]
    total, rest = (
        EnsembleMetrics.from_bytes(part.to_bytes(), part.pool, predictor.task.new_calibration_sample())
        for part in parts
    )
    total.merge(rest)
    found, wanted = total.compute(), meters.compute()
    assert wanted["images"] == 4
    assert len(wanted["members"]) == 2
    key = "nll" if model is UNET else "map"
    assert found[key] == pytest.approx(wanted[key], rel=1e-6)
    for mine, other in zip(found["members"], wanted["members"], strict=True):
        assert mine[key] == pytest.approx(other[key], rel=1e-6)


def test_the_pool_is_measured_as_what_is_written(tmp_path: Path):
    predictor = Predictor(make_bundle(tmp_path, UNET), "cpu", threads=1)
    rows = truth([0, 1])
    out, meters = predictor.measure(rows)
    said = np.stack([np.frombuffer(unpack_map(row, 32, 32), np.uint8) for row in out["mask"].to_pylist()])
    true = np.stack([np.frombuffer(unpack_map(row, 32, 32), np.uint8) for row in rows["mask"].to_pylist()])
    assert meters.compute()["accuracy"] == pytest.approx((said == true).mean(), abs=1e-9)


def test_a_failed_batch_is_measured_once(tmp_path: Path):
    predictor = Predictor(make_bundle(tmp_path, UNET), "cpu", threads=1)
    predictor.members[1] = Chokes(predictor.members[1])
    rows = truth([0, 1, 2])
    rows = rows.set_column(
        3, "image", pa.array([png(32, 32, 0), encode(np.zeros((32, 32, 3), np.uint8)), png(32, 32, 2)])
    )
    _, meters = predictor.measure(rows)
    assert [meters.compute()["images"], *(part["images"] for part in meters.compute()["members"])] == [
        2,
        2,
        2,
    ]


def test_equal_members_have_no_mutual_information(tmp_path: Path):
    one = Predictor(make_bundle(tmp_path / "one", UNET, seeds=(3,)), "cpu", threads=1)
    three = Predictor(make_bundle(tmp_path / "three", UNET, seeds=(3, 3, 3)), "cpu", threads=1)
    rows = table([png(32, 32, 0)])
    (alone,), (pooled,) = one(rows).to_pylist(), three(rows).to_pylist()
    assert pooled["mask"] == alone["mask"]
    assert pooled["entropy_mean"] == pytest.approx(alone["entropy_mean"], rel=1e-5)
    assert pooled["mutual_information_mean"] == pytest.approx(0, abs=1e-6)


def test_a_missing_bundle(tmp_path: Path):
    with pytest.raises(InputError, match="bundle manifest .* not found"):
        Predictor(str(tmp_path / "none"))


@by_model
def test_threads_beside_one_another_say_what_one_says(tmp_path: Path, model: dict[str, Any]):
    predictor = Predictor(make_bundle(tmp_path, model), "cpu", threads=1, calls=3)
    tables = [table([png(20 + n, 30, n), b"no image", png(32, 32, n + 9)]) for n in range(6)]
    wanted = [predictor(rows).to_pylist() for rows in tables]
    with ThreadPoolExecutor(3) as pool:
        assert [rows.to_pylist() for rows in pool.map(predictor, tables)] == wanted


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_members_alone_run_in_half_precision(tmp_path: Path, precision: Any, dtype: torch.dtype):
    predictor = Predictor(make_bundle(tmp_path, UNET), "cpu", threads=1, precision=precision)
    said: list[torch.Tensor] = []
    for module in predictor.members:
        module.register_forward_hook(lambda _, given, logits: said.append(logits))  # pyright: ignore[reportArgumentType]
    out = predictor(table([png(32, 32, n) for n in range(3)]))
    assert [logits.dtype for logits in said] == [dtype, dtype]
    pool = torch.stack([logits.float().softmax(1) for logits in said]).mean(0)
    wanted = torch.special.entr(pool).sum(1).mean((1, 2)).tolist()
    assert out["entropy_mean"].to_pylist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("fit", "times"), [("letterbox", 4), ("crop", 0)])
def test_full_batches_run_compiled_and_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: str, times: int
):
    calls: list[int] = []

    class Counted:
        def __init__(self, module: nn.Module) -> None:
            self.module = module

        def __call__(self, images: torch.Tensor) -> Any:
            calls.append(len(images))
            return self.module(images)

    monkeypatch.setattr(member_forward, "Compiled", Counted)
    uri = make_bundle(tmp_path, UNET, input={**INPUT, "fit": fit})
    rows = table([png(32, 32, n) for n in range(5)])
    made = Predictor(uri, "cpu", threads=1, batch=2, compile=True)(rows)
    assert calls == [2] * times
    assert made.to_pylist() == Predictor(uri, "cpu", threads=1, batch=2)(rows).to_pylist()


def test_a_batch_that_did_not_fit_makes_the_next_smaller(tmp_path: Path):
    class Full(nn.Module):
        stride = 32

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.seen = inner, []

        def forward(self, images: torch.Tensor) -> Any:
            self.seen.append(len(images))
            if len(images) > 2:
                raise torch.OutOfMemoryError("full")
            return self.inner(images)

    predictor = Predictor(make_bundle(tmp_path, UNET, seeds=(0,)), "cpu", threads=1, batch=8)
    predictor.members[0] = full = Full(predictor.members[0])
    out = predictor(table([png(32, 32, n) for n in range(12)]))
    assert set(out["status"].to_pylist()) == {"ok"}
    assert full.seen == [8, 4, 2, 2, 4, 2, 2, 2, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@by_model
def test_a_gpu_says_what_the_cpu_says(tmp_path: Path, model: dict[str, Any]):
    uri = make_bundle(tmp_path, model)
    rows = table([png(20 + n, 30, n) for n in range(5)])
    host, device = Predictor(uri, "cpu")(rows), Predictor(uri, "cuda", precision="float32")(rows)
    for a, b in zip(host["uncertainty"].to_pylist(), device["uncertainty"].to_pylist(), strict=True):
        assert a == pytest.approx(b, rel=1e-2)
