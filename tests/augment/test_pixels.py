"""Warp, colour and normalisation as tensors: layouts, chunks, what a GPU would run, and that nothing waits for it."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import affine_grid
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.augment import PRESETS, Augment, AugmentSettings, effects, pixels
from pipeline.augment.colour import apply_colour, by_planes
from pipeline.images.batch import Batch
from pipeline.images.input_settings import InputSettings
from tests.support.augment_cases import EVERYTHING, make_batch

MIXED = EVERYTHING.model_copy(update={"mosaic": 0.5, "blur": 0.0})
KINDS = {
    "nothing": AugmentSettings(),
    "colours": AugmentSettings(brightness=0.1, hue=0.1),
    "natural": PRESETS["natural"],
    "everything": EVERYTHING,
    "mosaics": MIXED,
    "mix-up": MIXED.model_copy(update={"mixup": 0.5}),
}


def case(name: str, count: int = 8) -> tuple[Batch, InputSettings]:
    batch, input = make_batch(count, (24, 32), "crop", image_hw=(40, 50))
    if name == "mix-up":
        batch.masks = None
    return batch, input


def same(one: Batch, other: Batch, atol: float = 1e-4):
    for field in dataclasses.fields(one):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if isinstance(first, Tensor):
            torch.testing.assert_close(first.cpu(), second.cpu(), atol=atol, rtol=0, msg=field.name)


@settings(max_examples=30)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 100))
def test_grid_is_that_of_affine_grid(height: int, width: int, seed: int):
    theta = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 2, 3))).float()
    expected = affine_grid(theta, [3, 1, height, width], align_corners=False)
    torch.testing.assert_close(pixels.sampling_grid(theta, (height, width)), expected, atol=1e-5, rtol=0)
    # On a device that computes nothing, for the way that other devices go.
    assert pixels.sampling_grid(theta.to("meta"), (height, width)).shape == expected.shape


def test_colour_by_planes_is_the_matrix_product():
    random = torch.Generator().manual_seed(0)
    images, matrix = (torch.randn(*shape, generator=random) for shape in ((4, 3, 9, 7), (4, 3, 3)))
    offset, low, high = torch.randn(4, 3, generator=random), torch.tensor([-1.0, -2, -3]), torch.tensor([1.0, 0.5, 2])
    given = images, matrix, offset, low, high
    expected = torch.einsum("nij,njhw->nihw", matrix, images) + offset[..., None, None]
    expected = torch.minimum(torch.maximum(expected, low[:, None, None]), high[:, None, None])
    torch.testing.assert_close(apply_colour(*given), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_planes(*given), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["natural", "colours", "nothing", "evaluation"])
def test_layout_of_the_canvases_does_not_matter(name: str):
    batch, input = case(name)
    last = dataclasses.replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
    first = dataclasses.replace(batch, images=batch.images.contiguous())
    augment = Augment(KINDS.get(name), input, 3)
    out, expected = augment(last), augment(first)
    same(out, expected, 1e-6)
    # A network in channels last gets its images so for nothing.
    assert out.images.is_contiguous(memory_format=torch.channels_last) == (name in ("nothing", "evaluation"))


@pytest.mark.parametrize("threads", [2, 3])
def test_chunks_give_what_the_whole_batch_gives(threads: int, monkeypatch: pytest.MonkeyPatch):
    batch, input = case("natural")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    parts = Augment(EVERYTHING, input, 3)(batch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: len(batch))
    same(parts, Augment(EVERYTHING, input, 3)(batch), 1e-6)


def test_numbers_arrive_as_they_were():
    values = {"a": np.arange(6).reshape(2, 3), "none": np.zeros(0, np.int64), "b": np.array([True, False])}
    sent = pixels.copy_to_device(values | {"key": np.array([2**32 - 1])}, torch.device("cpu"))
    assert sent["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert sent["none"].shape == (0,)
    assert sent["b"].tolist() == [1, 0]
    assert sent["key"].tolist() == [2**32 - 1]
    assert pixels.copy_to_device({}, torch.device("cpu")) == {}


@pytest.mark.parametrize("name", [*KINDS, "evaluation"])
def test_nothing_asks_the_device_for_a_value(name: str):
    """On the meta device tensors have shapes and no values: whoever wants one fails."""
    batch, input = case(name)
    wanted = KINDS.get(name)
    out = Augment(wanted, input, 3)(batch.to("meta"))
    expected = Augment(wanted, input, 3)(batch)
    assert out.images.device.type == "meta"
    assert out.images.shape == expected.images.shape
    assert out.images.dtype == expected.images.dtype
    with pytest.raises(RuntimeError):
        out.images.sum().item()


@pytest.mark.parametrize("name", ["natural", "everything", "mosaics"])
def test_parameters_travel_by_one_copy(name: str):
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and args[0].is_cpu and out.is_meta:
                Copies.count += 1
            return out

    batch, input = case(name)
    augment, moved = Augment(KINDS[name], input, 3), batch.to("meta")
    augment(moved)
    with Copies():
        augment(moved)
    assert Copies.count == 1


def test_whole_batches_with_effects_are_what_rows_are():
    """What a GPU does to all rows at once, against what a CPU does to the rows that want it."""
    batch, input = case("mosaics")
    rows, whole = Augment(MIXED, input, 3), Augment(MIXED, input, 3)
    whole._functions = Plain()
    same(whole(batch), rows(batch), 1e-5)


class Plain(pixels.BatchFunctions):
    """As on a GPU, without a compiler."""

    def __init__(self):
        super().__init__(devices=("cpu",))

    def __call__(self, function, *rows, **shared):
        return function(*rows, **shared)


@pytest.mark.parametrize(
    ("backend", "name"),
    [("aot_eager", name) for name in ("natural", "mosaics", "mix-up")]
    + [pytest.param("inductor", "natural", marks=pytest.mark.long)],
)
def test_compiled_functions_are_the_functions(backend: str, name: str, caplog: pytest.LogCaptureFixture):
    batch, input = case(name)
    augment = Augment(KINDS[name], input, 3)
    augment._functions = pixels.BatchFunctions(backend=backend, devices=("cpu",))
    with caplog.at_level(logging.WARNING, "pipeline.augment"):
        out = augment(batch)
    assert not [record for record in caplog.records if record.name.startswith("pipeline")]
    assert augment._functions.devices
    same(out, Augment(KINDS[name], input, 3)(batch))


def test_where_compiling_fails_the_plain_way_is_taken_with_one_warning(caplog, monkeypatch):
    batch, input = case("natural")
    augment = Augment(EVERYTHING, input, 3)
    augment._functions = pixels.BatchFunctions(devices=("cpu",))

    def broken(function, backend):
        raise RuntimeError("no compiler\nand a long trace")

    monkeypatch.setattr(pixels, "_compiled", broken)
    with caplog.at_level(logging.WARNING, "pipeline.augment"):
        first, second = augment(batch), augment(batch)
    assert [record.message for record in caplog.records] == [
        "augmentation runs uncompiled, and slower, since torch.compile failed: RuntimeError: no compiler"
    ]
    expected = Augment(EVERYTHING, input, 3)(batch)
    same(first, expected, 1e-5)
    same(second, expected, 1e-5)


def test_memory_that_runs_out_is_not_taken_for_a_broken_compiler(monkeypatch):
    def full(function, backend):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(pixels, "_compiled", full)
    with pytest.raises(torch.OutOfMemoryError):
        pixels.BatchFunctions(devices=("cpu",))(lambda x: x, torch.ones(2))


def test_few_shapes_are_compiled(monkeypatch):
    compiled = []

    def counting(function, backend):
        compiled.append(function)
        return function

    monkeypatch.setattr(pixels, "_compiled", counting)
    run = pixels.BatchFunctions(devices=("cpu",))
    for size in [*range(1, 8), 1, 2]:
        assert run(torch.square, torch.full((size,), 3.0)).tolist() == [9] * size
    assert len(compiled) == pixels.MAX_SHAPES + 2
    off = pixels.BatchFunctions(enabled=False, devices=("cpu",))
    off(torch.square, torch.ones(2))
    assert len(compiled) == pixels.MAX_SHAPES + 2


def test_rectangles_of_all_rows_are_erased_at_once():
    images = torch.ones(3, 3, 6, 8)
    out = effects.erase(images, torch.tensor([[1.0, 2, 5, 4], [0, 0, 0, 0], [0, 0, 8, 6]]))
    expected = images.clone()
    expected[0, :, 2:4, 1:5] = 0
    expected[2] = 0
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", [*KINDS, "evaluation"])
def test_on_a_gpu_nothing_waits_and_the_result_is_that_of_the_cpu(name: str, compile: bool):
    batch, input = case(name)
    augment = Augment(KINDS.get(name), input, 3, compile=compile)
    moved = batch.to("cuda")
    augment(moved)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augment(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert augment._functions.devices == (("cuda",) if compile else ())
    expected = Augment(KINDS.get(name), input, 3)(batch)
    torch.testing.assert_close(out.images.cpu(), expected.images, atol=5e-3, rtol=0)  # TF32 in the blur
    if expected.masks is not None and out.masks is not None:
        assert (out.masks.cpu() == expected.masks).float().mean() > 0.999
    torch.testing.assert_close(out.boxes.cpu()[:, : expected.boxes.shape[1]], expected.boxes, atol=1e-3, rtol=0)
