"""How long optimiser steps take, and how long of it they wait for data: by the host's clock, or the GPU's own."""

import time
from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

import torch


class StepTimer:
    """Times the steps of a loop.

    On a CPU a step waits while the loop asks for its data: decoding that is ahead of it costs nothing, augmentation in
    the loop's own thread does. On a GPU the host runs ahead, and its waits say little: an event before the data is
    asked for and one behind its arrival mark how long the compute stream stood still between two steps. They are read
    once they have passed, so nothing waits for them.

    Args:
        device: Where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._open: deque[tuple[Any, Any]] = deque()
        self._waited = 0.0
        self._images, self._seconds = 0, 0.0
        self._began = time.monotonic()

    def timed(self, items: Iterable[Any]) -> Generator[Any, None, None]:
        """The items, with the wait for each of them measured."""
        source = iter(items)
        while True:
            self._began, before = time.monotonic(), self._event()
            try:
                item = next(source)
            except StopIteration:
                return
            if before is None:
                self._waited += time.monotonic() - self._began
            else:
                self._open.append((before, self._event()))
            yield item

    def finish_step(self, images: int) -> float:
        """A step of ``images`` images has ended: seconds since its data was asked for."""
        seconds = time.monotonic() - self._began
        self._images, self._seconds = self._images + images, self._seconds + seconds
        return seconds

    def take_wait_s(self) -> float:
        """Seconds of waiting that became known since the last time this was asked."""
        while self._open and self._open[0][1].query():
            before, after = self._open.popleft()
            self._waited += before.elapsed_time(after) / 1000
        waited, self._waited = self._waited, 0.0
        return waited

    def take_images_per_s(self) -> float:
        """Images a second over the steps since the last time this was asked; what lies between steps does not count."""
        rate = self._images / self._seconds if self._seconds > 0 else 0.0
        self._images, self._seconds = 0, 0.0
        return rate

    def _event(self) -> Any:
        if self._device is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
