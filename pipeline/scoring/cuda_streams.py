"""CUDA streams of one model that several threads use: one a thread to decode and encode, one for the model."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


class ModelStreams:
    """On a CPU threads run beside one another, unless they take turns there too.

    A thread enters ``thread_stream`` with everything it does for one batch, and within it ``model_stream``. There its
    work joins the one stream of the model, behind what other threads have queued: so the device has the next batch
    before it is done with this one, and the memory of activations is taken once, whatever the number of threads.
    """

    def __init__(self, device: torch.device, turns: bool = False) -> None:
        """``turns``: one thread at a time asks the model on a CPU too, since its answers draw random numbers."""
        self._cuda = device.type == "cuda"
        self._lock = threading.Lock() if turns or self._cuda else contextlib.nullcontext()
        self._local = threading.local()
        self._device = device
        self._model: Any = torch.cuda.Stream(device) if self._cuda else None

    @contextlib.contextmanager
    def thread_stream(self) -> Iterator[None]:
        """The calling thread's stream; leaving it waits until all is done, so what was made there may be dropped."""
        if not self._cuda:
            yield
            return
        if not hasattr(self._local, "stream"):
            # Small kernels at the end of one batch go before those of the next batch's members.
            self._local.stream = torch.cuda.Stream(self._device, priority=-1)
        try:
            with torch.cuda.stream(self._local.stream):
                yield
        finally:
            self._local.stream.synchronize()

    @contextlib.contextmanager
    def model_stream(self) -> Iterator[None]:
        """The model's stream: on a GPU for one thread at a time, which does not wait for the device."""
        with self._lock:
            if not self._cuda:
                yield
                return
            thread_stream = torch.cuda.current_stream(self._device)
            self._model.wait_stream(thread_stream)
            try:
                with torch.cuda.stream(self._model):
                    yield
            finally:
                thread_stream.wait_stream(self._model)
