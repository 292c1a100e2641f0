"""The batch grows no further than memory allows."""

import math

import pytest
import torch

from pipeline.scoring import batch_size
from pipeline.scoring.batch_size import BatchSize

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_pixels_on_a_cpu_are_bounded_by_the_budget_and_by_free_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_size, "free_memory", lambda: math.inf)
    size = BatchSize(CPU)
    assert [size.images(512, 512), size.images(256, 256), size.images(8, 8), size.images(9999, 9999)] == [1, 4, 256, 1]
    monkeypatch.setattr(batch_size, "free_memory", lambda: 2.0**30)
    # 0.6 GiB of 4 KiB a pixel: 157,286 pixels; two calls at a time have half of it each.
    assert BatchSize(CPU).images(128, 128) == 9
    assert BatchSize(CPU, calls=2).images(128, 128) == 4


def test_a_gpu_begins_small_and_then_takes_what_fits():
    size = BatchSize(CUDA)
    assert size.images(512, 512) == batch_size.FIRST_IMAGES
    # 1,000 bytes a pixel, of which 60 % of 4e9 bytes hold 2.4 million: 9 images of 262,144.
    size.set_from_measurement(4 * 512 * 512, 4 * 512 * 512 * 1000, 4 * 10**9)
    assert (size.measured, size.images(512, 512), size.images(256, 256)) == (True, 9, 36)
    size.set_from_measurement(4 * 512 * 512, 1, 1)  # once is enough
    assert size.images(512, 512) == 9
    roomy = BatchSize(CUDA)
    roomy.set_from_measurement(100, 100, 10**15)
    assert roomy.images(512, 512) == 64


def test_what_did_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    size = BatchSize(CUDA)
    size.set_from_measurement(100, 100, 10**15)
    for wanted in (32, 16, 8, 4, 2, 1, 1):
        size.halve(size.images(512, 512) * 512 * 512)
        assert size.images(512, 512) == wanted


def test_a_set_size_is_kept_unless_it_does_not_fit():
    size = BatchSize(CPU, 12)
    assert size.measured
    assert [size.images(4096, 4096), size.images(8, 8)] == [12, 12]
    size.halve(12 * 64 * 64)
    assert [size.images(64, 64), size.images(8, 8)] == [6, 12]


def test_free_memory_is_that_of_a_real_machine():
    assert 2**24 < batch_size.free_memory() < 2**50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_first_batch_is_measured():
    size = BatchSize(CUDA)
    with batch_size.MeasurePeakMemory(size, 1000):
        held = torch.zeros(2**20, device="cuda")
        del held
    free = torch.cuda.mem_get_info()[0]
    assert size.measured
    assert size.images(1, 1) == batch_size.IMAGES_AT_ONCE
    assert size.images(1, 1000) <= max(1, free * 1000 // 2**22)
