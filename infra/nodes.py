"""What the nodes of a cluster are: the one place for images, versions, sizes and counts.

``infra/k8s`` is generated from it; a test holds ``ray_cluster.yaml`` and ``infra/Dockerfile`` to it.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OBJECT_STORE = 0.3
"""Share of a node's memory that Ray gives its object store, which lives in shared memory (Ray's own default)."""
SYSTEM_CPUS = 1
"""CPUs of a machine that Kubernetes and its agents keep: a pod as large as the machine would never be placed."""
SYSTEM_SHARE = 0.15
"""The same of its memory; clouds keep 8 to 12 % of machines of these sizes."""
USER = 1000
"""User and group inside the image."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Nodes of one kind.

    Attributes:
        name: As Ray's autoscaler reports it.
        instance: The machine on AWS that it is made for.
        cpus: Of that machine.
        memory_gib: Of that machine.
        gpus: NVIDIA GPUs of that machine.
        most: Nodes at once; the fewest are 0 (the head: always one).
    """

    name: str
    instance: str
    cpus: int
    memory_gib: int
    gpus: int = 0
    most: int = 0

    @property
    def pod_cpus(self) -> int:
        """CPUs that a pod can have of the machine."""
        return self.cpus - SYSTEM_CPUS

    @property
    def pod_memory_gib(self) -> int:
        """Memory that a pod can have of the machine."""
        return int(self.memory_gib * (1 - SYSTEM_SHARE))

    @property
    def shared_memory_gib(self) -> int:
        """Room of /dev/shm in that pod: the object store and a little; it counts as the pod's memory."""
        return int(self.pod_memory_gib * OBJECT_STORE) + 1


HEAD = Group(name="head", instance="m6i.xlarge", cpus=4, memory_gib=16)
"""The control plane and the jobs' own processes. It has no CPUs for tasks: a task must not take it along."""
GPU = Group(name="gpu", instance="g6.2xlarge", cpus=8, memory_gib=32, gpus=1, most=4)
"""Training, and scoring with models: one NVIDIA L4 each."""
CPU = Group(name="cpu", instance="m6i.4xlarge", cpus=16, memory_gib=64, most=8)
"""Ingest, ``stream.decode: cluster``, evaluation."""
WORKERS = (GPU, CPU)
IDLE_S = 600
"""A worker that does nothing for so long is given back."""


def grows(pods: bool) -> str:
    """What all workers together may have, for ``DUBITO_GROWS``: jobs then wait for what a sleeping cluster lacks.

    Args:
        pods: Whether the workers are pods, which leave a CPU of each machine.
    """
    cpus = sum(group.most * (group.pod_cpus if pods else group.cpus) for group in WORKERS)
    return f"CPU={cpus},GPU={sum(group.most * group.gpus for group in WORKERS)}"


def version(root: Path = ROOT) -> str:
    """Dubito's version, of ``pyproject.toml``."""
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def image(root: Path = ROOT) -> str:
    """The image of every node, without the registry that it is pushed to."""
    return f"dubito:{version(root)}"


def ray_version(root: Path = ROOT) -> str:
    """The tested version of Ray, of ``constraints.txt``.

    Raises:
        LookupError: It is not pinned there.
    """
    for line in (root / "constraints.txt").read_text("utf-8").splitlines():
        if line.startswith("ray=="):
            return line.removeprefix("ray==").strip()
    raise LookupError(f"wanted a line 'ray==VERSION' in {root / 'constraints.txt'}, found none")
