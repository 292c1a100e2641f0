"""Calls to a store that fails for a while are made again, until it answers or patience ends."""

import logging
import math
import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.environment import storage_patience_s
from pipeline.errors import one_line

T = TypeVar("T")
DEFAULT_PATIENCE_S = 120.0
"""Seconds for which a failing call is made again; ``DUBITO_STORAGE_PATIENCE_S`` overrides it."""
FIRST_WAIT_S = 10.0
"""Seconds for which a job's calls are made again until its store has answered once."""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0

log = logging.getLogger("dubito.storage")


class Patience:
    """How long failing calls are made again, which depends on whether the store has ever answered.

    An endpoint that never answered is more likely a wrong one than one that is down: the process of a job, in front
    of which a person may sit, then gives up early. Workers, which start long after the job found its store, never do.
    """

    def __init__(self) -> None:
        self._first_wait_s = math.inf
        self._answered = False

    def shorten_first_wait(self, wait_s: float = FIRST_WAIT_S) -> None:
        """Give up after ``wait_s`` for as long as no call has succeeded."""
        self._first_wait_s = wait_s

    def note_answer(self) -> None:
        """A call succeeded: from now on the store is known to be there."""
        self._answered = True

    def limit_s(self) -> float:
        """Seconds from the first try of a call in which it may be made again."""
        patience_s = storage_patience_s(DEFAULT_PATIENCE_S)
        return patience_s if self._answered else min(patience_s, self._first_wait_s)


PROCESS_PATIENCE = Patience()
"""That of this process: whether a store has answered is known of a process, not of a call."""


def error_status(error: BaseException) -> str:
    """One of the words of ``schema.STATUSES`` for an error met while reading an object."""
    if isinstance(error, (FileNotFoundError, IsADirectoryError)):
        return "missing"
    if isinstance(error, PermissionError):
        return "forbidden"
    if isinstance(error, TimeoutError):
        return "timeout"
    text = str(error).lower()
    if isinstance(error, OSError):
        if any(word in text for word in _FORBIDDEN):
            return "forbidden"
        if "timeout" in text or "timed out" in text:
            return "timeout"
        if any(word in text for word in _MISSING):
            return "missing"
    return "error"


_FORBIDDEN = ("access_denied", "forbidden", "403", "acl_", "invalid_access_key", "signature")
_MISSING = ("not found", "no_such_key", "no_such_bucket", "404")


def is_transient(error: BaseException) -> bool:
    """Whether an error of storage may go away by itself."""
    # Of what is no OSError only the network's own: botocore and aiohttp let such errors through as they are.
    network = type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp")
    return (network or isinstance(error, OSError)) and error_status(error) in ("timeout", "error")


def retry_call(call: Callable[[], T], what: str, patience: Patience = PROCESS_PATIENCE) -> T:
    """``call()``, made again while the error that it raises is transient and there is patience left.

    Pauses double from ``FIRST_PAUSE_S`` to ``LONGEST_PAUSE_S``; up to half of each is taken off at random, because
    many processes that wait for the same store must not come back at the same moment.

    Args:
        call: May be called more than once.
        what: What is called, for the log.
        patience: For how long; it is told of the success.

    Raises:
        Exception: The last one that the call raised.
    """
    began = time.monotonic()
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            result = call()
        except Exception as error:
            left_s = patience.limit_s() - (time.monotonic() - began)
            if left_s <= 0 or not is_transient(error):
                raise
            text = one_line(f"{type(error).__name__}: {error}")
            log.warning("%s: %s; trying again for up to %.0f s", what, text, left_s)
            time.sleep(min(left_s, pause_s * random.uniform(0.5, 1)))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        else:
            patience.note_answer()
            return result
