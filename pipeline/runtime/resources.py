"""Whether the cluster has what a job is about to ask of it: refused with numbers, before anything waits for ever.

Ray queues what does not fit, without a word; and consumers that hold every CPU wait for readers that wait for a CPU.
A cluster that grows with its jobs has next to nothing when one begins: it is asked for what is missing, and waited for.
"""

import math
import shutil
from pathlib import Path

import ray

from pipeline import storage
from pipeline.environment import cluster_limits
from pipeline.errors import InputError

DATA_CPUS = 1
"""Left to the tasks that read."""
STORE_SHARE = 0.5
"""Of the object stores that rows on their way to the workers may fill; Ray Data itself keeps to about half."""
DISK_SPARE = 2**28
"""Bytes that stay free on a disk."""
GROWTH_S = 900.0
"""How long a growing cluster is waited for: a machine, its image and Ray take some minutes."""


def _limit(resource: str) -> float:
    """What a cluster that grows may have of a resource at most, as ``DUBITO_GROWS`` says; 0 where it does not grow.

    Ray's autoscaler knows it, and does not tell (2.60).

    Raises:
        InputError: The variable cannot be read.
    """
    return cluster_limits().get(resource, 0.0)


def _available(kind: str, wanted: float, patience_s: float = GROWTH_S) -> float:
    """What the cluster has of a resource, once it has grown to ``wanted`` if it can.

    A placement group is how Ray is asked: it is what this job waits for, and goes with it. It holds what came until
    all is there, then lets it go: the nodes stay for as long as they may be idle.

    Raises:
        InputError: It may have as much, and did not get it within ``patience_s``.
    """
    there = ray.cluster_resources().get(kind, 0)
    if there >= wanted:
        return there
    if _limit(kind) < wanted:
        return max(there, _limit(kind))
    group = ray.util.placement_group([{kind: 1}] * math.ceil(wanted))
    try:
        came = group.wait(patience_s)
    finally:
        ray.util.remove_placement_group(group)
    there = ray.cluster_resources().get(kind, 0)
    if not came and there < wanted:
        raise InputError(
            f"the cluster may have {_limit(kind):g} {kind}s, was asked for {wanted:g}, and has {there:g} after "
            f"{patience_s:.0f} s; ask its autoscaler why (ray status), or start the job again later"
        )
    return there


def wait_for_cluster(gpus: int = 1, patience_s: float = GROWTH_S) -> None:
    """Let a cluster that sleeps have something to plan with: GPUs where it may have any, and two CPUs.

    Args:
        gpus: So many, or as many as it may have.
        patience_s: How long to wait for each.

    Raises:
        InputError: They did not come.
    """
    _available("GPU", min(gpus, _limit("GPU")), patience_s)
    _available("CPU", min(1 + DATA_CPUS, _limit("CPU")), patience_s)


def require_cpus(wanted: float, what: str) -> None:
    """Refuse what would take all CPUs of the cluster, or more.

    Args:
        wanted: CPUs that are held throughout.
        what: Who holds them, and what to change, for the message: "4 workers with a CPU each (train.workers)".

    Raises:
        InputError: Fewer than ``wanted + DATA_CPUS`` are there.
    """
    there = _available("CPU", wanted + DATA_CPUS)
    if there < wanted + DATA_CPUS:
        raise InputError(
            f"{what} and {DATA_CPUS} CPU for reading want {wanted + DATA_CPUS:g} CPUs, the cluster has {there:g}; "
            "ask for fewer, or add nodes"
        )


def claim_gpus(workers: int) -> bool:
    """Whether training uses GPUs: one a worker, or none where the cluster has none.

    Raises:
        InputError: There are some, and fewer than workers.
    """
    there = int(_available("GPU", workers))
    if 0 < there < workers:
        raise InputError(
            f"train.workers = {workers} want a GPU each, the cluster has {there}; set it to {there}, or add GPUs"
        )
    return there > 0


def require_object_store(wanted: float, what: str) -> None:
    """Refuse rows that would not fit into the object stores while they are on their way.

    Raises:
        InputError: ``wanted`` bytes are more than ``STORE_SHARE`` of them.
    """
    there = ray.cluster_resources().get("object_store_memory", 0)
    if wanted > STORE_SHARE * there:
        raise InputError(
            f"{what} hold {wanted / 1e9:.2f} GB on their way, the cluster's object stores have {there / 1e9:.2f} GB, "
            f"of which {STORE_SHARE:.0%} may be used; lower train.batch_size or stream.prefetch, or give Ray more "
            "object_store_memory"
        )


def require_disk(uri: str, wanted: float, what: str) -> None:
    """Refuse to fill a local disk; other stores have no end that could be asked for.

    Raises:
        InputError: Less than ``wanted`` bytes and ``DISK_SPARE`` are free where ``uri`` is.
    """
    if storage.scheme_of(uri) != "file":
        return
    folder = Path(storage.arrow(uri)[1])
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted + DISK_SPARE:
        raise InputError(
            f"{what} would take {wanted / 1e9:.2f} GB at '{uri}', where {free / 1e9:.2f} GB are free; "
            "choose another place, or make room"
        )
