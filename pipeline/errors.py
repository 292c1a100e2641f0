"""Errors that a person meets: what was wanted, what was found, where, and what to do next."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input: the command line prints its one sentence, without a traceback, and exits with 2.

    Built from one string only, so that it crosses process borders by pickle unchanged.
    """


class DoneError(Exception):
    """The output was already committed by the same inputs: said so, exit code 0."""


ONE_LINE_CHARS = 300
"""The longest message of somebody else's error that goes into one of ours."""


def one_line(error: object, limit: int = ONE_LINE_CHARS) -> str:
    """Somebody else's error or text as part of a sentence: without line breaks, cut after ``limit`` characters.

    An exception without a message is named by its type.
    """
    text = " ".join(str(error).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def nearest(name: str, accepted: Iterable[str]) -> str:
    """A hint for a misspelt name: " Did you mean 'x'? Known: x, y." (with a leading blank).

    Args:
        name: What was found.
        accepted: What would have been accepted.
    """
    names = sorted(str(word) for word in accepted)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."


def root_input_error(error: BaseException | None) -> InputError | None:
    """The InputError inside a chain of causes (Ray wraps what a task raises), or None."""
    waiting = [error]
    seen: set[int] = set()  # a chain of contexts may lead back to where it began
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        if type(current) is InputError:
            return current
        seen.add(id(current))
        # Ray's task errors carry the worker's error as ``cause``; Ray Train's hold one for each rank that failed.
        failures = getattr(current, "worker_failures", None)
        inner = [getattr(current, "cause", None), *(failures.values() if isinstance(failures, dict) else [])]
        inner += [current.__cause__, current.__context__]
        waiting += [error for error in inner if isinstance(error, BaseException)]
    return None
