"""How many actors a scoring job may have, and giving back what a failed one held."""

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from ray.exceptions import RayTaskError

from pipeline.runtime import resources

SETTLE_S = 5.0
"""How long CPUs of a job that has just ended may take to come back."""
GPU_CALLS = 3
"""Units that an actor with a GPU has in hand: one decoded, one in the members, one encoded and written."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ALL = -1, -3, 2**30
"""Options of mallopt (malloc.h), and a size in bytes above that of any block here."""


@dataclass(frozen=True)
class Pool:
    """How many actors hold the members, and what each takes."""

    size: int
    cpus: int
    gpus: int
    threads: int
    """Of each call."""
    calls: int = 1
    """Units that an actor has in hand at a time."""

    @property
    def strategy(self) -> ActorPoolStrategy:
        """As Ray Data takes it."""
        return ActorPoolStrategy(
            size=self.size,
            max_concurrent_calls_per_actor=self.calls,
            enable_true_multi_threading=self.calls > 1,
        )


def free_cpus(gpus: int = 1) -> float:
    """CPUs that nobody holds, once a sleeping cluster woke and those of a job that has just ended came back.

    Args:
        gpus: To wait for, where the cluster may grow so far.
    """
    resources.wake(gpus)
    deadline = time.monotonic() + SETTLE_S
    while True:
        total, free = ray.cluster_resources().get("CPU", 1), ray.available_resources().get("CPU", 0)
        if free >= total or time.monotonic() >= deadline:
            return free
        time.sleep(0.2)


def plan(todo: int, actors: int | None, threads: int | None, free_cpus: float) -> Pool:
    """An actor on each GPU; where there are none, as many as the free CPUs allow, one left to the readers.

    On CPUs each thread of an actor has a unit of its own, since many operations are too short to be shared: with a
    small model two threads with a unit each did 80 images a second, two that shared one 36; with a large one as many.
    Actors that held every CPU would wait for readers that wait for a CPU, for ever.

    Raises:
        InputError: The cluster has no CPU beside that of one actor.
    """
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
    resources.cpus(1, "an actor that holds the members")
    if gpus:
        size = max(1, min(actors or gpus, todo))
        return Pool(size, 1, 1, threads or max(1, min(16, cpus // gpus - 1)), calls=min(GPU_CALLS, -(-todo // size)))
    each = 2 if free_cpus >= 4 else 1
    size = max(1, min(actors or todo, todo, int((free_cpus - 1) // each)))
    threads = threads or min(2, cpus)
    calls = max(1, min(threads, todo // size))
    return Pool(size, each, 0, max(1, threads // calls), calls)


def keep_memory() -> bool:
    """Make the C library keep what this process frees: for workers and actors, whose next batch takes the same again.

    By default glibc gives large blocks back at once, and takes new ones page by page, cleared: elementwise
    operations on maps of 512 x 512 took 2 to 3 times as long, whole units with a small model 1.5 times, training
    steps of a U-Net 1.2 times. It costs memory: a fifth more in that training. Returns whether that was possible;
    other C libraries stay as they are.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        return all(library.mallopt(option, _ALL) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
    except (OSError, AttributeError):
        return False


def in_tasks(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """``map`` by Ray tasks, at most as many at once as the cluster has CPUs; results in order, errors as they were."""
    call: Any = ray.remote(_call)
    most, waiting = max(1, int(ray.cluster_resources().get("CPU", 1))), deque[Any]()
    for item in items:
        waiting.append(call.remote(work, item))
        if len(waiting) >= most:
            yield _result(waiting.popleft())
    while waiting:
        yield _result(waiting.popleft())


def _call(work: Callable[[Any], Any], item: Any) -> Any:
    return work(item)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None


def forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of a chain of errors.

    Their frames hold the execution that failed, and that holds its actors: as long as somebody keeps the error,
    their CPUs would be gone (measured with Ray 2.60: 2 of 8 CPUs a failed run, until the error was collected).
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
