"""Scoring jobs that are refused, or end, with one sentence."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.errors import InputError
from pipeline.storage import checksum
from tests.support.scoring_cases import evaluate, folder_of, predict
from tests.support.tiny import DETECTOR, UNET, make_bundle


def test_an_output_of_other_inputs_is_refused(tmp_path: Path, data: str, unet: str, detector: str):
    out = str(tmp_path / "p")
    predict(unet, data, out, split="train", actors=1)
    before = sorted(os.listdir(out))
    with pytest.raises(InputError, match="committed by other inputs: bundle_id was"):
        predict(detector, data, out, split="train")
    with pytest.raises(InputError, match=r"committed by other inputs: splits was \['train'\], now \['test'\]"):
        predict(unet, data, out, split="test")
    assert sorted(os.listdir(out)) == before


def refusals(tmp_path: Path, data: str) -> dict[str, tuple[Callable[[], Any], str]]:
    others = make_bundle(tmp_path / "a", UNET, seeds=(0,), classes=["nucleus", "background"])
    more = make_bundle(tmp_path / "b", UNET, seeds=(0,), classes=["cell", "background", "dirt"])
    fine = make_bundle(tmp_path / "c", UNET, seeds=(0,))
    detects = make_bundle(tmp_path / "d", DETECTOR, seeds=(0,))
    (tmp_path / "empty").mkdir()
    (tmp_path / "boxless").mkdir()
    meta = json.loads(storage.read_bytes(f"{data}/dataset.json"))
    (tmp_path / "boxless/dataset.json").write_text(
        json.dumps(checksum.with_checksum({**meta, "tasks": ["segmentation"]}))
    )
    images, out = folder_of(tmp_path / "images", 1), str(tmp_path / "p")
    return {
        "class": (lambda: evaluate(others, data, "test"), "label 0 is 'nucleus' in bundle .* and 'cell' in"),
        "more": (lambda: evaluate(more, data, "test"), "label 2 is 'dirt' in bundle .* and absent in"),
        "task": (lambda: evaluate(detects, str(tmp_path / "boxless"), "test"), "bundle of another task"),
        "split": (lambda: evaluate(fine, data, "val"), r"no rows in split 'val'; .* train \(5\)"),
        "truth": (lambda: evaluate(fine, images, "test"), "metrics need labels"),
        "folder split": (lambda: predict(fine, images, out, split="test"), "without splits"),
        "empty": (lambda: predict(fine, str(tmp_path / "empty"), out), "no images in"),
        "missing": (lambda: predict(fine, str(tmp_path / "none"), out), "folder .*none' not found"),
        "bundle": (lambda: predict(images, images, out), "bundle manifest .* not found"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "case", ["class", "more", "task", "split", "truth", "folder split", "empty", "missing", "bundle"]
)
def test_bad_input_is_one_sentence(tmp_path: Path, data: str, case: str):
    call, words = refusals(tmp_path, data)[case]
    with pytest.raises(InputError, match=words):
        call()
    assert not (tmp_path / "p").exists()


def test_damaged_weights_stop_the_job_with_their_sentence(tmp_path: Path, data: str):
    uri = make_bundle(tmp_path, UNET, seeds=(0,))
    path = Path(uri) / "members/0/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=r"is not what was written \(sha256 differs.* write the bundle again"):
        predict(uri, data, str(tmp_path / "p"), actors=1)


def test_a_shard_that_is_gone_stops_the_job_with_its_sentence(tmp_path: Path, data: str, unet: str):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/dataset.json").write_bytes(storage.read_bytes(f"{data}/dataset.json"))
    with pytest.raises(InputError, match="shard .* cannot be read, the dataset is damaged"):
        predict(unet, str(tmp_path / "copy"), str(tmp_path / "p"), actors=1)
    assert not (tmp_path / "p/_MANIFEST.json").exists()
