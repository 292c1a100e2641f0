"""Memory that is used again: never while anybody refers to it."""

import gc
import threading

import numpy as np
import torch

from pipeline.images.buffer_pool import MIN_POOLED_BYTES, Buffers


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_comes_back_once_nobody_refers_to_it():
    buffers = Buffers()
    first = buffers.take(300, 400, 3)
    where = address(first)
    assert first.shape == (300, 400, 3)
    assert first.dtype == np.uint8
    assert first.flags["C_CONTIGUOUS"]
    second = buffers.take(300, 400, 3)
    assert address(second) != where
    del first
    assert address(buffers.take(300, 399, 3)) == where  # of nearly one size, too
    assert buffers.held == 2 * 2**18 * 1.5


def test_views_slices_and_tensors_keep_it():
    for keep in (
        lambda array: array[10:20, ::2],
        lambda array: torch.from_numpy(array).permute(2, 0, 1)[None, :, :5],
        lambda array: memoryview(array),
        lambda array: torch.from_numpy(array).view(-1)[:3].numpy(),
    ):
        buffers = Buffers()
        array = buffers.take(256, 256, 3)
        where, kept = address(array), keep(array)
        del array
        gc.collect()
        other = buffers.take(256, 256, 3)
        assert address(other) != where
        del kept
        gc.collect()
        assert address(buffers.take(256, 256, 3)) == where


def test_what_is_kept_is_bounded_and_small_arrays_are_ordinary():
    buffers = Buffers(most=2**20)
    arrays = [buffers.take(2**19) for _ in range(5)]
    assert buffers.held == 2**20
    assert len({address(array) for array in arrays}) == 5
    assert Buffers().take(MIN_POOLED_BYTES - 1).shape == (MIN_POOLED_BYTES - 1,)
    small = Buffers()
    small.take(10, 10)
    assert small.held == 0
    assert small.take(0, 5).shape == (0, 5)


def test_threads_never_share_memory():
    buffers, wrong = Buffers(), []

    def work(number: int) -> None:
        for _ in range(200):
            array = buffers.take(2**16)
            array[:] = number
            if not (array == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # Each thread holds its last array until it has the next.
    assert buffers.held <= 2 * 4 * 2**16
