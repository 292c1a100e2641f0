"""Damage is found: by ``verify``, and by the reader that would use what is damaged."""

import json
import random
import shutil
from pathlib import Path

import pytest

from pipeline import predictions
from pipeline.datasets import ingest, shard_reader
from pipeline.datasets.dataset import open_dataset, row_groups
from pipeline.errors import InputError
from pipeline.models import bundle
from pipeline.scoring.job import predict
from pipeline.storage import checksum
from pipeline.verify import compare_file, verify
from tests.support.tiny import UNET, make_bundle, make_squares

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Path:
    root = tmp_path_factory.mktemp("verify")
    (root / "source").mkdir()
    data = make_squares(root / "source", {"train": range(12), "test": range(12, 16)})
    model = make_bundle(root / "source", UNET)
    predict(model, data, str(root / "predictions"), split="test")
    shutil.move(data, root / "data")
    shutil.move(model, root / "bundle")
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["data", "bundle", "predictions"])
def test_what_is_whole_is_whole(made: Path, kind: str):
    found = verify(str(made / kind))
    assert found["damage"] == []
    files = [path for path in (made / kind).rglob("*") if path.suffix in (".parquet", ".safetensors")]
    assert found["files"] == len(files) > 0
    assert found["bytes"] == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("kind", ["data", "bundle", "predictions"])
def test_a_flipped_bit_in_any_file_is_found_and_named(copy: Path, kind: str):
    files = sorted(path for path in (copy / kind).rglob("*") if path.suffix in (".parquet", ".safetensors"))
    files = [path for path in files if path.parent.name != "_lists"]
    for number, path in enumerate(files):
        flip(path, random.Random(number).randrange(path.stat().st_size), number % 8)
    files[-1].unlink()
    found = verify(str(copy / kind))
    assert [item["file"] for item in found["damage"]] == [str(path) for path in files]
    assert found["damage"][-1]["problem"] == "missing"


def test_a_damaged_list_of_files_is_found_and_named(copy: Path):
    (path,) = (copy / "predictions/_lists").glob("files-*.parquet")
    flip(path, 200)
    assert [item["file"] for item in verify(str(copy / "predictions"))["damage"]] == [str(path)]


def test_a_shard_with_any_flipped_bit_is_refused_by_its_reader_or_reads_as_it_was(copy: Path):
    info = open_dataset(str(copy / "data"))
    group = row_groups(info, "train")[0]
    whole, path = shard_reader.read_row_group(group), Path(group.file)
    clean, draw, refused = path.read_bytes(), random.Random(0), 0
    tail = range(len(clean) - 3000, len(clean), 7)  # the footer, which no page's checksum covers
    for at in [*(draw.randrange(len(clean)) for _ in range(200)), *tail]:
        path.write_bytes(clean)
        flip(path, at, draw.randrange(8))
        try:
            assert shard_reader.read_row_group(group).equals(whole), f"byte {at} reads as something else"
        except InputError:
            refused += 1
    assert refused > 200


def test_storage_that_does_not_answer_is_no_damage(copy: Path, monkeypatch: pytest.MonkeyPatch):
    group = row_groups(open_dataset(str(copy / "data")), "train")[0]
    for fault in (TimeoutError("timed out"), OSError("AWS Error SLOW_DOWN during GetObject")):

        def fail(uri: str, fault: OSError = fault) -> None:
            raise fault

        monkeypatch.setattr(ingest.storage, "open_input", fail)
        with pytest.raises(OSError, match="timed out|SLOW_DOWN"):
            shard_reader.read_row_group(group)


@pytest.mark.parametrize(("kind", "name"), [("data", "dataset.json"), ("bundle", "manifest.json")])
def test_what_commits_is_sealed_itself(copy: Path, kind: str, name: str):
    path = copy / kind / name
    clean, draw = path.read_bytes(), random.Random(1)
    opened = open_dataset if kind == "data" else bundle.open_bundle
    meaning = json.loads(clean)
    for _ in range(300):
        path.write_bytes(clean)
        flip(path, draw.randrange(len(clean)), draw.randrange(8))
        try:
            opened(str(copy / kind))
        except InputError:
            continue
        assert json.loads(path.read_bytes()) == meaning  # a blank that became a tab


def test_a_seal_survives_json_and_tells_a_change():
    sealed = checksum.with_checksum({"b": (1, 2.5), "a": {3: None}, "ü": "é"})
    read = json.loads(json.dumps(sealed, indent=2))
    checksum.verify_checksum(read, "here", "again")
    assert checksum.with_checksum(read) == read
    for change in ({"b": [1, 2.5000001]}, {"c": 0}, {"digest": "0"}):
        with pytest.raises(InputError, match="'here' is not as it was committed .* damaged or edited; again"):
            checksum.verify_checksum({**read, **change}, "here", "again")
    with pytest.raises(InputError):
        checksum.verify_checksum({"b": 1}, "here", "again")


def test_sizes_and_digests_are_compared(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"dubito")
    assert "6 bytes where 7" in compare_file(str(path), 7, "")
    assert "sha256 differs" in compare_file(str(path), 6, "0" * 64)
    with pytest.raises(InputError, match="nothing is committed at .* check the path"):
        verify(str(tmp_path))


def test_damaged_predictions_are_refused_by_their_reader(copy: Path):
    file = next((copy / "predictions").rglob("*.parquet"))
    flip(file, 100)
    with pytest.raises(InputError, match="sha256 differs"):
        predictions.read(str(copy / "predictions"))
