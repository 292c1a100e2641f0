"""An advisory lock that expires, made of files that are created once: for runs that should not overlap.

``<folder>/<n:06>.json`` names a holder. The holder renews its lease in ``<n:06>-<holder>.json``, which nobody else
writes. File n + 1 may be created once lease n is given back or has run out by the clock of the process that asks;
clocks are taken to agree within a minute. What the lock guards must be right without it: a holder that was suspended
past the end of its lease, and wakes, is not stopped.
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

RENEWALS_PER_LEASE = 4
"""How often a lease is renewed in the time for which it holds: some renewals may fail before it runs out."""


@contextlib.contextmanager
def hold_lease(folder: str, what: str, lease_s: float) -> Iterator[str]:
    """Hold the lock while the block runs.

    Args:
        folder: URI of the lock's files.
        what: What the holder does, for the message to others.
        lease_s: Seconds for which others wait for a holder that died.

    Yields:
        Id of the holder.

    Raises:
        InputError: Somebody else holds it: who, since when, until when.
    """
    holder = secrets.token_hex(8)
    number = _acquire(folder, holder, what, lease_s)
    renewal_uri = storage.join(folder, f"{number:06d}-{holder}.json")
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(lease_s / RENEWALS_PER_LEASE):
            with contextlib.suppress(OSError):  # the next renewal comes in a moment
                storage.write_bytes(renewal_uri, _renewal(time.time() + lease_s))

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield holder
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):  # then others wait until the lease runs out
            storage.write_bytes(renewal_uri, _renewal(0.0))


def _renewal(until: float) -> bytes:
    """Content of the renewal file: ``until``, in seconds since 1970; 0 gives the lease back."""
    return json.dumps({"until": until}).encode()


def _acquire(folder: str, holder: str, what: str, lease_s: float) -> int:
    """Create the next numbered file, which is the lock; returns its number."""
    # Again and again only where another process is faster at creating the same number.
    while True:
        last = _last_number(folder)
        if last:
            claim = json.loads(storage.read_bytes(storage.join(folder, f"{last:06d}.json")))
            runs_out_at = _runs_out_at(folder, last, claim)
            if runs_out_at > time.time():
                raise InputError(
                    f"{claim['what']} holds the lock '{folder}' on {claim['host']} since {_utc_text(claim['since'])}, "
                    f"until {_utc_text(runs_out_at)} at least; wait for it, or for that time if it died"
                )
        now = time.time()
        claim = {"holder": holder, "what": what, "host": socket.gethostname(), "since": now, "until": now + lease_s}
        if storage.create_once(storage.join(folder, f"{last + 1:06d}.json"), json.dumps(claim).encode()):
            return last + 1


def _last_number(folder: str) -> int:
    """Number of the newest lock file; 0 where there is none. Renewal files have longer names."""
    numbers = [name[:6] for name in storage.names_in(folder) if len(name) == len("000001.json")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _runs_out_at(folder: str, number: int, claim: dict[str, float]) -> float:
    """When lease ``number`` runs out, in seconds since 1970: as last renewed, else as first claimed."""
    try:
        renewed = storage.read_bytes(storage.join(folder, f"{number:06d}-{claim['holder']}.json"))
    except FileNotFoundError:
        return claim["until"]
    return json.loads(renewed)["until"]


def _utc_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
