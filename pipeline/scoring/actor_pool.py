"""How many actors a scoring job may have, and giving back what a failed one held."""

import time
from dataclasses import dataclass

import ray
from ray.data import ActorPoolStrategy

from pipeline.runtime import resources

SETTLE_S = 5.0
"""How long CPUs of a job that has just ended may take to come back."""
GPU_CALLS = 3
"""Units that an actor with a GPU has in hand: one decoded, one in the members, one encoded and written."""


@dataclass(frozen=True)
class ActorPool:
    """How many actors hold the members, and what each takes."""

    size: int
    cpus: int
    gpus: int
    threads: int
    """CPU threads of each call."""
    calls: int = 1
    """Units that an actor has in hand at a time."""

    @property
    def strategy(self) -> ActorPoolStrategy:
        """The pool as Ray Data takes it."""
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
    resources.wait_for_cluster(gpus)
    deadline = time.monotonic() + SETTLE_S
    while True:
        total, free = ray.cluster_resources().get("CPU", 1), ray.available_resources().get("CPU", 0)
        if free >= total or time.monotonic() >= deadline:
            return free
        time.sleep(0.2)


def plan_actor_pool(todo: int, actors: int | None, threads: int | None, free_cpus: float) -> ActorPool:
    """An actor on each GPU; where there are none, as many as the free CPUs allow, one left to the readers.

    On CPUs each thread of an actor has a unit of its own, since many operations are too short to be shared: with a
    small model two threads with a unit each did 80 images a second, two that shared one 36; with a large one as many.
    Actors that held every CPU would wait for readers that wait for a CPU, for ever.

    Raises:
        InputError: The cluster has no CPU beside that of one actor.
    """
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
    resources.require_cpus(1, "an actor that holds the members")
    if gpus:
        size = max(1, min(actors or gpus, todo))
        return ActorPool(
            size, 1, 1, threads or max(1, min(16, cpus // gpus - 1)), calls=min(GPU_CALLS, -(-todo // size))
        )
    cpus_per_actor = 2 if free_cpus >= 4 else 1
    size = max(1, min(actors or todo, todo, int((free_cpus - 1) // cpus_per_actor)))
    threads = threads or min(2, cpus)
    calls = max(1, min(threads, todo // size))
    return ActorPool(size, cpus_per_actor, 0, max(1, threads // calls), calls)
