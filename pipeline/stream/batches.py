"""From tables of rows to batches on the device, ahead of the model: decode, frame, copy, augment. Knows no Ray.

On a CPU decoding runs in a thread beside the model, and augmentation in the model's own, since both want the same
cores. On a GPU all of it runs in threads with CUDA streams of their own; a batch is handed over by an event, so
neither side waits for the other on the host.
"""

import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from pipeline.augment import Augment
from pipeline.errors import InputError
from pipeline.images.batch import Batch
from pipeline.images.gpu_decode import DeviceDecoder
from pipeline.stream import run_stream
from pipeline.tasks.base import Failure, Task

DEPTH = 2
"""Augmented batches that may wait on a GPU: one to train on next, one being made."""
STREAMS = 2
"""Threads with CUDA streams of their own that decode: one decoded 2,390 images a second, two 18,000, four 15,800 (H100,
JPEGs of 500 x 375)."""
GROUP_IMAGES = 256
"""Most images decoded by one call: batches of 256 were 1.3 times as fast as of 64."""
GROUP_BYTES = 2**28
"""Most pixels decoded by one call, in bytes; as many as ``STREAMS + 1`` groups may be on the device."""


@dataclass(frozen=True)
class DecodedBatch:
    """Rows, and the batch that they became."""

    table: pa.Table
    batch: Batch
    failures: list[Failure]
    ready: Any = None
    """CUDA event behind which ``batch`` may be read; None: at once."""


@dataclass(frozen=True)
class Step:
    """The augmented batches of one optimiser step, on the device, and where they stand in the stream."""

    batches: list[Batch]
    positions: list[Any]
    resumed_from: str


def prefetch(make: Callable[[], Generator[Any, None, None]], depth: int) -> Generator[Any, None, None]:
    """Run an iterator in a thread, ``depth`` items ahead; its error is raised here."""
    # The queue bounds how far the thread runs ahead; each item says whether it is a value, the end, or an error.
    items: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        # A consumer that has gone takes nothing any more: the thread looks for that instead of waiting for ever.
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=0.2)
                return True
        return False

    def work() -> None:
        try:
            with contextlib.closing(make()) as values:
                for value in values:
                    if not put(("item", value)):
                        return
            put(("end", None))
        except BaseException as error:  # handed to the consumer, whatever it is
            put(("error", error))

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()


def decode_batches(
    task: Task, tables: Iterable[pa.Table], *, train: bool, seed: int, decoder: DeviceDecoder | None = None
) -> Generator[DecodedBatch, None, None]:
    """Decode and frame table after table: on this process's CPU threads, or many at a time by a ``decoder``."""
    if decoder is None:
        for table in tables:
            batch, failures = task.collate(table, train=train, seed=seed)
            yield DecodedBatch(table, batch, failures)
        return
    # Each thread decodes on a CUDA stream of its own, so that groups overlap with one another and with the model.
    thread_state = threading.local()
    stream_numbers = itertools.count(1)

    def work(group: list[pa.Table]) -> list[DecodedBatch]:
        if decoder.device.type != "cuda":
            return _decode_group(task, group, decoder, train, seed)
        if not hasattr(thread_state, "stream"):
            thread_state.stream = _side_stream(decoder.device, next(stream_numbers))
        with torch.cuda.stream(thread_state.stream):
            batches = _decode_group(task, group, decoder, train, seed)
        # Not waited for here: whoever uses the batch makes its own stream wait for this event.
        ready = thread_state.stream.record_event()
        return [dataclasses.replace(item, ready=ready) for item in batches]

    with ThreadPoolExecutor(STREAMS, "device-decode") as pool:
        # Results come in the order of the groups; a group more than there are threads waits its turn.
        waiting: deque[Future[list[DecodedBatch]]] = deque()
        for group in decode_groups(tables):
            waiting.append(pool.submit(work, group))
            if len(waiting) > STREAMS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _decode_group(
    task: Task, group: list[pa.Table], decoder: DeviceDecoder, train: bool, seed: int
) -> list[DecodedBatch]:
    """All images of a group by one call, then table by table."""
    # One call for all of the group: nvJPEG is fast on many images at once.
    decoded = iter(decoder([item for table in group for item in table["image"].to_pylist()]))
    batches = []
    for table in group:
        pixels = [next(decoded) for _ in range(table.num_rows)]
        batch, failures = task.collate(table, train=train, seed=seed, decoded=pixels)
        batches.append(DecodedBatch(table, batch, failures))
    return batches


def decode_groups(tables: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Tables to decode together, in order: the first alone, so that training begins soon, then twice as many each time.

    At most ``GROUP_IMAGES`` images and ``GROUP_BYTES`` of pixels; one table at least.
    """
    limit = 1
    group: list[pa.Table] = []
    images, size = 0, 0
    for table in tables:
        pixels = 3 * int((table["height"].to_numpy() * table["width"].to_numpy()).sum())
        if group and (images + table.num_rows > GROUP_IMAGES or size + pixels > GROUP_BYTES):
            yield group
            limit, group, images, size = 2 * limit, [], 0, 0
        group.append(table)
        images, size = images + table.num_rows, size + pixels
        if len(group) == limit:
            yield group
            limit, group, images, size = 2 * limit, [], 0, 0
    if group:
        yield group


def augmented_batches(
    items: Iterator[DecodedBatch], augment: Augment, device: torch.device, threaded: bool | None = None
) -> Iterator[tuple[pa.Table, Batch]]:
    """Each table with its augmented batch on the device.

    Args:
        items: What ``decode_batches`` yields.
        augment: Of training or of validation.
        device: Where the batches go.
        threaded: Whether that happens in a thread of its own; None: on a GPU.

    Raises:
        InputError: A row cannot be used; it names the image.
    """
    if not (device.type == "cuda" if threaded is None else threaded):
        for item in items:
            _require_all_rows(item)
            yield item.table, augment(item.batch.to(device))
        return
    side_stream = _side_stream(device, 0) if device.type == "cuda" else None

    def work() -> Generator[tuple[pa.Table, Batch, Any], None, None]:
        for item in items:
            _require_all_rows(item)
            if side_stream is None:
                _receive(item.batch, item.ready, device)
                yield item.table, augment(item.batch.to(device)), None
                continue
            # Copied and augmented on a stream of its own while the model works on the batch before; the host's
            # memory is pinned, or the copy would wait.
            with torch.cuda.stream(side_stream):
                _receive(item.batch, item.ready, device)
                batch = augment(item.batch.pin_memory().to(device, non_blocking=True))
            yield item.table, batch, side_stream.record_event()

    for table, batch, ready in prefetch(work, DEPTH - 1):
        _receive(batch, ready, device)
        yield table, batch


@functools.cache
def _side_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """The same few streams for training and validation: what one stream has freed, no other can use."""
    return torch.cuda.Stream(device)


def _receive(batch: Batch, ready: Any, device: torch.device) -> None:
    """Make this thread's CUDA stream wait for a batch made on another, and keep its memory while it is read."""
    if ready is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(ready)
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            if isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(current)


def _require_all_rows(item: DecodedBatch) -> None:
    """Training and validation want every row: the first that cannot be used ends them, and is named."""
    if item.failures:
        row, reason, detail = item.failures[0]
        name = item.table["image_id"][row].as_py()
        raise InputError(f"image '{name}' of the dataset is {reason}: {detail}; check the shard, or ingest again")


def group_into_steps(
    augmented: Iterable[tuple[pa.Table, Batch]], batch_size: int, accumulate: int
) -> Generator[Step, None, None]:
    """Group local batches into optimiser steps; a batch that is not full is a broken promise of the stream.

    Args:
        augmented: What ``augmented_batches`` yields of the stream's tables.
        batch_size: Rows of every table.
        accumulate: Batches of a step.
    """
    batches: list[Batch] = []
    positions: list[Any] = []
    for table, batch in augmented:
        if table.num_rows != batch_size:
            raise RuntimeError(f"the stream ended within a batch: {table.num_rows} rows; rows were lost on the way")
        arrays = run_stream.batch_arrays(table)
        batches.append(batch)
        positions.append(arrays["position"])
        if len(batches) == accumulate:
            yield Step(batches, positions, arrays["resumed_from"])
            batches, positions = [], []
    if batches:
        raise RuntimeError(f"the stream ended within a step: {len(batches)} batches; rows were lost on the way")
