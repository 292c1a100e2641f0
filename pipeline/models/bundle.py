"""A trained model on storage: ``manifest.json`` and ``members/<k>/model.safetensors``.

One member is a model, several are an ensemble; nothing else differs. The manifest holds the size and sha256
of every member and is committed last, so a bundle is whole or not there. Nothing in it is ever unpickled.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline import __version__, models, storage
from pipeline.errors import InputError, nearest, one_line
from pipeline.models.outputs import num_outputs
from pipeline.schema import BUNDLE_JSON, PREDICTIONS, SCHEMA_VERSION
from pipeline.storage import checksum

_REQUIRED = ("schema_version", "task", "model", "classes", "background", "input", "files")
_OPTIONAL = {
    "seeds": [],
    "failed": [],
    "data": {},
    "metrics": {},
    "calibration": None,
    "threshold": None,
    "score_threshold": None,
    "predict": {},
    "normalise": None,
}


def member_path(k: int) -> str:
    """Where member ``k``'s weights lie, relative to the bundle."""
    return f"members/{k}/model.safetensors"


def member_uris(bundle: "Bundle") -> list[str]:
    """Where the members' weights lie."""
    return [storage.join(bundle.uri, member_path(k)) for k in range(bundle.members)]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest was read and checked; weights are read, and verified, by ``load_member``."""

    uri: str
    manifest: dict[str, Any]
    id: str
    """First 12 hex digits of the sha256 of ``manifest.json``, which names the sha256 of all the rest."""

    @property
    def task(self) -> str:
        """``segmentation`` or ``detection``."""
        return self.manifest["task"]

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their labels."""
        return list(self.manifest["classes"])

    @property
    def background(self) -> int | None:
        """Label of the implicit background, where there is one."""
        return self.manifest["background"]

    @property
    def members(self) -> int:
        """Number of models in the bundle."""
        return len(self.manifest["files"])

    @property
    def same_model(self) -> bool:
        """Whether all members are of one model."""
        return isinstance(self.manifest["model"], dict)

    def model_settings(self, k: int) -> models.ModelSettings:
        """Settings of member ``k``'s model."""
        # One model for all members, or a list with one for each.
        model = self.manifest["model"]
        return models.parse(model if isinstance(model, dict) else model[k], f"bundle '{self.uri}': model")

    @property
    def num_outputs(self) -> int:
        """Classes that the model tells apart: detectors have none for a background at the end of the list."""
        return num_outputs(self.task, self.classes, self.background)

    def load_member(self, k: int) -> nn.Module:
        """Member ``k`` on the CPU, in eval mode.

        Raises:
            InputError: The file is missing, is not what the manifest says, or does not fit the model.
        """
        path = member_path(k)
        sha256 = self.manifest["files"][path]["sha256"]
        data = checksum.read_verified(storage.join(self.uri, path), sha256, "write the bundle again")
        state = _read_tensors(data, f"'{self.uri}/{path}'")
        module = models.build_untrained(self.model_settings(k), self.num_outputs)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = one_line(error)
            raise InputError(f"'{self.uri}/{path}' does not fit its model: {reason}") from None
        return module.eval()


def write_bundle(uri: str, manifest: Mapping[str, Any], members: Sequence[Path | str]) -> Bundle:
    """Write a bundle and publish it: ``stage``, then ``commit``."""
    return commit(stage(uri, manifest, members))


def stage(uri: str, manifest: Mapping[str, Any], members: Sequence[Path | str]) -> Bundle:
    """Copy the members' weights to ``uri``; the bundle can be used, but is not there before ``commit``.

    Args:
        uri: The bundle's folder. Writing the same content again is no error.
        manifest: ``task, model {name, settings...}`` (or a list with one for each member), ``classes, background,
            input`` and, where there are any, ``seeds, failed, data, metrics, calibration, threshold, score_threshold,
            predict, normalise``; sizes, digests and versions are added here.
        members: A path or URI of each member's ``model.safetensors``.

    Raises:
        InputError: Another bundle is there already, or a member is no safetensors file.
    """
    uri = storage.absolute(uri)
    if not members:
        raise InputError(f"bundle '{uri}': no members to write; train at least one")
    # All members are read and checked before the first is written: a wrong one leaves nothing behind.
    files: dict[str, Any] = {}
    for k, source in enumerate(members):
        data = storage.read_bytes(str(source))
        _read_tensors(data, f"'{source}'")
        files[member_path(k)] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    versions = {"schema_version": SCHEMA_VERSION, "code_version": __version__}
    complete = {**_OPTIONAL, **versions, **manifest, "files": files}
    if storage.exists(storage.join(uri, BUNDLE_JSON)):
        if open_bundle(uri).manifest["files"] != files:
            raise _other_bundle_error(uri)
    else:
        for k, source in enumerate(members):
            storage.write_bytes(storage.join(uri, member_path(k)), storage.read_bytes(str(source)))
    return _bundle_of(uri, complete)


def with_changes(bundle: Bundle, **changes: Any) -> Bundle:
    """The same weights with other entries in the manifest (calibration, threshold, predict); not committed."""
    return _bundle_of(bundle.uri, {**bundle.manifest, **changes})


def commit(bundle: Bundle) -> Bundle:
    """Publish a staged bundle's manifest: from now on it is there, for good.

    Raises:
        InputError: Another bundle is there already.
    """
    target, content = storage.join(bundle.uri, BUNDLE_JSON), _to_json(bundle.manifest)
    if not storage.create_once(target, content) and storage.read_bytes(target) != content:
        raise _other_bundle_error(bundle.uri)
    return open_bundle(bundle.uri)


def _bundle_of(uri: str, manifest: dict[str, Any]) -> Bundle:
    """The bundle that ``manifest`` would be once it is committed."""
    content = _to_json(manifest)
    # Read back from JSON: a staged bundle holds the very types that the committed one will.
    return Bundle(uri, json.loads(content), hashlib.sha256(content).hexdigest()[:12])


def _to_json(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of ``manifest.json``: the same for the same content, since a bundle's id is their digest."""
    return json.dumps(checksum.with_checksum(manifest), indent=1, sort_keys=True, allow_nan=False).encode()


def _other_bundle_error(uri: str) -> InputError:
    return InputError(f"'{uri}' already holds another bundle; choose another folder or delete that one")


def open_bundle(uri: str, task: str | None = None) -> Bundle:
    """Read and check a bundle's manifest.

    Args:
        uri: The bundle's folder.
        task: What the bundle must be for, if that matters.

    Raises:
        InputError: No bundle there, one that this version cannot read, or a bundle of another task.
    """
    uri = storage.absolute(uri)
    target = storage.join(uri, BUNDLE_JSON)
    content = storage.read_text(target, "bundle manifest").encode()
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        raise InputError(f"'{target}' is not JSON; write the bundle again") from None
    _check_manifest(target, manifest)
    checksum.verify_checksum(manifest, target, "write the bundle again")
    if task is not None and manifest["task"] != task:
        raise InputError(
            f"bundle of another task: wanted {task}, '{uri}' is for {manifest['task']}; choose another bundle"
        )
    return Bundle(uri, {**_OPTIONAL, **manifest}, hashlib.sha256(content).hexdigest()[:12])


def _check_manifest(where: str, manifest: Any) -> None:
    """Refuse what is no manifest, or one that this version cannot read; ``where`` is named in the InputError."""
    if not isinstance(manifest, dict):
        raise InputError(f"'{where}': wanted an object with {', '.join(_REQUIRED)}; is this a bundle?")
    missing = [key for key in _REQUIRED if key not in manifest]
    if missing:
        raise InputError(f"'{where}': '{missing[0]}' is missing; is this a bundle?")
    if manifest["schema_version"] != SCHEMA_VERSION:
        version = manifest["schema_version"]
        raise InputError(
            f"'{where}': schema version {version}, this dubito reads {SCHEMA_VERSION}; use the version that wrote it"
        )
    if manifest["task"] not in PREDICTIONS:
        raise InputError(f"'{where}': unknown task '{manifest['task']}'.{nearest(manifest['task'], PREDICTIONS)}")
    # The model of all members, or a list with one for each.
    described = manifest["model"] if isinstance(manifest["model"], list) else [manifest["model"]]
    for model in described:
        settings = models.parse(model if isinstance(model, dict) else {}, f"'{where}': model")
        if settings.task != manifest["task"]:
            raise InputError(f"'{where}': model '{model['name']}' is for {settings.task}, not for {manifest['task']}")
    classes = manifest["classes"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise InputError(f"'{where}': 'classes' must list the names of the classes; write the bundle again")
    threshold = manifest.get("threshold")
    if threshold is not None and not (isinstance(threshold, dict) and "value" in threshold):
        raise InputError(f"'{where}': 'threshold' must be null or an object with 'value'; write the bundle again")
    files = manifest["files"]
    paths = {member_path(k) for k in range(len(files))} if isinstance(files, dict) else set()
    if not paths or set(files) != paths:
        raise InputError(f"'{where}': 'files' must name {member_path(0)} and so on; write the bundle again")
    if isinstance(manifest["model"], list) and len(described) != len(files):
        raise InputError(f"'{where}': {len(described)} models for {len(files)} members; write the bundle again")


def _read_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ``where`` is named in the InputError."""
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise InputError(f"{where} is not a safetensors file ({error}); pickles are never loaded") from None
