"""One dataset and two bundles for the tests of scoring jobs."""

import json

import numpy as np
import pytest

from pipeline.datasets import ingest
from tests.support.scoring_cases import ROWS
from tests.support.tiny import DETECTOR, UNET, encode, make_bundle


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> str:
    """A dataset with masks and boxes: 22 images, some in each of two splits."""
    root = tmp_path_factory.mktemp("data")
    for n in range(ROWS):
        ids = np.zeros((24, 32), np.uint8)
        ids[4:12, 6 : 14 + n % 5] = 1
        for folder, pixels in (("images", 255 * (ids[..., None] > 0) * np.ones(3)), ("labels", ids)):
            path = root / folder / f"image{n:02d}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode(pixels.astype(np.uint8)))
    names = [f"image{n:02d}" for n in range(ROWS)]
    (root / "splits.json").write_text(json.dumps({"train": names[:5], "test": names[5:]}))
    ingest.ingest(
        "instances", str(root / "images"), str(root / "labels"), str(root / "dataset"),
        classes=["cell"], splits=str(root / "splits.json"),
    )  # fmt: skip
    return str(root / "dataset")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("unet"), UNET)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("detector"), DETECTOR)
