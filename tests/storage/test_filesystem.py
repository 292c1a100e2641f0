"""Storage on the local filesystem and on a real S3 server: the same calls, the same answers."""

import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline import storage
from pipeline.errors import InputError
from pipeline.storage import Listed


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of its own at either kind of URI."""
    if request.param == "file":
        return str(tmp_path / "root")
    return storage.join(request.getfixturevalue("s3"), "storage", tmp_path.name)


def test_what_is_written_is_read(root: str):
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    assert storage.exists(uri)
    assert storage.exists(storage.join(root, "a"))
    assert storage.read_bytes(uri) == b"one"
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""


def test_files_are_listed_by_relative_path_sorted_hidden_left_out(root: str):
    for name in ("b.JPG", "a/z.png", "a.png", "a/b/c.txt", ".hidden", "a-1.png"):
        storage.write_bytes(storage.join(root, name), b"x" * len(name))
    names = [row.path for row in storage.list_files(root)]
    assert names == sorted(["b.JPG", "a/z.png", "a.png", "a/b/c.txt", "a-1.png"])
    assert storage.list_files(root, (".jpg",)) == [Listed("b.JPG", 5)]
    assert storage.list_files(root + "/", (".txt",)) == [Listed("a/b/c.txt", 9)]


def test_a_missing_folder_and_a_file_are_no_folders(root: str):
    with pytest.raises(InputError, match=r"^folder '.*nowhere' not found; check the path"):
        storage.list_files(storage.join(root, "nowhere"))
    uri = storage.join(root, "file.txt")
    storage.write_bytes(uri, b"x")
    with pytest.raises(InputError, match=r"file.txt' is a file; wanted a folder"):
        storage.list_files(uri)


def test_missing_and_unreadable_text_is_said_in_one_sentence(root: str):
    uri = storage.join(root, "list.txt")
    with pytest.raises(InputError, match=r"^list of images '.*list.txt' not found; check the path"):
        storage.read_text(uri, "list of images")
    storage.write_bytes(uri, b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"is not UTF-8 text$"):
        storage.read_text(uri, "list of images")
    storage.write_bytes(uri, "grün".encode())
    assert storage.read_text(uri, "list") == "grün"


def test_publish_shows_nothing_when_its_block_fails(root: str):
    uri = storage.join(root, "part", "big.bin")

    def write_a_part() -> None:
        with storage.publish(uri) as stream:
            stream.write(b"half of it")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_a_part()
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError, match="killed"):
        write_a_part()
    assert storage.read_bytes(uri) == b"old"
    assert [row.path for row in storage.list_files(root)] == ["part/big.bin"]


def test_publish_gives_a_stream_that_parquet_writers_take(root: str):
    uri = storage.join(root, "t.parquet")
    table = pa.table({"x": [1, 2, 3]})
    with storage.publish(uri) as stream:
        parquet.write_table(table, stream)
    with storage.open_input(uri) as file:
        assert parquet.read_table(file).equals(table)


def test_only_the_first_commit_counts(root: str):
    uri = storage.join(root, "deep", "_MANIFEST.json")
    assert storage.create_once(uri, b"first")
    assert not storage.create_once(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    # A lost answer is tried again: what is there may be our own.
    assert storage.create_once(uri, b"first")
    assert [row.path for row in storage.list_files(root)] == ["deep/_MANIFEST.json"]


def test_of_many_committers_one_wins(root: str):
    for race in range(4):
        uri = storage.join(root, f"race-{race}")
        barrier, won = threading.Barrier(8), []

        def commit(writer: int, uri: str = uri, barrier: threading.Barrier = barrier, won: list = won) -> None:
            barrier.wait()
            if storage.create_once(uri, b"writer %d" % writer):
                won.append(writer)

        threads = [threading.Thread(target=commit, args=(writer,)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert storage.read_bytes(uri) == b"writer %d" % won[0]


RACER = """
import os, sys, time
from pipeline import storage
roots, writer, start = sys.argv[1].split(), sys.argv[2], sys.argv[3]
[storage.create_once(f"{root}/warm-{writer}", b"up") for root in roots]  # connected before the race
print("ready", flush=True)
while not os.path.exists(start):
    time.sleep(0.001)
for root in roots:
    for race in range(8):
        if storage.create_once(f"{root}/race-{race}", f"writer {writer}".encode()):
            print("won", root, race, flush=True)
"""


def test_of_sixteen_processes_that_commit_one_wins_on_s3_and_on_a_local_folder(s3: str, tmp_path: Path):
    roots, start = [storage.join(s3, "sixteen"), str(tmp_path / "sixteen")], tmp_path / "start"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, " ".join(roots), str(writer), str(start)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2],
        )
        for writer in range(16)
    ]  # fmt: skip
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        start.touch()
        said = [racer.communicate(timeout=60)[0] for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    won = {tuple(line.split()[1:]): writer for writer, text in enumerate(said) for line in text.splitlines()}
    assert sum(len(text.splitlines()) for text in said) == len(won) == 2 * 8, "one winner each"
    for (root, race), writer in won.items():
        assert storage.read_bytes(f"{root}/race-{race}") == f"writer {writer}".encode()


def test_a_missing_object_is_classified_missing(root: str):
    with pytest.raises(OSError) as caught:  # noqa: PT011 - what it says differs by filesystem
        storage.read_bytes(storage.join(root, "none.jpg"))
    assert storage.error_status(caught.value) == "missing"


def test_wrong_credentials_are_forbidden_and_named(s3: str, monkeypatch: pytest.MonkeyPatch):
    uri = storage.join(s3, "secret.txt")
    storage.write_bytes(uri, b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(OSError) as caught:  # noqa: PT011
        storage.read_bytes(uri)
    assert storage.error_status(caught.value) == "forbidden"
    with pytest.raises(InputError, match=r"could not be listed: .*AWS_ENDPOINT_URL\) and the credentials$"):
        storage.list_files(s3)
    with pytest.raises(InputError, match=r"list '.*' could not be read: "):
        storage.read_text(uri, "list")


def test_a_commit_that_could_not_be_made_is_an_error_and_no_answer(s3: str, monkeypatch: pytest.MonkeyPatch):
    uri = storage.join(s3, "refused")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(OSError, match="refused"):
        storage.create_once(uri, b"x")


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (FileNotFoundError("x"), "missing"),
        (PermissionError("x"), "forbidden"),
        (TimeoutError("x"), "timeout"),
        (OSError("AWS Error ACCESS_DENIED during HeadObject"), "forbidden"),
        (OSError("curlCode: 28, Timeout was reached"), "timeout"),
        (OSError("AWS Error NO_SUCH_KEY"), "missing"),
        (OSError("connection reset by peer"), "error"),
        (ValueError("timeout"), "error"),
    ],
)
def test_errors_are_told_apart(error: BaseException, word: str):
    assert storage.error_status(error) == word


def test_absolute_means_the_same_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.absolute("data/") == str(tmp_path / "data")
    assert storage.absolute("~/data") == str(tmp_path / "data")
    assert storage.absolute(f"file://{tmp_path}/a b/../c") == str(tmp_path / "c")
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"


def test_a_file_uri_is_a_path_taken_literally(tmp_path: Path):
    (tmp_path / "a b#c%20.txt").write_bytes(b"x")
    assert storage.read_bytes(f"file://{tmp_path}/a b#c%20.txt") == b"x"
    with pytest.raises(InputError, match="'file://data/x': wanted file:///absolute/path, or a plain path"):
        storage.absolute("file://data/x")


def test_an_unknown_scheme_names_the_nearest():
    with pytest.raises(InputError, match=r"'s4://b/k': unknown scheme 's4://'. Did you mean 's3'\?"):
        storage.exists("s4://b/k")


def test_join_adds_segments_with_single_slashes():
    assert storage.join("s3://b/", "/a/", "b.txt") == "s3://b/a/b.txt"
    assert storage.join("/root", "a") == "/root/a"


def test_a_filesystem_without_atomic_creation_is_refused_for_commits():
    with pytest.raises(InputError, match="memory:// cannot commit atomically; use file, s3 or gs"):
        storage.create_once("memory://x/y", b"")
    storage.write_bytes("memory://dubito/x", b"1")
    assert storage.read_bytes("memory://dubito/x") == b"1"
