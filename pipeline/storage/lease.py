"""One at a time, as a courtesy: an advisory lock with an expiry, of files that are made once.

``<folder>/<n:06>.json`` names a holder; its lease is renewed in ``<n:06>-<holder>.json``, which only the holder writes.
The next number may be made once the last lease is given back or has run out, by the clocks of those who ask, which are
taken to agree within a minute or so. What a lock guards must be right without it: a holder that was suspended past its
lease, and wakes, is not stopped.
"""

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from pipeline import storage
from pipeline.errors import InputError

RENEWALS = 4
"""In the time of a lease."""


@contextlib.contextmanager
def hold_lease(folder: str, what: str, lease_s: float) -> Iterator[str]:
    """Hold the lock while the block runs.

    Args:
        folder: URI of the lock's files.
        what: What is done, for others to read.
        lease_s: How long others wait for a holder that died.

    Raises:
        InputError: Somebody else holds it: who, since when, until when.
    """
    holder = secrets.token_hex(8)
    number = _acquire(folder, holder, what, lease_s)
    renewed = storage.join(folder, f"{number:06d}-{holder}.json")
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(lease_s / RENEWALS):
            with contextlib.suppress(OSError):  # asked again a moment later
                storage.write_bytes(renewed, _lease(time.time() + lease_s))

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield holder
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):  # others wait for the lease to run out
            storage.write_bytes(renewed, _lease(0.0))


def _lease(until: float) -> bytes:
    return json.dumps({"until": until}).encode()


def _acquire(folder: str, holder: str, what: str, lease_s: float) -> int:
    while True:
        last = _last(folder)
        if last:
            claim = json.loads(storage.read_bytes(storage.join(folder, f"{last:06d}.json")))
            until = _until(folder, last, claim)
            if until > time.time():
                raise InputError(
                    f"{claim['what']} holds the lock '{folder}' on {claim['host']} since {_at(claim['since'])}, until "
                    f"{_at(until)} at least; wait for it, or for that time if it died"
                )
        now = time.time()
        claim = {"holder": holder, "what": what, "host": socket.gethostname(), "since": now, "until": now + lease_s}
        if storage.create_once(storage.join(folder, f"{last + 1:06d}.json"), json.dumps(claim).encode()):
            return last + 1


def _last(folder: str) -> int:
    numbers = [name[:6] for name in storage.names_in(folder) if len(name) == len("000001.json")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _until(folder: str, number: int, claim: dict[str, float]) -> float:
    """When the lease runs out, as last renewed."""
    try:
        renewed = storage.read_bytes(storage.join(folder, f"{number:06d}-{claim['holder']}.json"))
    except FileNotFoundError:
        return claim["until"]
    return json.loads(renewed)["until"]


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
