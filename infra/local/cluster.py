"""A Ray cluster and its object store on this machine: a head, worker nodes, an S3 server, a token.

``python -m infra.local.cluster`` runs it in the foreground until Ctrl-C and prints the lines to export; in a test:
``with local_cluster() as cluster: ...``. Every node is a Ray node of its own, in processes of its own, and where root
allows (``--namespaces``) with a network address of its own.
"""

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.network import Network, network
from infra.local.s3_server import environment, free_ports, make_bucket, s3_server

START_S = 90.0
STORE_BYTES = 300 * 2**20
BUCKET = "data"


@dataclass
class Node:
    """One Ray node: everything it starts is in one process group."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path
    space: str | None = None
    """Its network namespace, where it has one."""

    def kill(self) -> None:
        """SIGKILL for all of the node, as if its power went."""
        for pid in _descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class LocalCluster:
    """A running cluster."""

    dashboard: str
    """URL for ``--submit``."""
    port: int
    host: str
    variables: dict[str, str]
    """What a client needs in its environment: token, object store."""
    root: Path
    cpus: int
    net: Network | None
    head: Node
    workers: list[Node] = field(default_factory=list)

    def add_worker(self) -> Node:
        """Start one more worker node; returns once its process runs, not once Ray knows of it."""
        space, address = self.net.add() if self.net is not None else (None, self.host)
        number = len(self.workers) + 1
        # Nodes that start at once would take the same names for their sockets in one folder.
        temp_option = f"--temp-dir={self.root}/ray-{number}"
        options = [f"--address={self.host}:{self.port}", f"--num-cpus={self.cpus}", temp_option]
        node = _start(options, address, self.variables, self.root / f"worker-{number}.log", space)
        self.workers.append(node)
        return node

    def wait(self, nodes: int, seconds: float = START_S) -> None:
        """Until Ray counts so many living nodes, the head among them.

        Raises:
            RuntimeError: It does not, in that time.
        """
        end, alive = time.monotonic() + seconds, None
        while alive != nodes:
            if time.monotonic() > end:
                raise RuntimeError(f"wanted {nodes} Ray nodes, found {alive}; see the logs in {self.root}")
            time.sleep(0.3)
            with contextlib.suppress(OSError):  # a head under load answers late
                alive = self.alive()

    def alive(self) -> int:
        """Living nodes, as the head says."""
        answer = json.loads(_get(f"{self.dashboard}/nodes?view=summary", self.variables))
        return sum(row["raylet"].get("state") == "ALIVE" for row in answer["data"]["summary"])


@contextlib.contextmanager
def local_cluster(
    workers: int = 2,
    cpus: int = 4,
    root: Path | None = None,
    namespaces: bool = False,
    more: Mapping[str, str] | None = None,
    dashboard: int = 0,
) -> Iterator[LocalCluster]:
    """A cluster while the block runs: a head without CPUs, ``workers`` nodes, and the bucket ``s3://data``.

    Args:
        workers: Worker nodes at the start.
        cpus: Logical CPUs of each.
        root: Folder of the object store's data, kept afterwards; temporary without one.
        namespaces: Give each worker a network of its own; wants root.
        more: Further environment variables of every node.
        dashboard: Port for ``--submit``; 0, or one that is taken: any.

    Raises:
        RuntimeError: A part did not start; its log is quoted.
    """
    # Sockets of Ray lie below it, and their paths may have 107 characters.
    home = Path(tempfile.mkdtemp(prefix="dubito-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        net = stack.enter_context(network()) if namespaces else None
        host = net.host if net is not None else "127.0.0.1"
        server = stack.enter_context(s3_server(root, host))
        make_bucket(server, BUCKET)
        token = home / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        variables = {**environment(server), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        variables |= more or {}
        port, dashboard_port = free_ports(2, host)
        dashboard_port = dashboard if dashboard and _is_free(host, dashboard) else dashboard_port
        options = [
            *("--head", f"--port={port}", f"--dashboard-host={host}", f"--dashboard-port={dashboard_port}"),
            *("--num-cpus=0", f"--temp-dir={home}/ray", "--include-dashboard=true"),
        ]
        head = _start(options, host, variables, home / "head.log", None)
        url = f"http://{host}:{dashboard_port}"
        cluster = LocalCluster(url, port, host, variables, home, cpus, net, head)
        try:
            _wait_until_up(cluster)
            for _ in range(workers):
                cluster.add_worker()
            cluster.wait(workers + 1)
            yield cluster
        finally:
            for node in [*cluster.workers, head]:  # nothing of it is to be kept
                node.kill()


def _start(options: list[str], address: str, variables: dict[str, str], log: Path, space: str | None) -> Node:
    bin_folder = sysconfig.get_path("scripts")
    ours = {"PATH": f"{bin_folder}:{os.environ.get('PATH', '')}", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--block", "--disable-usage-stats",
        f"--node-ip-address={address}", f"--object-store-memory={STORE_BYTES}",
        f"--dashboard-agent-listen-port={free_ports(1)[0]}",
    ]  # fmt: skip
    where = ["ip", "netns", "exec", space] if space else []
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*where, *command], env={**kept, **ours, **variables}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    return Node(process, address, log, space)


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) != 0


def _descendants(pid: int) -> list[int]:
    """``pid`` and all below it, the deepest last; processes that ended meanwhile are left out."""
    processes = [pid]
    for process in processes:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{process}/task").iterdir():
                processes += [int(child) for child in (task / "children").read_text().split()]
    return processes


def _get(url: str, variables: dict[str, str]) -> bytes:
    token = Path(variables["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=15) as answer:
        return answer.read()


def _wait_until_up(cluster: LocalCluster) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            _get(f"{cluster.dashboard}/api/version", cluster.variables)
            return
        except (urllib.error.URLError, OSError):
            ended = cluster.head.process.poll() is not None
            if ended or time.monotonic() > end:
                text = cluster.head.log.read_text()[-2000:]
                raise RuntimeError(f"the head {'ended' if ended else 'did not answer in time'}:\n{text}") from None
            time.sleep(0.2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a cluster in the foreground until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.cluster", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="worker nodes")
    parser.add_argument("--cpus", type=int, default=4, help="logical CPUs of each worker node")
    parser.add_argument("--root", type=Path, help="folder of the object store's data, kept; default: temporary")
    parser.add_argument("--namespaces", action="store_true", help="a network of its own for each worker; wants root")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with (
        contextlib.suppress(KeyboardInterrupt),
        local_cluster(options.workers, options.cpus, options.root, options.namespaces, dashboard=8265) as cluster,
    ):
        for name, value in cluster.variables.items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        print(f"export RAY_API_SERVER_ADDRESS={cluster.dashboard}", flush=True)
        print(f"# ready: {len(cluster.workers)} workers; dubito VERB ... --submit {cluster.dashboard}", flush=True)
        print("# data belongs into s3://data; Ctrl-C stops all of it", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
