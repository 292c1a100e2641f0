"""Images that a dataset only refers to: fetched, checked, told apart where they cannot be had."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import predictions, storage
from pipeline.datasets import image_fetch, ingest, shard_reader
from pipeline.datasets.dataset import DatasetInfo, open_dataset, row_groups
from pipeline.errors import InputError
from pipeline.images.input_settings import InputSettings
from pipeline.scoring.job import predict
from pipeline.stream import epoch_order, run_stream, validation
from pipeline.stream.frame_cache import FrameRows
from pipeline.stream.ledger import Ledger
from pipeline.verify import verify
from tests.support.tiny import UNET, make_bundle, make_squares, png


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (FileNotFoundError("gone"), "missing"),
        (PermissionError("no"), "forbidden"),
        (OSError("AWS Error ACCESS_DENIED during GetObject"), "forbidden"),
        (TimeoutError("slow"), "timeout"),
        (OSError("curlCode: 28, Timeout was reached"), "timeout"),
        (RuntimeError("odd"), "error"),
    ],
)
def test_what_a_fetch_meets_becomes_a_word(monkeypatch: pytest.MonkeyPatch, error: Exception, word: str):
    def fail(uri: str, most: int) -> bytes:
        raise error

    monkeypatch.setattr(storage, "read_bytes", fail)
    found = image_fetch.fetch("/x/a.png")
    assert (found.data, found.status) == (None, word)
    assert str(error) in (found.error or "")


def test_other_bytes_than_were_ingested_are_corrupt_but_asked_for_twice(monkeypatch: pytest.MonkeyPatch):
    answers = [b"damaged on the way", b"image"]
    monkeypatch.setattr(storage, "read_bytes", lambda uri, most: answers.pop(0))
    digest = hashlib.sha256(b"image").hexdigest()
    assert image_fetch.fetch("/x/a.png", sha256=digest).data == b"image"
    monkeypatch.setattr(storage, "read_bytes", lambda uri, most: b"another image")
    found = image_fetch.fetch("/x/a.png", sha256=digest)
    assert (found.data, found.status) == (None, "corrupt")


def test_huge_files_are_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(image_fetch, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(bytes(200))
    assert image_fetch.fetch(str(tmp_path / "a.png")).status == "error"
    monkeypatch.setattr(storage, "read_bytes", lambda uri, most: pytest.fail("read"))
    assert image_fetch.fetch("/x/a.png", size=200).status == "error"


def rows(folder: Path, count: int, first: int = 0) -> pa.Table:
    """Rows that refer to files in ``folder``."""
    files = [folder / f"{n}.png" for n in range(first, first + count)]
    for n, file in enumerate(files):
        file.write_bytes(png(8, 8, first + n))
    return pa.table(
        {
            "image_id": [file.name for file in files],
            "uri": [str(file) for file in files],
            "sha256": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
            "image": pa.nulls(count, pa.binary()),
        }
    )


def test_rows_to_predict_say_what_became_of_their_images(tmp_path: Path):
    table = rows(tmp_path, 4)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(png(8, 8, 77))
    packed = pa.array([None, None, None, b"packed"], pa.binary())
    out = image_fetch.with_images(table.set_column(3, "image", packed))
    assert out["image"].to_pylist() == [png(8, 8, 0), None, None, b"packed"]
    assert out["status"].to_pylist() == ["ok", "missing", "corrupt", "ok"]


def test_rows_to_train_on_come_in_order_a_bounded_number_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_fetch, "AHEAD", 6)
    asked: list[int] = []

    def tables() -> Any:
        for k in range(10):
            asked.append(k)
            yield rows(tmp_path, 3, first=3 * k)

    for k, table in enumerate(image_fetch.require_images(tables())):
        assert table.column_names == ["image_id", "image"]
        assert table["image"].to_pylist() == [png(8, 8, 3 * k + n) for n in range(3)]
        assert len(asked) <= k + 3, "no more than 6 images ahead"
    assert asked == list(range(10))


def test_a_row_to_train_on_whose_image_is_gone_names_it(tmp_path: Path):
    table = rows(tmp_path, 3)
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match=r"image '1\.png' of the dataset is missing at '.*1\.png'.*ingest again"):
        list(image_fetch.require_images([table]))


# --- whole datasets


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> dict[str, DatasetInfo]:
    """The same images packed and referenced."""
    found, splits = {}, {"train": range(10), "val": range(10, 15)}
    for name in ("packed", "referenced"):
        root = tmp_path_factory.mktemp(name)
        found[name] = open_dataset(make_squares(root, splits, referenced=name == "referenced"))
    return found


def test_rows_that_hold_their_images_pass_as_they_are():
    tables = [pa.table({"image_id": [name], "image": [b"bytes"]}) for name in ("a", "b")]
    assert all(given is passed for given, passed in zip(tables, image_fetch.require_images(tables), strict=True))
    assert list(image_fetch.require_images([])) == []


def test_rows_refer_to_images_and_are_otherwise_those_of_a_packed_dataset(both: dict[str, DatasetInfo]):
    here, there = both["packed"], both["referenced"]
    assert (here.referenced, there.referenced) == (False, True)
    assert here.fingerprint == there.fingerprint
    groups = [row_groups(info, "train") for info in (here, there)]
    assert [(group.rows, group.num_bytes) for group in groups[0]] == [(g.rows, g.num_bytes) for g in groups[1]]
    one, other = (pa.concat_tables(map(shard_reader.read_row_group, part)) for part in groups)
    assert other["image"].null_count == other.num_rows == one.num_rows
    assert one.drop_columns(["image", "uri"]).equals(other.drop_columns(["image", "uri"]))


@pytest.mark.parametrize("framed", [False, True])
def test_training_rows_are_the_same(both: dict[str, DatasetInfo], framed: bool):
    def walk(info: DatasetInfo) -> pa.Table:
        order = epoch_order.EpochOrder.of(row_groups(info, "train"), 3, 2**20)
        columns = tuple(run_stream.training_columns("segmentation", info))
        framing = FrameRows(InputSettings(size=(32, 32)), 3) if framed else None
        expand = run_stream.ExpandUnits(order, columns, 0, 25, Ledger().to_bytes(), 4, "", framing)
        return pa.concat_tables(list(expand({"id": np.arange(3 * order.windows)})))

    found = walk(both["referenced"])
    assert found["position"].to_pylist() == list(range(25))
    assert found.equals(walk(both["packed"]))


def test_validation_rows_are_the_same(both: dict[str, DatasetInfo]):
    def rows(info: DatasetInfo, rank: int) -> pa.Table:
        columns = run_stream.training_columns("segmentation", info)
        return pa.concat_tables(validation.rows_of_rank(info, "val", rank, 2, columns))

    for rank in (0, 1):
        assert rows(both["referenced"], rank).equals(rows(both["packed"], rank))


def test_cached_frames_of_referenced_images(both: dict[str, DatasetInfo]):
    def frames(info: DatasetInfo) -> pa.Table:
        groups = row_groups(info, "train")
        order = epoch_order.EpochOrder.of(groups, 3, 2**20)
        rest = epoch_order.plan_remaining_rows(Ledger(), order.rows, 4)
        framing = FrameRows(InputSettings(size=(32, 32)), 3)
        columns = run_stream.training_columns("segmentation", info)
        data = run_stream.dataset(order, rest, Ledger(), columns, 4, "", framing, cached=True)
        return pa.concat_tables(list(data.iter_batches(batch_size=4, batch_format="pyarrow")))

    assert frames(both["referenced"]).equals(frames(both["packed"]))


def test_predictions_say_of_each_image_what_became_of_it_and_verify_names_it(ray_local: None, tmp_path: Path):
    data = make_squares(tmp_path, {"test": range(8)}, referenced=True)
    model = make_bundle(tmp_path / "model", UNET)
    whole = verify(data)
    assert (whole["damage"], whole["files"]) == ([], 8 + 2), "8 images, a shard, digests.parquet"
    assert predict(model, data, str(tmp_path / "whole"))["statuses"] == {"ok": 8}
    (tmp_path / "images/image02.png").unlink()
    (tmp_path / "images/image05.png").write_bytes(png(32, 32, 1))
    assert predict(model, data, str(tmp_path / "out"))["statuses"] == {"ok": 6, "missing": 1, "corrupt": 1}
    rows = {row["image_id"]: row for row in predictions.read(str(tmp_path / "out")).to_pylist()}
    assert {name: row["status"] for name, row in rows.items() if row["status"] != "ok"} == {
        "image02.png": "missing", "image05.png": "corrupt",
    }  # fmt: skip
    assert "sha256 differs" in rows["image05.png"]["error"]
    problems = {Path(item["file"]).name: item["problem"].split(":")[0] for item in verify(data)["damage"]}
    assert problems == {"image02.png": "missing", "image05.png": "corrupt"}


def test_a_format_that_makes_its_images_has_nothing_to_refer_to(tmp_path: Path):
    with pytest.raises(InputError, match="format 'demo' makes its images"):
        ingest.ingest("demo", None, None, str(tmp_path / "out"), options={"images": 4, "referenced": True})
