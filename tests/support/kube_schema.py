"""What an API server with KubeRay's definitions would say of a manifest; unknown fields are errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

KUBERAY = Path(__file__).resolve().parents[3] / "shared" / "data" / "kuberay"
VERSION = "1.32"
"""Of Kubernetes: the oldest that is kept up."""
METADATA = {"name", "labels", "annotations"}
_read: dict[str, dict[str, Any]] = {}


def strict(schema: Any) -> Any:
    """The schema with ``additionalProperties: false`` wherever properties are listed and others are not allowed for."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: {name: strict(each) for name, each in value.items()} if key == "properties" else strict(value)
           for key, value in schema.items()}  # fmt: skip
    listed = isinstance(schema.get("properties"), dict)
    if listed and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    return out


def definition(kind: str) -> dict[str, Any]:
    """KubeRay's schema of a kind of ``ray.io/v1``, strict; skips the test where the definitions are absent."""
    file = KUBERAY / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"KubeRay's definitions are not beside the project ({file.name} absent)")
    if kind not in _read:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        found = yaml.load(file.read_text("utf-8"), Loader=loader)["spec"]["versions"]
        schema = next(each["schema"]["openAPIV3Schema"] for each in found if each["name"] == "v1")
        _read[kind] = strict(schema)
    return _read[kind]


def check(manifest: dict[str, Any]) -> None:
    """Refuse what the API server would refuse, and what it would drop without a word.

    Raises:
        jsonschema.ValidationError: A field is unknown, missing or of the wrong type.
    """
    if unknown := manifest["metadata"].keys() - METADATA:
        raise jsonschema.ValidationError(f"unknown metadata: {unknown}")
    if manifest["apiVersion"] == "ray.io/v1":
        jsonschema.Draft202012Validator(definition(manifest["kind"])).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def templates(manifest: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template inside a manifest, with the path to it."""
    if isinstance(manifest, dict):
        if isinstance(manifest.get("spec"), dict) and "containers" in manifest["spec"]:
            yield path, manifest
            return
        for key, value in manifest.items():
            yield from templates(value, f"{path}/{key}")
    elif isinstance(manifest, list):
        for index, value in enumerate(manifest):
            yield from templates(value, f"{path}/{index}")


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    """A pod template as a Pod, for Kubernetes' own schema."""
    metadata = {"name": "x", **template.get("metadata", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def patched(manifest: dict[str, Any], operations: list[dict[str, Any]]) -> None:
    """Apply JSON patch operations (RFC 6902: ``add`` at the end of a list, ``replace``) in place."""
    for operation in operations:
        *parents, last = [part.replace("~1", "/") for part in operation["path"].split("/")[1:]]
        place: Any = manifest
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if operation["op"] == "add" and last == "-":
            place.append(operation["value"])
        else:
            assert operation["op"] == "replace", operation
            assert last in place, operation
            place[last] = operation["value"]
