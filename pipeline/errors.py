"""Errors that a person meets: what was wanted, what was found, where, and what to do next."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input: the command line prints its one sentence, without a traceback, and exits with 2.

    Built from one string only, so that it crosses process borders by pickle unchanged.
    """


class DoneError(Exception):
    """The output was already committed by the same inputs: said so, exit code 0."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: " Did you mean 'x'? Known: x, y." (with a leading blank).

    Args:
        name: What was found.
        known: What would have been accepted.
    """
    names = sorted(str(item) for item in known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."


def root_input_error(error: BaseException | None) -> InputError | None:
    """The InputError inside a chain of causes (Ray wraps what a task raises), or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, InputError) and type(error) is InputError:
            return error
        inner = getattr(error, "cause", None) or getattr(error, "training_failed_error", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
    return None
