"""What runs around the pipeline: the pinned versions, the local S3 server."""

import os
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from infra.local.s3_server import binary, environment, make_bucket, s3_server
from pipeline import storage

ROOT = Path(__file__).resolve().parents[2]

needs_server = pytest.mark.skipif(binary() is None, reason="no SeaweedFS binary for this platform")


def test_every_direct_dependency_is_pinned():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert all(text.startswith("==") for text in versions.values())
    for requirement in map(Requirement, wanted):
        pinned = versions[canonicalize_name(requirement.name)]
        assert pinned.removeprefix("==") in requirement.specifier, requirement


@needs_server
def test_two_servers_do_not_answer_for_each_other(monkeypatch: pytest.MonkeyPatch):
    with s3_server() as one, s3_server() as two:
        assert one["endpoint"] != two["endpoint"]
        for server in (one, two):
            monkeypatch.setattr(os, "environ", os.environ | environment(server))
            uri = make_bucket(server, "data")
            storage.write_bytes(f"{uri}/x", server["endpoint"].encode())
            assert storage.read_bytes(f"{uri}/x") == server["endpoint"].encode()
        crossed = environment(one) | {"AWS_ENDPOINT_URL": two["endpoint"]}
        monkeypatch.setattr(os, "environ", os.environ | crossed)
        with pytest.raises(OSError) as caught:  # noqa: PT011 - classified below
            storage.read_bytes("s3://data/x")
        assert storage.error_status(caught.value) == "forbidden"
        monkeypatch.setattr(os, "environ", os.environ | environment(two, read_only=True))
        assert storage.read_bytes("s3://data/x") == two["endpoint"].encode()
        with pytest.raises(OSError):  # noqa: PT011
            storage.write_bytes("s3://data/x", b"mine")
    for server in (one, two):
        assert not server["root"].exists()
        with pytest.raises(ProcessLookupError):
            os.kill(server["pid"], 0)


def test_conditional_put_has_one_winner(s3: str):
    filesystem, path = storage.generic(f"{s3}/infra/once")
    barrier, won, lost = threading.Barrier(6), [], []

    def put(writer: int) -> None:
        barrier.wait()
        try:
            filesystem.pipe_file(path, b"%d" % writer, mode="create")
            won.append(writer)
        except OSError:
            lost.append(writer)

    threads = [threading.Thread(target=put, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == 5
    assert storage.read_bytes(f"{s3}/infra/once") == b"%d" % won[0]


@needs_server
def test_the_command_prints_what_to_export_and_keeps_its_folder(tmp_path: Path):
    def run(body: Callable[[dict[str, str]], None]) -> None:
        command = [sys.executable, "-m", "infra.local.s3_server", "--root", str(tmp_path), "--bucket", "data"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            try:
                assert process.stdout is not None
                lines = list(iter(process.stdout.readline, "# ready; Ctrl-C stops the server\n"))
                body(dict(line.removeprefix("export ").strip().split("=", 1) for line in lines))
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0

    def client(names: dict[str, str]) -> pafs.FileSystem:
        return pafs.S3FileSystem(
            access_key=names["AWS_ACCESS_KEY_ID"],
            secret_key=names["AWS_SECRET_ACCESS_KEY"],
            endpoint_override=names["AWS_ENDPOINT_URL"].removeprefix("http://"),
            scheme="http",
            region=names["AWS_REGION"],
        )

    def write(names: dict[str, str]) -> None:
        with client(names).open_output_stream("data/kept") as stream:
            stream.write(b"still here")

    def read(names: dict[str, str]) -> None:
        with client(names).open_input_stream("data/kept") as stream:
            assert stream.read() == b"still here"

    run(write)
    run(read)
