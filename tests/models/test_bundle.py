"""Bundles: written once, verified on load, refused with one sentence."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import models
from pipeline.errors import InputError
from pipeline.models import bundle
from tests.support.tiny import DETECTOR, UNET, manifest, weights


@pytest.fixture
def members(tmp_path: Path) -> list[Path]:
    return [weights(tmp_path, UNET, 2, seed) for seed in (0, 1)]


def test_members_come_back_as_they_were(tmp_path: Path, members: list[Path]):
    made = bundle.write_bundle(str(tmp_path / "b"), manifest(UNET, seeds=[0, 1]), members)
    opened = bundle.open_bundle(str(tmp_path / "b"))
    assert (opened.id, opened.members, opened.task, opened.manifest["seeds"]) == (
        made.id,
        2,
        "segmentation",
        [0, 1],
    )
    torch.manual_seed(1)
    again = models.parse(UNET, "test").build(2).state_dict()
    module = opened.load_member(1)
    assert not module.training
    for name, value in module.state_dict().items():
        assert torch.equal(value, again[name])


def test_the_manifest_names_size_and_digest_of_every_file(tmp_path: Path, members: list[Path]):
    made = bundle.write_bundle(str(tmp_path / "b"), manifest(UNET), members)
    stored = json.loads((tmp_path / "b/manifest.json").read_bytes())
    for k, source in enumerate(members):
        entry = stored["files"][f"members/{k}/model.safetensors"]
        assert entry == {
            "size": source.stat().st_size,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    assert made.id == hashlib.sha256((tmp_path / "b/manifest.json").read_bytes()).hexdigest()[:12]


def test_a_detector_has_no_output_for_the_background(tmp_path: Path):
    path = weights(tmp_path, DETECTOR, 1, 0)
    made = bundle.write_bundle(str(tmp_path / "b"), manifest(DETECTOR), [path])
    assert made.num_outputs == 1
    assert made.load_member(0)(torch.zeros(1, 3, 32, 32)).logits.shape[-1] == 1


def test_the_same_content_may_be_written_again_and_other_content_not(tmp_path: Path, members: list[Path]):
    first = bundle.write_bundle(str(tmp_path / "b"), manifest(UNET), members)
    assert bundle.write_bundle(str(tmp_path / "b"), manifest(UNET), members).id == first.id
    with pytest.raises(InputError, match="already holds another bundle"):
        bundle.write_bundle(str(tmp_path / "b"), manifest(UNET), members[::-1])
    bundle.open_bundle(str(tmp_path / "b")).load_member(0)  # untouched by the refused one


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_member_is_found(tmp_path: Path, members: list[Path], damage: str):
    made = bundle.write_bundle(str(tmp_path / "b"), manifest(UNET), members)
    path = tmp_path / "b/members/1/model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    words = {"flip": "sha256", "cut": "sha256 differs", "remove": r"could not be read \(missing\)"}
    made.load_member(0)
    with pytest.raises(InputError, match=words[damage]):
        made.load_member(1)


def test_a_pickle_is_never_loaded(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(InputError, match="not a safetensors file"):
        bundle.write_bundle(str(tmp_path / "b"), manifest(UNET), [path])
    assert not (tmp_path / "b").exists()


def test_weights_of_another_shape_are_refused(tmp_path: Path, members: list[Path]):
    other = manifest({**UNET, "width": 8})
    made = bundle.write_bundle(str(tmp_path / "b"), other, members)
    with pytest.raises(InputError, match="does not fit its model"):
        made.load_member(0)


def test_a_bundle_of_another_task(tmp_path: Path, members: list[Path]):
    bundle.write_bundle(str(tmp_path / "b"), manifest(UNET), members)
    with pytest.raises(InputError, match="bundle of another task: wanted detection, .* is for segmentation"):
        bundle.open_bundle(str(tmp_path / "b"), task="detection")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 99}, "schema version 99, this dubito reads"),
        ({"task": "detection"}, "model 'unet' is for segmentation, not for detection"),
        ({"task": "segmentatoin"}, "Did you mean 'segmentation'"),
        ({"model": {"name": "unett"}}, "Did you mean 'unet'"),
        ({"model": {"name": "unet", "widht": 4}}, "Did you mean 'width'"),
        ({"files": {"../../etc/passwd": {"size": 1, "sha256": ""}}}, "'files' must name"),
        ({"classes": None}, "'classes'"),
    ],
)
def test_a_manifest_that_cannot_be_read(tmp_path: Path, members: list[Path], change: dict[str, Any], words: str):
    bundle.write_bundle(str(tmp_path / "b"), manifest(UNET), members)
    path = tmp_path / "b/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(InputError, match=words):
        bundle.open_bundle(str(tmp_path / "b"))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"task": "segmentation"}'])
def test_no_manifest_at_all(tmp_path: Path, text: str):
    with pytest.raises(InputError, match="bundle manifest .* not found"):
        bundle.open_bundle(str(tmp_path))
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError):
        bundle.open_bundle(str(tmp_path))


def test_a_bundle_needs_a_member(tmp_path: Path):
    with pytest.raises(InputError, match="no members"):
        bundle.write_bundle(str(tmp_path / "b"), manifest(UNET), [])
