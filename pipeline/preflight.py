"""Whether the cluster has what a job is about to ask of it: refused with numbers, before anything waits for ever.

Ray queues what does not fit, without a word; and consumers that hold every CPU wait for readers that wait for a CPU.
"""

import shutil
from pathlib import Path

import ray

from pipeline import storage
from pipeline.errors import InputError

DATA_CPUS = 1
"""Left to the tasks that read."""
STORE_SHARE = 0.5
"""Of the object stores that rows on their way to the workers may fill; Ray Data itself keeps to about half."""
DISK_SPARE = 2**28
"""Bytes that stay free on a disk."""


def cpus(wanted: float, what: str) -> None:
    """Refuse what would take all CPUs of the cluster, or more.

    Args:
        wanted: CPUs that are held throughout.
        what: Who holds them, and what to change, for the message: "4 workers with a CPU each (train.workers)".

    Raises:
        InputError: Fewer than ``wanted + DATA_CPUS`` are there.
    """
    there = ray.cluster_resources().get("CPU", 0)
    if there < wanted + DATA_CPUS:
        raise InputError(
            f"{what} and {DATA_CPUS} CPU for reading want {wanted + DATA_CPUS:g} CPUs, the cluster has {there:g}; "
            "ask for fewer, or add nodes"
        )


def gpus(workers: int) -> bool:
    """Whether training uses GPUs: one a worker, or none where the cluster has none.

    Raises:
        InputError: There are some, and fewer than workers.
    """
    there = int(ray.cluster_resources().get("GPU", 0))
    if 0 < there < workers:
        raise InputError(
            f"train.workers = {workers} want a GPU each, the cluster has {there}; set it to {there}, or add GPUs"
        )
    return there > 0


def object_store(wanted: float, what: str) -> None:
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


def disk(uri: str, wanted: float, what: str) -> None:
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
