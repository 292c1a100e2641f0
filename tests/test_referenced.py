"""Images that a dataset only refers to: fetched, checked, told apart where they cannot be had."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import referenced, storage
from pipeline.errors import InputError
from tests.tiny import png


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
    found = referenced.fetch("/x/a.png")
    assert (found.data, found.status) == (None, word)
    assert str(error) in (found.error or "")


def test_other_bytes_than_were_ingested_are_corrupt_but_asked_for_twice(monkeypatch: pytest.MonkeyPatch):
    answers = [b"damaged on the way", b"image"]
    monkeypatch.setattr(storage, "read_bytes", lambda uri, most: answers.pop(0))
    digest = hashlib.sha256(b"image").hexdigest()
    assert referenced.fetch("/x/a.png", sha256=digest).data == b"image"
    monkeypatch.setattr(storage, "read_bytes", lambda uri, most: b"another image")
    found = referenced.fetch("/x/a.png", sha256=digest)
    assert (found.data, found.status) == (None, "corrupt")


def test_huge_files_are_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(referenced, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(bytes(200))
    assert referenced.fetch(str(tmp_path / "a.png")).status == "error"
    monkeypatch.setattr(storage, "read_bytes", lambda uri, most: pytest.fail("read"))
    assert referenced.fetch("/x/a.png", size=200).status == "error"


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
    out = referenced.fill(table.set_column(3, "image", packed))
    assert out["image"].to_pylist() == [png(8, 8, 0), None, None, b"packed"]
    assert out["status"].to_pylist() == ["ok", "missing", "corrupt", "ok"]


def test_rows_to_train_on_come_in_order_a_bounded_number_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(referenced, "AHEAD", 6)
    asked: list[int] = []

    def tables() -> Any:
        for k in range(10):
            asked.append(k)
            yield rows(tmp_path, 3, first=3 * k)

    for k, table in enumerate(referenced.require(tables())):
        assert table.column_names == ["image_id", "image"]
        assert table["image"].to_pylist() == [png(8, 8, 3 * k + n) for n in range(3)]
        assert len(asked) <= k + 3, "no more than 6 images ahead"
    assert asked == list(range(10))


def test_a_row_to_train_on_whose_image_is_gone_names_it(tmp_path: Path):
    table = rows(tmp_path, 3)
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match=r"image '1\.png' of the dataset is missing at '.*1\.png'.*ingest again"):
        list(referenced.require([table]))
