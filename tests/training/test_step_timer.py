"""Waits and rates of steps: on a clock of the test's own, and on a GPU where there is one."""

import time
from collections.abc import Iterator

import pytest
import torch

from pipeline.training import step_timer
from pipeline.training.step_timer import StepTimer

CPU = torch.device("cpu")


class Clock:
    """A time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(step_timer, "time", made)
    return made


def feed(clock: Clock, seconds: list[float]) -> Iterator[int]:
    for n, each in enumerate(seconds):
        clock.sleep(each)
        yield n


def test_on_a_cpu_what_the_feed_takes_is_waiting_and_the_work_is_not(clock: Clock):
    timed, waited, seconds = StepTimer(CPU), [], []
    for _ in timed.timed(feed(clock, [4, 0, 1])):
        clock.sleep(2)
        seconds.append(timed.finish_step(8))
        waited.append(timed.take_wait_s())
    assert waited == [4, 0, 1]
    assert seconds == [6, 2, 3]
    assert timed.take_images_per_s() == 24 / 11
    assert timed.take_images_per_s() == 0.0, "a rate is of the steps since the last one"


def test_what_lies_between_steps_counts_for_neither(clock: Clock):
    timed = StepTimer(CPU)
    for _ in timed.timed(range(3)):
        clock.sleep(1)
        timed.finish_step(5)
        clock.sleep(60)  # a look
    assert timed.take_wait_s() == 0.0
    assert timed.take_images_per_s() == 5.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("feed_s", "least", "most"), [(0.0, 0.0, 0.05), (0.1, 0.4, 0.7)])
def test_on_a_gpu_the_wait_is_that_of_the_stream_not_of_the_host(feed_s: float, least: float, most: float):
    work = torch.randn(4096, 4096, device="cuda")

    def slow() -> Iterator[int]:
        for n in range(6):
            time.sleep(feed_s)
            yield n

    for _ in range(3):
        work @ work
    torch.cuda.synchronize()
    timed, total = StepTimer(torch.device("cuda")), 0.0
    for _ in timed.timed(slow()):
        for _ in range(5):
            work @ work
        timed.finish_step(1)
        total += timed.take_wait_s()
    torch.cuda.synchronize()
    assert least <= total + timed.take_wait_s() <= most
