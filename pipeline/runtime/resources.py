"""Whether the cluster has the CPUs, GPUs, memory and disk that a job needs; if not, it is refused with numbers.

Without this, jobs would wait for ever: Ray queues what does not fit, without a word, and consumers that hold every CPU
wait for readers that wait for a CPU. A cluster that grows with its jobs has next to nothing when one begins: it is
asked for what is missing, and waited for.
"""

import math
import shutil
from pathlib import Path

import ray

from pipeline import storage
from pipeline.environment import cluster_limits
from pipeline.errors import InputError

READING_CPUS = 1
"""CPUs that a job leaves to the tasks that read its data."""
OBJECT_STORE_SHARE = 0.5
"""Share of the object stores that rows on their way to the workers may fill; Ray Data itself takes about half."""
SPARE_DISK_BYTES = 2**28
"""Bytes that a job leaves free on a disk."""
GROWTH_WAIT_S = 900.0
"""Seconds for which a growing cluster is waited for: a machine, its image and Ray take some minutes."""


def _limit(resource: str) -> float:
    """What a cluster that grows may have of a resource at most, as ``DUBITO_GROWS`` says; 0 where it does not grow.

    Ray's autoscaler knows it, and does not tell (2.60).

    Raises:
        InputError: The variable cannot be read.
    """
    return cluster_limits().get(resource, 0.0)


def _available(resource: str, amount: float, patience_s: float = GROWTH_WAIT_S) -> float:
    """What the cluster has of a resource; if that is less than ``amount``, what it has once it has grown, if it can.

    A cluster that may not grow so far is not asked; what it may have at most is returned.

    Raises:
        InputError: It may grow so far, and did not within ``patience_s``.
    """
    available = ray.cluster_resources().get(resource, 0)
    if available >= amount:
        return available
    if _limit(resource) < amount:
        return max(available, _limit(resource))
    # A placement group is how the autoscaler is asked. It holds the nodes that come until all are there, and is then
    # removed: the nodes stay for as long as they may be idle. It ends with this job, even if that is interrupted.
    group = ray.util.placement_group([{resource: 1}] * math.ceil(amount))
    try:
        granted = group.wait(patience_s)
    finally:
        ray.util.remove_placement_group(group)
    available = ray.cluster_resources().get(resource, 0)
    if not granted and available < amount:
        raise InputError(
            f"the cluster may have {_limit(resource):g} {resource}s, was asked for {amount:g}, and has {available:g} "
            f"after {patience_s:.0f} s; ask its autoscaler why (ray status), or start the job again later"
        )
    return available


def wait_for_cluster(gpus: int = 1, patience_s: float = GROWTH_WAIT_S) -> None:
    """Make a cluster that grows start nodes, so that there is something to plan with: GPUs if it may have any, CPUs.

    Args:
        gpus: How many GPUs to ask for; fewer if the cluster may not have so many.
        patience_s: Seconds to wait for GPUs, and again for CPUs.

    Raises:
        InputError: They did not come in time.
    """
    _available("GPU", min(gpus, _limit("GPU")), patience_s)
    _available("CPU", min(1 + READING_CPUS, _limit("CPU")), patience_s)


def require_cpus(cpus: float, what: str) -> None:
    """Refuse what would take all CPUs of the cluster, or more.

    Args:
        cpus: CPUs that are held throughout.
        what: Who holds them, and what to change, for the message: "4 workers with a CPU each (train.workers)".

    Raises:
        InputError: The cluster has fewer than ``cpus + READING_CPUS``.
    """
    available = _available("CPU", cpus + READING_CPUS)
    if available < cpus + READING_CPUS:
        raise InputError(
            f"{what} and {READING_CPUS} CPU for reading want {cpus + READING_CPUS:g} CPUs, the cluster has "
            f"{available:g}; ask for fewer, or add nodes"
        )


def claim_gpus(workers: int) -> bool:
    """Whether training uses GPUs: one for each worker, or none where the cluster has none.

    Raises:
        InputError: The cluster has GPUs, but fewer than workers.
    """
    available = int(_available("GPU", workers))
    if 0 < available < workers:
        raise InputError(
            f"train.workers = {workers} want a GPU each, the cluster has {available}; set it to {available}, "
            "or add GPUs"
        )
    return available > 0


def require_object_store(num_bytes: float, what: str) -> None:
    """Refuse rows that would not fit into the object stores while they are on their way.

    Raises:
        InputError: ``num_bytes`` is more than ``OBJECT_STORE_SHARE`` of them.
    """
    capacity = ray.cluster_resources().get("object_store_memory", 0)
    if num_bytes > OBJECT_STORE_SHARE * capacity:
        raise InputError(
            f"{what} hold {num_bytes / 1e9:.2f} GB on their way, the cluster's object stores have "
            f"{capacity / 1e9:.2f} GB, of which {OBJECT_STORE_SHARE:.0%} may be used; lower train.batch_size or "
            "stream.prefetch, or give Ray more object_store_memory"
        )


def require_disk(uri: str, num_bytes: float, what: str) -> None:
    """Refuse to fill a local disk; object stores do not say how much room they have.

    Raises:
        InputError: Less than ``num_bytes + SPARE_DISK_BYTES`` are free where ``uri`` is.
    """
    if storage.scheme_of(uri) != "file":
        return
    folder = Path(storage.arrow(uri)[1])
    # The output is not there yet; the disk is that of the nearest folder above it that is.
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes + SPARE_DISK_BYTES:
        raise InputError(
            f"{what} would take {num_bytes / 1e9:.2f} GB at '{uri}', where {free_bytes / 1e9:.2f} GB are free; "
            "choose another place, or make room"
        )
