"""The manifests, by file: a Ray cluster, a job a verb, two schedules, and the variant that stores on a volume."""

import textwrap
from typing import Any

import yaml

from infra import nodes
from infra.k8s import notes, pods, verbs
from infra.k8s.pods import Manifest, named

CLUSTER = "dubito"
"""Name of the lasting RayCluster; KubeRay names its service and its token after it."""
DASHBOARD = f"http://{CLUSTER}-head-svc:8265"
DATA = "/data"
CLAIM = "dubito-data"
ATTEMPTS = 2
"""Times that KubeRay starts a failed job again."""
KEPT_S = 600
"""How long the cluster of a finished job stays, for its logs."""
WIDTH = 118
NIGHTLY = "0 2 * * *"
EXAMPLE = "jobs/configs/bccd_anchor_free_gpu.yaml"
"""The settings of the example jobs."""
RETRAIN = "jobs/configs/retrain.yaml"
"""The settings of the scheduled retraining, where there are any."""


class _Text(str):
    """Text of several lines, written as such."""


class _Dumper(yaml.SafeDumper):
    """YAML without anchors: every file reads from top to bottom."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the base class asks for it
        return True


_Dumper.add_representer(_Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def _wrapped(text: str) -> list[str]:
    """The lines, none of them much longer than the files' other lines; what follows on is indented like its item."""
    out: list[str] = []
    for line in text.splitlines():
        indent = "  " if line.startswith("- ") else ""
        out += (
            textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
            if len(line) > WIDTH
            else [line]
        )
    return out


def write(note: str, *manifests: Manifest) -> str:
    """A file: who wrote it and why, then the manifests."""
    head = f"{notes.WRITTEN}\n\n{note}".strip()
    lines = "\n".join(f"# {line}".rstrip() for line in _wrapped(textwrap.dedent(head)))
    options: dict[str, Any] = {"Dumper": _Dumper, "sort_keys": False, "width": 110, "allow_unicode": True}
    bodies = [yaml.dump(manifest, **options) for manifest in manifests]
    return f"{lines}\n" + "---\n".join(bodies)


def _kustomization(**fields: Any) -> Manifest:
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **fields}


def _cluster() -> dict[str, str]:
    storage = {
        "DUBITO_ROOT": "s3://BUCKET/dubito",
        "AWS_ENDPOINT_URL": "https://s3.us-west-2.amazonaws.com",
        "AWS_REGION": "us-west-2",
    }
    configs = {"train.yaml": _Text((nodes.ROOT / EXAMPLE).read_text("utf-8"))}
    if (nodes.ROOT / RETRAIN).is_file():
        configs["retrain.yaml"] = _Text((nodes.ROOT / RETRAIN).read_text("utf-8"))
    files = ["storage.yaml", "configs.yaml", "raycluster.yaml"]
    part = {"dubito/part": "cluster"}
    return {
        "kustomization.yaml": write(notes.CLUSTER_FOLDER, _kustomization(resources=files)),
        "storage.yaml": write(notes.STORAGE, named("ConfigMap", pods.STORAGE, "v1", part, data=storage)),
        "configs.yaml": write(notes.CONFIGS, named("ConfigMap", pods.CONFIGS, "v1", part, data=configs)),
        "raycluster.yaml": write(
            notes.RAYCLUSTER, named("RayCluster", CLUSTER, "ray.io/v1", part, spec=pods.lasting_cluster())
        ),
    }


def _submitter() -> Manifest:
    """The pod that hands the job to its cluster. KubeRay's own would run as root, where that is not forbidden."""
    container = {
        "name": "ray-job-submitter",
        "image": nodes.image(),
        "imagePullPolicy": "IfNotPresent",
        "env": pods.variables(),
        "envFrom": [{"configMapRef": {"name": pods.STORAGE}}],
        "resources": pods.SMALL,
        "securityContext": pods.RESTRICTED,
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": pods.AS_USER,
        "containers": [container],
    }
    return {"metadata": {"labels": {"app.kubernetes.io/name": "dubito"}}, "spec": spec}


def job_spec(verb: str, job: verbs.Job) -> Manifest:
    """Spec of a RayJob: ``dubito VERB`` on a cluster of its own."""
    return {
        "entrypoint": f"dubito {verb} {job.arguments}",
        "submissionMode": "K8sJobMode",
        "backoffLimit": ATTEMPTS,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_S,
        "submitterPodTemplate": _submitter(),
        "rayClusterSpec": pods.own_cluster(job),
    }


def _jobs() -> dict[str, str]:
    out: dict[str, str] = {}
    for verb, job in verbs.jobs().items():
        labels = {pods.LABEL: verb}
        manifest = named("RayJob", f"dubito-{verb}", "ray.io/v1", labels, spec=job_spec(verb, job))
        out[f"{verb}.yaml"] = write(notes.RAYJOB.format(verb=verb, again=job.again), manifest)
    out["kustomization.yaml"] = write(notes.JOBS_FOLDER, _kustomization(resources=sorted(out)))
    return out


def _raycronjob() -> Manifest:
    spec = {"schedule": NIGHTLY, "timeZone": "Etc/UTC", "jobTemplate": job_spec("retrain", verbs.JOBS["retrain"])}
    return named("RayCronJob", "dubito-retrain", "ray.io/v1", {pods.LABEL: "retrain"}, spec=spec)


def _cronjob() -> Manifest:
    """Submits to the lasting cluster. The run is named after the Kubernetes Job: one for each scheduled time."""
    # A folder of its own: it is what travels to the cluster, and where the log is written.
    command = (
        f'cd "$(mktemp -d)" && cp {verbs.CONFIGS}/retrain.yaml . && '
        f'exec dubito retrain retrain.yaml {verbs.RETRAIN} --submit {DASHBOARD} --job "$RUN"'
    )
    token = {"secretKeyRef": {"name": CLUSTER, "key": "auth_token"}}
    name = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    container = {
        "name": "submit",
        "image": nodes.image(),
        "imagePullPolicy": "IfNotPresent",
        "command": ["/bin/sh", "-c", command],
        "env": [
            *pods.variables({"RAY_AUTH_MODE": "token"}),
            {"name": "RAY_AUTH_TOKEN", "valueFrom": token},
            {"name": "RUN", "valueFrom": name},
        ],
        "envFrom": [{"configMapRef": {"name": pods.STORAGE}}],
        "resources": pods.SMALL,
        "securityContext": pods.RESTRICTED,
        "volumeMounts": [{"name": "configs", "mountPath": verbs.CONFIGS, "readOnly": True}],
    }
    pod = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": pods.AS_USER,
        "containers": [container],
        "volumes": [{"name": "configs", "configMap": {"name": pods.CONFIGS}}],
    }
    job = {
        "backoffLimit": ATTEMPTS,
        "ttlSecondsAfterFinished": 7 * 24 * 3600,
        "template": {"metadata": {"labels": {"app.kubernetes.io/name": "dubito"}}, "spec": pod},
    }
    spec = {
        "schedule": NIGHTLY,
        "timeZone": "Etc/UTC",
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"spec": job},
    }
    return named("CronJob", "dubito-retrain", "batch/v1", {pods.LABEL: "retrain"}, spec=spec)


def _schedule() -> dict[str, str]:
    return {
        "cronjob.yaml": write(notes.CRONJOB, _cronjob()),
        "raycronjob.yaml": write(notes.RAYCRONJOB, _raycronjob()),
        "kustomization.yaml": write(notes.SCHEDULE_FOLDER, _kustomization(resources=["cronjob.yaml"])),
    }


def _mounted(spec_path: str, workers: int) -> str:
    """A JSON patch that mounts the claim in the head and in each group of workers."""
    places = [f"{spec_path}/headGroupSpec/template/spec"]
    places += [f"{spec_path}/workerGroupSpecs/{index}/template/spec" for index in range(workers)]
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": CLAIM}}
    mount = {"name": "data", "mountPath": DATA}
    operations = []
    for place in places:
        operations.append({"op": "add", "path": f"{place}/volumes/-", "value": volume})
        operations.append({"op": "add", "path": f"{place}/containers/0/volumeMounts/-", "value": mount})
    return yaml.dump(operations, Dumper=_Dumper, sort_keys=False)


def _volume() -> dict[str, str]:
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "500Gi"}}}
    root = yaml.dump([{"op": "replace", "path": "/data/DUBITO_ROOT", "value": DATA}], sort_keys=False)
    patches = [
        {"target": {"kind": "ConfigMap", "name": pods.STORAGE}, "patch": _Text(root)},
        {"target": {"kind": "RayCluster"}, "patch": _Text(_mounted("/spec", len(nodes.WORKERS)))},
    ]
    for verb, job in verbs.jobs().items():
        groups = bool(job.gpu) + bool(job.cpu)
        target = {"kind": "RayJob", "name": f"dubito-{verb}"}
        patches.append({"target": target, "patch": _Text(_mounted("/spec/rayClusterSpec", groups))})
    component: Manifest = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component", "patches": patches}
    out = {
        "claim/claim.yaml": write(notes.CLAIM, named("PersistentVolumeClaim", CLAIM, "v1", spec=claim)),
        "component/kustomization.yaml": write(notes.COMPONENT, component),
        "claim/kustomization.yaml": write(notes.CLAIM, _kustomization(resources=["claim.yaml"])),
    }
    for folder, note in {"cluster": notes.CLUSTER_FOLDER, "jobs": notes.JOBS_FOLDER}.items():
        resources = [f"../../{folder}", *(["../claim"] if folder == "cluster" else [])]
        fields = _kustomization(resources=resources, components=["../component"])
        out[f"{folder}/kustomization.yaml"] = write(note, fields)
    return out


def _secret() -> str:
    values = {"AWS_ACCESS_KEY_ID": notes.PLACEHOLDER, "AWS_SECRET_ACCESS_KEY": notes.PLACEHOLDER}
    return write(notes.SECRET, named("Secret", pods.SECRET, "v1", type="Opaque", stringData=values))


def files() -> dict[str, str]:
    """Every generated file: path below ``infra/k8s`` -> text."""
    folders = {"cluster": _cluster(), "jobs": _jobs(), "schedule": _schedule(), "volume": _volume()}
    out = {f"{folder}/{name}": text for folder, texts in folders.items() for name, text in texts.items()}
    return {**out, "secret.example.yaml": _secret()}
