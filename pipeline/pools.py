"""How many actors a scoring job may have, and giving back what a failed one held."""

import time
from dataclasses import dataclass

import ray

SETTLE_S = 5.0
"""How long CPUs of a job that has just ended may take to come back."""


@dataclass(frozen=True)
class Pool:
    """How many actors hold the members, and what each takes."""

    size: int
    cpus: int
    gpus: int
    threads: int


def free_cpus() -> float:
    """CPUs that nobody holds, once those of a job that has just ended came back."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        total, free = ray.cluster_resources().get("CPU", 1), ray.available_resources().get("CPU", 0)
        if free >= total or time.monotonic() >= deadline:
            return free
        time.sleep(0.2)


def plan(todo: int, actors: int | None, threads: int | None, free_cpus: float) -> Pool:
    """An actor on each GPU; where there are none, as many as the free CPUs allow, one left to the readers.

    Actors that held every CPU would wait for readers that wait for a CPU, for ever.
    """
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
    if gpus:
        size = max(1, min(actors or gpus, todo))
        return Pool(size, 1, 1, threads or max(1, min(16, cpus // gpus - 1)))
    each = 2 if free_cpus >= 4 else 1
    size = max(1, min(actors or todo, todo, int((free_cpus - 1) // each)))
    return Pool(size, each, 0, threads or min(2, cpus))


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
