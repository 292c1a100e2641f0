"""The Kubernetes manifests: written from one place, accepted by the schemas, non-root, without secrets."""

import copy
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from infra import nodes
from infra.k8s import generate, manifests, notes, pods, verbs
from jobs.cli import app
from tests.support.kube_schema import as_pod, check, definition, patched, templates

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "k8s"
KUSTOMIZE = {"Kustomization", "Component"}
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    (manifest,) = yaml.safe_load_all((FOLDER / name).read_text("utf-8"))
    return manifest


PLAIN = [name for name in FILES if read(name)["kind"] not in KUSTOMIZE]
RAY = [name for name in PLAIN if read(name)["apiVersion"] == "ray.io/v1"]


def all_templates() -> list[Any]:
    return [pytest.param(each, id=f"{name}{path}") for name in PLAIN for path, each in templates(read(name))]


def test_the_committed_manifests_are_the_generated_ones():
    assert generate.stale() == []
    assert generate.main(["--check"]) == 0


def test_a_manifest_that_is_stale_missing_or_left_over_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(FOLDER, tmp_path / "k8s", ignore=shutil.ignore_patterns("*.py"))
    folder = tmp_path / "k8s"
    (folder / "jobs" / "train.yaml").write_text("kind: RayJob\n")
    (folder / "jobs" / "verify.yaml").unlink()
    (folder / "jobs" / "gone.yaml").write_text("kind: RayJob\n")
    names = ["jobs/gone.yaml", "jobs/train.yaml", "jobs/verify.yaml"]
    assert generate.main(["--check", "--folder", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines() == [f"stale {name}" for name in names]
    assert generate.main(["--folder", str(folder)]) == 0
    assert generate.stale(folder) == []
    assert not (folder / "jobs" / "gone.yaml").exists()


@pytest.mark.parametrize("name", PLAIN)
def test_a_manifest_fits_its_schema(name: str):
    check(read(name))


@pytest.mark.parametrize("template", all_templates())
def test_a_pod_template_fits_kubernetes_own_schema(template: dict[str, Any]):
    kubernetes_validate.validate(as_pod(template), "1.32", strict=True)


def _spoil(path: str, value: object = None) -> Callable[[dict[str, Any]], None]:
    """A function that sets the field at ``path``, or renames it to a misspelling."""

    def spoil(manifest: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        place: Any = manifest
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if value is None:
            place[f"{last}x"] = place.pop(last)
        else:
            place[last] = value

    return spoil


HEAD = "spec/rayClusterSpec/headGroupSpec/template/spec"


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("jobs/train.yaml", _spoil("spec/backoffLimit")),
        ("jobs/train.yaml", _spoil("spec/backoffLimit", "two")),
        ("jobs/train.yaml", _spoil("spec/rayClusterSpec/authOptions/mode", "password")),
        ("jobs/train.yaml", _spoil(f"{HEAD}/containers/0/securityContext/runAsNonRoot")),
        ("jobs/train.yaml", _spoil(f"{HEAD}/containers/0/resources/limits/memory", "13 GB")),
        ("jobs/train.yaml", _spoil(f"{HEAD}/volumes/0/emptyDir/medium", 1)),
        ("jobs/train.yaml", _spoil("spec/rayClusterSpec/workerGroupSpecs/0/minReplicas")),
        ("cluster/raycluster.yaml", _spoil("spec/autoscalerOptions/idleTimeoutSeconds")),
        ("cluster/raycluster.yaml", _spoil("metadata/labels")),
        ("schedule/raycronjob.yaml", _spoil("spec/schedule")),
        ("schedule/raycronjob.yaml", _spoil("spec/jobTemplate/entrypoint", 1)),
        ("schedule/cronjob.yaml", _spoil("spec/concurrencyPolicy")),
        ("schedule/cronjob.yaml", _spoil("spec/concurrencyPolicy", 1)),
        ("schedule/cronjob.yaml", _spoil("spec/jobTemplate/spec/template/spec/containers/0/image")),
        ("cluster/storage.yaml", _spoil("data/AWS_REGION", 5)),
        ("volume/claim/claim.yaml", _spoil("spec/accessModes")),
    ],
)
def test_a_spoilt_manifest_is_refused(name: str, spoil: Callable[[dict[str, Any]], None]):
    manifest = read(name)
    check(manifest)
    spoil(manifest)
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_there_is_a_job_for_every_verb_of_the_command_line():
    written = {Path(name).stem for name in FILES if name.startswith("jobs/")} - {"kustomization"}
    assert written == verbs.of_the_command_line() - set(verbs.LEFT_OUT)


def test_a_verb_without_a_job_is_an_error_that_says_where_to_add_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(verbs.JOBS, "predict")
    with pytest.raises(LookupError, match=r"verbs\.py does not know: predict; give each its arguments in JOBS"):
        verbs.jobs()


def test_a_job_without_a_verb_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(verbs.JOBS, "fly", verbs.Job(arguments="--high"))
    with pytest.raises(LookupError, match="has verbs that dubito does not have: fly; take them out of JOBS"):
        verbs.jobs()


def parsed(entrypoint: str) -> dict[str, Any]:
    """What the command line makes of an entry point; unknown options and missing ones are errors."""
    program, verb, *arguments = shlex.split(entrypoint)
    assert program == "dubito"
    group = typer.main.get_command(app)
    command = group.commands[verb]  # type: ignore[attr-defined]
    return command.make_context(verb, arguments).params


@pytest.mark.parametrize("verb", sorted(verbs.JOBS.keys() & verbs.of_the_command_line()))
def test_the_command_line_understands_a_jobs_entry_point(verb: str):
    entrypoint = read(f"jobs/{verb}.yaml")["spec"]["entrypoint"]
    values = [value for value in parsed(entrypoint).values() if value]
    assert values
    if verb in ("train", "ensemble"):
        assert parsed(entrypoint)["resume"] is True
    # It goes through a shell: nothing in it may mean more to the shell than the variable.
    assert re.fullmatch(r"[A-Za-z0-9 ./_=$-]+", entrypoint)
    assert set(re.findall(r"\$\w+", entrypoint)) <= {"$DUBITO_ROOT"}


def test_a_misspelt_option_of_an_entry_point_is_found():
    entrypoint = read("jobs/predict.yaml")["spec"]["entrypoint"]
    with pytest.raises(Exception, match="No such option: --bundel"):
        parsed(entrypoint.replace("--bundle", "--bundel"))


def test_the_example_settings_are_accepted_as_the_jobs_set_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pipeline.config import load
    from pipeline.training.train_config import TrainConfig

    file = tmp_path / "train.yaml"
    file.write_text(read("cluster/configs.yaml")["data"]["train.yaml"])
    monkeypatch.setenv("DUBITO_ROOT", read("cluster/storage.yaml")["data"]["DUBITO_ROOT"])
    sets = [
        value.replace("$DUBITO_ROOT", "s3://b")
        for value in parsed(read("jobs/train.yaml")["spec"]["entrypoint"])["sets"]
    ]
    config = TrainConfig.model_validate(load(str(file), sets))
    assert (config.data, config.out) == ("s3://b/data/bccd", "s3://b/runs/bccd")


@pytest.mark.parametrize("name", RAY)
def test_ray_clusters_are_of_the_tested_versions_and_ask_for_a_token(name: str):
    def clusters(value: Any) -> list[dict[str, Any]]:
        if isinstance(value, dict):
            own = [value] if "headGroupSpec" in value else []
            return own + [found for each in value.values() for found in clusters(each)]
        return [found for each in value for found in clusters(each)] if isinstance(value, list) else []

    (cluster,) = clusters(read(name))
    assert cluster["rayVersion"] == nodes.ray_version()
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("template", all_templates())
def test_a_pod_is_non_root_limited_and_of_the_projects_image(template: dict[str, Any]):
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == nodes.USER
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert all("hostPath" not in volume for volume in spec.get("volumes", []))
    for container in spec["containers"]:
        assert container["image"] == f"dubito:{nodes.version()}"
        assert container["securityContext"] == pods.RESTRICTED
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()
        assert {"name": "DUBITO_LOG", "value": "json"} in container["env"]


def test_the_autoscaler_is_held_to_the_same_rules():
    options = read("cluster/raycluster.yaml")["spec"]["autoscalerOptions"]
    assert options["securityContext"] == pods.RESTRICTED
    assert options["resources"]["limits"]


def test_the_lasting_cluster_sleeps_without_workers_and_has_the_groups_of_nodes():
    spec = read("cluster/raycluster.yaml")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert [(g["groupName"], g["minReplicas"], g["maxReplicas"]) for g in spec["workerGroupSpecs"]] == [
        (group.name, 0, group.most) for group in nodes.WORKERS
    ]
    total = {"CPU": 0, "GPU": 0}
    for group, node in zip(spec["workerGroupSpecs"], nodes.WORKERS, strict=True):
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert container["resources"]["requests"] == limits
        assert int(limits["cpu"]) < node.cpus
        assert int(limits["memory"].removesuffix("Gi")) < node.memory_gib
        assert int(limits.get("nvidia.com/gpu", 0)) == node.gpus
        total["CPU"] += group["maxReplicas"] * int(limits["cpu"])
        total["GPU"] += group["maxReplicas"] * node.gpus
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    grows = {"name": "DUBITO_GROWS", "value": f"CPU={total['CPU']},GPU={total['GPU']}"}
    assert grows in head["env"]


def test_shared_memory_is_memory_and_leaves_most_of_the_pods_own():
    for name in RAY:
        for path, template in templates(read(name)):
            if "GroupSpec" not in path:
                continue
            (volume,) = [each for each in template["spec"]["volumes"] if "emptyDir" in each]
            (container,) = template["spec"]["containers"]
            assert volume["emptyDir"]["medium"] == "Memory"
            assert {"name": volume["name"], "mountPath": "/dev/shm"} in container["volumeMounts"]
            room = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
            assert 0.3 <= room / int(container["resources"]["limits"]["memory"].removesuffix("Gi")) <= 0.4


def test_a_job_starts_again_on_a_cluster_of_its_own_that_goes_with_it():
    for verb, job in verbs.JOBS.items():
        spec = read(f"jobs/{verb}.yaml")["spec"]
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0
        assert spec["backoffLimit"] > 0
        assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is False
        sizes = {group["groupName"]: group["replicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
        assert sizes == {name: count for name, count in (("gpu", job.gpu), ("cpu", job.cpu)) if count}
        assert len(f"dubito-{verb}") <= 47  # KubeRay's limit


def test_both_schedules_run_the_retraining_and_one_run_at_a_time():
    ray, plain = read("schedule/raycronjob.yaml"), read("schedule/cronjob.yaml")
    assert ray["spec"]["jobTemplate"] == read("jobs/retrain.yaml")["spec"]
    assert "feature gate RayCronJob" in (FOLDER / "schedule/raycronjob.yaml").read_text("utf-8")
    assert plain["spec"]["concurrencyPolicy"] == "Forbid"
    assert plain["spec"]["schedule"] == ray["spec"]["schedule"]
    pod = plain["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"][2]
    cluster = read("cluster/raycluster.yaml")["metadata"]["name"]
    assert f"--submit http://{cluster}-head-svc:8265" in command
    assert '--job "$RUN"' in command
    environment = {each["name"]: each for each in container["env"]}
    assert environment["RUN"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": cluster, "key": "auth_token"}}


def test_the_scheduled_command_runs_in_a_folder_of_its_own(tmp_path: Path):
    (container,) = read("schedule/cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    shell, flag, command = container["command"]
    configs, bin_ = tmp_path / "configs", tmp_path / "bin"
    configs.mkdir()
    bin_.mkdir()
    (configs / "retrain.yaml").write_text("registry: s3://b\n")
    (bin_ / "dubito").write_text('#!/bin/sh\npwd; ls -A; cat retrain.yaml; echo "$@"\n')
    (bin_ / "dubito").chmod(0o755)
    done = subprocess.run(
        [shell, flag, command.replace(verbs.CONFIGS, str(configs))],
        env={"PATH": f"{bin_}:/usr/bin:/bin", "RUN": "dubito-retrain-29384720", "TMPDIR": str(tmp_path),
             "DUBITO_ROOT": "s3://b/x"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    folder, listed, text, said = done.stdout.splitlines()
    assert Path(folder).parent == tmp_path
    assert (listed, text) == ("retrain.yaml", "registry: s3://b")
    places = "--set registry=s3://b/x/registry --set work=s3://b/x/retrain --set data=s3://b/x/data/cells"
    recipe = f"--set recipe={configs}/train.yaml"
    end = f"--submit {manifests.DASHBOARD} --job dubito-retrain-29384720"
    assert said == f"retrain retrain.yaml {places} {recipe} {end}"


def test_no_file_holds_a_secret():
    secrets = [name for name in PLAIN if read(name)["kind"] == "Secret"]
    assert secrets == ["secret.example.yaml"]
    assert set(read("secret.example.yaml")["stringData"].values()) == {notes.PLACEHOLDER}
    for name in FILES:
        assert "secret.example.yaml" not in read(name).get("resources", [])
        for _, template in templates(read(name)):
            for container in template["spec"]["containers"]:
                named = {each["name"] for each in container["env"] if "value" in each}
                assert not {key for key in named if "TOKEN" in key or "SECRET" in key or "ACCESS_KEY" in key}


def test_everything_that_reads_storage_has_its_endpoint_and_keys():
    data = read("cluster/storage.yaml")["data"]
    assert data.keys() == {"DUBITO_ROOT", "AWS_ENDPOINT_URL", "AWS_REGION"}
    secret = {"secretRef": {"name": read("secret.example.yaml")["metadata"]["name"], "optional": True}}
    config = {"configMapRef": {"name": read("cluster/storage.yaml")["metadata"]["name"]}}
    for name in RAY:
        for path, template in templates(read(name)):
            (container,) = template["spec"]["containers"]
            assert config in container["envFrom"], path
            assert (secret in container["envFrom"]) is ("GroupSpec" in path), path


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("kustomization.yaml")])
def test_what_a_kustomization_names_is_there(name: str):
    manifest = read(name)
    for place in [*manifest.get("resources", []), *manifest.get("components", [])]:
        path = (FOLDER / name).parent / place
        assert path.is_file() or (path / "kustomization.yaml").is_file(), place


def test_with_the_volume_every_ray_pod_mounts_the_claim_and_storage_is_there():
    claim = read("volume/claim/claim.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    patches = read("volume/component/kustomization.yaml")["patches"]
    seen = set()
    for patch in patches:
        target = patch["target"]
        for name in PLAIN:
            manifest = copy.deepcopy(read(name))
            if (
                manifest["kind"] != target["kind"]
                or target.get("name", manifest["metadata"]["name"]) != (manifest["metadata"]["name"])
            ):
                continue
            patched(manifest, yaml.safe_load(patch["patch"]))
            check(manifest)
            seen.add(name)
            if manifest["kind"] == "ConfigMap":
                assert manifest["data"]["DUBITO_ROOT"] == "/data"
                continue
            for path, template in templates(manifest):
                if "GroupSpec" in path:
                    volume = {"name": "data", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
                    assert volume in template["spec"]["volumes"]
                    mounts = template["spec"]["containers"][0]["volumeMounts"]
                    assert {"name": "data", "mountPath": "/data"} in mounts
    jobs = {f"jobs/{verb}.yaml" for verb in verbs.JOBS}
    assert seen == {"cluster/storage.yaml", "cluster/raycluster.yaml"} | jobs


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on this machine")
@pytest.mark.parametrize("folder", ["cluster", "jobs", "schedule", "volume/cluster", "volume/jobs"])
def test_kubectl_builds_every_folder(folder: str):
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True, check=True)
    built = list(yaml.safe_load_all(done.stdout))
    assert built
    for manifest in built:
        check(manifest)
        for path, template in templates(manifest):
            names = {each["name"] for each in template["spec"].get("volumes", [])}
            assert ("data" in names) is (folder.startswith("volume") and "GroupSpec" in path)


def test_unknown_fields_are_refused_at_every_depth():
    schema = definition("RayCluster")
    group = schema["properties"]["spec"]["properties"]["workerGroupSpecs"]["items"]
    container = group["properties"]["template"]["properties"]["spec"]["properties"]["containers"]["items"]
    assert schema["additionalProperties"] is group["additionalProperties"] is container["additionalProperties"] is False
