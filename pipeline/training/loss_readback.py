"""Losses on their way from the device to the host, which never waits for the step it has just begun."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

FLAG_DELAY = 2
"""A step's loss is read this many steps later: the device has as many steps to do while the host waits for it."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the images of that step."""

    def __init__(self, message: str, step: int, batches: Any) -> None:
        super().__init__(message)
        self.step = step
        self.batches = batches
        """What the step was given, as the model saw it."""


class PendingLosses:
    """Loss values on their way to the host, read ``FLAG_DELAY`` steps later with the batches they come from."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, Any, list[Any]]] = deque()

    def push(self, step: int, loss: Tensor, batches: list[Any]) -> Iterator[tuple[int, float]]:
        """Send one value off; yields (step, loss) of those that are old enough.

        Args:
            step: Its number.
            loss: Scalar on the device.
            batches: What it was computed of: with ``image_ids``; kept until the value is read.
        """
        pinned = loss.device.type == "cuda"
        host = torch.empty_like(loss, device="cpu", pin_memory=pinned).copy_(loss, non_blocking=pinned)
        arrived = torch.cuda.current_stream(loss.device).record_event() if pinned else None
        self._waiting.append((step, host, arrived, batches))
        while len(self._waiting) > FLAG_DELAY:
            yield self._read()

    def wait_all(self) -> Iterator[tuple[int, float]]:
        """Wait for the device and read the rest: nothing is published past a flag not yet read."""
        while self._waiting:
            yield self._read()

    def _read(self) -> tuple[int, float]:
        step, host, arrived, batches = self._waiting.popleft()
        if arrived is not None:
            arrived.synchronize()
        value = float(host)
        if value != value or value in (float("inf"), float("-inf")):
            names = ", ".join([name for batch in batches for name in batch.image_ids][:16])
            text = f"loss is {value} at step {step}; images of that step: {names}; try a lower optim.lr"
            raise NonFiniteLossError(text, step, batches)
        return step, value
