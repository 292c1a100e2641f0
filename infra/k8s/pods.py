"""Pods and Ray clusters as KubeRay wants them: non-root, with limits, storage by environment, shared memory."""

from typing import Any

from infra import nodes
from infra.k8s import verbs

Manifest = dict[str, Any]

STORAGE = "dubito-storage"
"""ConfigMap: endpoint, region and root of the storage."""
SECRET = "dubito-s3"
"""Secret: the keys of the storage; pods start without it too, where a service account's role gives access."""
CONFIGS = "dubito-configs"
"""ConfigMap: settings files, mounted at ``verbs.CONFIGS``."""
LABEL = "dubito/verb"
RESTRICTED: Manifest = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""What Kubernetes' Pod Security Standard ``restricted`` asks of every container."""
AS_USER: Manifest = {
    "runAsNonRoot": True,
    "runAsUser": nodes.USER,
    "runAsGroup": nodes.USER,
    "fsGroup": nodes.USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""The same of every pod; ``fsGroup`` makes mounted volumes writable for the image's user."""
SMALL: Manifest = {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}}
"""Of containers that only send and follow; importing Ray's client takes some 300 MB."""


def named(kind: str, name: str, api: str, labels: Manifest | None = None, **rest: Any) -> Manifest:
    """A manifest of that kind and name."""
    common = {"app.kubernetes.io/name": "dubito", "app.kubernetes.io/version": nodes.version()}
    return {
        "apiVersion": api,
        "kind": kind,
        "metadata": {"name": name, "labels": {**common, **(labels or {})}},
        **rest,
    }


def from_storage() -> list[Manifest]:
    """Environment of everything that reads or writes storage."""
    return [{"configMapRef": {"name": STORAGE}}, {"secretRef": {"name": SECRET, "optional": True}}]


def variables(extra: dict[str, str] | None = None) -> list[Manifest]:
    """Environment that is the same everywhere: output as JSON lines, nothing told to the outside."""
    values = {"DUBITO_LOG": "json", "RAY_USAGE_STATS_ENABLED": "0", **(extra or {})}
    return [{"name": name, "value": value} for name, value in values.items()]


def _ray_container(group: nodes.Group, extra: dict[str, str] | None) -> Manifest:
    # Requests are limits: a node that lends memory to others kills its pods when they take it back.
    size: Manifest = {"cpu": str(group.pod_cpus), "memory": f"{group.pod_memory_gib}Gi"}
    if group.gpus:
        size["nvidia.com/gpu"] = str(group.gpus)
    head = group is nodes.HEAD
    container: Manifest = {
        "name": "ray-head" if head else "ray-worker",
        "image": nodes.image(),
        "imagePullPolicy": "IfNotPresent",
        "env": variables(extra),
        "envFrom": from_storage(),
        "resources": {"requests": dict(size), "limits": dict(size)},
        "securityContext": RESTRICTED,
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "configs", "mountPath": verbs.CONFIGS, "readOnly": True},
        ],
    }
    if head:
        ports = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
        container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    return container


def pod(group: nodes.Group, extra: dict[str, str] | None = None) -> Manifest:
    """The pod template of a group; ``extra``: further variables of its environment."""
    spec: Manifest = {
        "securityContext": AS_USER,
        "containers": [_ray_container(group, extra)],
        "volumes": [
            # Ray's object store; the default of a container is 64 MiB.
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": f"{group.shared_memory_gib}Gi"},
            },
            {"name": "configs", "configMap": {"name": CONFIGS, "optional": True}},
        ],
    }
    if group is not nodes.HEAD:  # on the head the autoscaler talks to Kubernetes
        spec["automountServiceAccountToken"] = False
    if group.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": {"app.kubernetes.io/name": "dubito"}}, "spec": spec}


def _workers(group: nodes.Group, fewest: int, most: int) -> Manifest:
    return {
        "groupName": group.name,
        "replicas": fewest,
        "minReplicas": fewest,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": pod(group),
    }


def _spec(head: Manifest, workers: list[Manifest], autoscaler: Manifest) -> Manifest:
    return {
        "rayVersion": nodes.ray_version(),
        "authOptions": {"mode": "token"},
        **autoscaler,
        "headGroupSpec": {"serviceType": "ClusterIP", "rayStartParams": {"num-cpus": "0"}, "template": head},
        "workerGroupSpecs": workers,
    }


def lasting_cluster() -> Manifest:
    """Spec of a Ray cluster that grows with its jobs and shrinks to its head."""
    autoscaler = {
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": nodes.IDLE_S,
            "imagePullPolicy": "IfNotPresent",
            "resources": SMALL,
            "securityContext": RESTRICTED,
        },
    }
    head = pod(nodes.HEAD, {"DUBITO_GROWS": nodes.grows(pods=True)})
    return _spec(head, [_workers(group, 0, group.most) for group in nodes.WORKERS], autoscaler)


def own_cluster(job: verbs.Job) -> Manifest:
    """Spec of a Ray cluster for one job: as large as the job wants from its start, and gone with it."""
    counts = [(nodes.GPU, job.gpu), (nodes.CPU, job.cpu)]
    workers = [_workers(group, count, count) for group, count in counts if count]
    return _spec(pod(nodes.HEAD), workers, {"enableInTreeAutoscaling": False})
