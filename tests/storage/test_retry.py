"""Storage that answers wrongly now and then, or not at all for a while: nothing is lost, doubled or changed."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local.fault_proxy import FaultProxy, Kind, Rule
from pipeline import environment, storage
from pipeline.datasets import shard_reader
from pipeline.datasets.dataset import open_dataset, row_groups
from pipeline.errors import InputError
from pipeline.storage import retry
from tests.support.tiny import make_squares


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


FAULTS: list[Kind] = ["status", "reset", "lost", "truncate"]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fifth_of_all_requests_fails_and_every_object_is_right(proxy: FaultProxy, s3: str, kind: Kind):
    rule = proxy.add(Rule(kind, share=0.2, seed=4))
    folder = storage.join(s3, f"faults-{kind}")
    contents = {f"{n:02d}.bin": bytes([n]) * 5000 for n in range(6)}
    for name, content in contents.items():
        storage.write_bytes(storage.join(folder, name), content)
    assert [item.path for item in storage.list_files(folder)] == sorted(contents)
    for name, content in contents.items():
        assert storage.read_bytes(storage.join(folder, name)) == content
    assert storage.exists(storage.join(folder, "00.bin"))
    assert not storage.exists(storage.join(folder, "99.bin"))
    assert rule.fired > 1


@pytest.mark.parametrize("kind", FAULTS)
def test_of_racing_commits_through_faults_one_wins_and_knows_it(proxy: FaultProxy, s3: str, kind: Kind):
    proxy.add(Rule(kind, share=0.2, seed=4))
    uri = storage.join(s3, f"commit-{kind}")
    won: list[bytes] = []

    def commit(n: int) -> None:
        if storage.create_once(uri, b"writer %d" % n):
            won.append(b"writer %d" % n)

    threads = [threading.Thread(target=commit, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.rules.clear()
    assert won == [storage.read_bytes(uri)]


def test_storage_that_is_gone_for_a_while_is_waited_for(proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch):
    uri = storage.join(s3, "back-again")
    storage.write_bytes(uri, b"x")
    monkeypatch.setenv(environment.STORAGE_PATIENCE_S, "20")
    proxy.add(Rule("gone"))
    threading.Timer(2, proxy.rules.clear).start()
    began = time.monotonic()
    assert storage.read_bytes(uri) == b"x"
    assert storage.create_once(uri, b"y") is False
    assert 1.5 < time.monotonic() - began < 15


def test_patience_ends(proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(environment.STORAGE_PATIENCE_S, "1")
    proxy.add(Rule("gone"))
    with pytest.raises(InputError, match="could not be listed: .*endpoint"):
        storage.list_files(storage.join(s3, "nowhere"))


def test_a_first_call_that_is_never_answered_is_given_up_early(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(environment.STORAGE_PATIENCE_S, "30")
    patience = retry.Patience()
    patience.shorten_first_wait(0.5)
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise OSError("AWS Error NETWORK_CONNECTION")

    began = time.monotonic()
    with pytest.raises(OSError, match="NETWORK"):
        retry.retry_call(fail, "here", patience)
    assert time.monotonic() - began < 5
    assert len(calls) > 1
    patience.note_answer()
    assert patience.limit_s() == 30, "a store that has answered once is worth waiting for"


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("x"), InputError("x"), ValueError("x")])
def test_what_will_not_change_is_not_tried_again(error: Exception):
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        retry.retry_call(fail, "here")
    assert calls == [1]


def test_a_shard_is_read_through_faults_and_a_bit_flipped_on_the_way_is_read_again(
    proxy: FaultProxy, s3: str, ray_local: None, tmp_path: Path
):
    local = make_squares(tmp_path, {"train": range(6)})
    uri = storage.join(s3, "shards")
    for file in storage.list_files(local):
        storage.write_bytes(storage.join(uri, file.path), storage.read_bytes(storage.join(local, file.path)))
    group = row_groups(open_dataset(uri), "train")[0]
    whole = shard_reader.read_row_group(group)
    for rule in (
        Rule("corrupt", path="parquet", method="GET", times=1),
        Rule("status", share=0.3),
        Rule("reset", share=0.3),
    ):
        proxy.add(rule)
        assert shard_reader.read_row_group(group).equals(whole)
        proxy.clear()
    proxy.add(Rule("corrupt", path="parquet", method="GET"))
    with pytest.raises(InputError, match="damaged; ingest again"):
        shard_reader.read_row_group(group)
