"""Machines of their own for the nodes of a local cluster: Linux network namespaces on one bridge. Wants root."""

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SPACES = Path("/etc/netns")
"""Files below ``SPACES/<namespace>`` stand for those of /etc in it (ip-netns(8))."""


@dataclass
class Network:
    """A private network: ``host`` is this machine's address in it; each namespace has one of its own."""

    name: str
    subnet: str
    spaces: list[str] = field(default_factory=list)

    @property
    def host(self) -> str:
        """This machine's address."""
        return f"{self.subnet}.1"

    def add(self) -> tuple[str, str]:
        """A new namespace on the bridge: (its name, its address)."""
        number = len(self.spaces) + 2
        space, address = f"{self.name}n{number}", f"{self.subnet}.{number}"
        _ip("netns", "add", space)
        self.spaces.append(space)
        # Its own loopback refuses at once; the machine's server is not reached from here, and asking it takes 10 s.
        (SPACES / space).mkdir(parents=True)
        (SPACES / space / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        _ip("link", "add", f"{space}a", "type", "veth", "peer", "name", f"{space}b")
        _ip("link", "set", f"{space}b", "netns", space)
        _ip("link", "set", f"{space}a", "master", self.name, "up")
        for what in (
            ("addr", "add", f"{address}/24", "dev", f"{space}b"),
            ("link", "set", f"{space}b", "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", self.host),
        ):
            _ip("-netns", space, *what)
        return space, address

    def cut(self, space: str) -> None:
        """Take a namespace off the network without a word to anybody, as a dead switch would."""
        _ip("link", "set", f"{space}a", "down")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def allowed() -> bool:
    """Whether this process may make namespaces, files for them, and bridges."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"dt{secrets.token_hex(2)}"
    try:
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "bridge")
        (SPACES / name).mkdir(parents=True)
    except OSError:
        return False
    finally:
        shutil.rmtree(SPACES / name, ignore_errors=True)
        for what in (("netns", "del", name), ("link", "del", name)):
            with contextlib.suppress(OSError):
                _ip(*what)
    return True


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A private network while the block runs.

    Raises:
        OSError: It may not be made here (see ``allowed``).
    """
    name, third = f"db{secrets.token_hex(2)}", secrets.randbelow(250) + 2
    bridge = Network(name, f"10.213.{third}")
    _ip("link", "add", name, "type", "bridge")
    try:
        _ip("addr", "add", f"{bridge.host}/24", "dev", name)
        _ip("link", "set", name, "up")
        yield bridge
    finally:
        for space in bridge.spaces:
            with contextlib.suppress(OSError):
                _ip("netns", "del", space)
            shutil.rmtree(SPACES / space, ignore_errors=True)
        with contextlib.suppress(OSError):
            _ip("link", "del", name)
