"""Storage that hiccups, or is gone for a minute: a call is made again until it answers or patience ends."""

import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import one_line

T = TypeVar("T")
VARIABLE = "DUBITO_STORAGE_PATIENCE_S"
DEFAULT_S = 120.0
"""Seconds for which a call is made again; the variable above overrides it."""
FIRST_S = 10.0
"""The same for the very first call of a job: an endpoint that never answered is more likely a wrong one."""
LONGEST_PAUSE_S = 10.0

log = logging.getLogger("dubito.storage")
_state = {"limit": None, "answered": False}


def shorten_first_wait() -> None:
    """In a job's own process: wait only ``FIRST_S`` until storage has answered once."""
    _state["limit"] = FIRST_S


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


def retry_call(call: Callable[[], T], what: str) -> T:
    """``call()``, again and again while what it raises is ``transient`` and there is patience left.

    Pauses double from 0.2 s to ``LONGEST_PAUSE_S``, half of each drawn at random: many processes that wait for the
    same store must not come back at the same moment.

    Args:
        call: May be called more than once.
        what: For the log.

    Raises:
        Exception: The last one that the call raised.
    """
    began, pause = time.monotonic(), 0.2
    while True:
        try:
            result = call()
        except Exception as error:
            left = _limit() - (time.monotonic() - began)
            if left <= 0 or not is_transient(error):
                raise
            text = one_line(f"{type(error).__name__}: {error}")
            log.warning("%s: %s; trying again for up to %.0f s", what, text, left)
            time.sleep(min(left, pause * random.uniform(0.5, 1)))
            pause = min(2 * pause, LONGEST_PAUSE_S)
        else:
            _state["answered"] = True
            return result


def _limit() -> float:
    whole = float(os.environ.get(VARIABLE) or DEFAULT_S)
    first = _state["limit"]
    return whole if first is None or _state["answered"] else min(whole, first)
