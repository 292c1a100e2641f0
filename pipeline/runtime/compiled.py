"""torch.compile with a way back: what cannot be compiled runs as it is, with one warning.

Its own file, since it imports torch, which reading tasks do without.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

MAX_REASON_CHARS = 300
"""Most characters of a compiler's error that the warning repeats."""


def compile_static(function: Callable[..., Any], backend: Any = "inductor", fullgraph: bool = False) -> Any:
    """``function`` compiled for one input shape at a time; the compiler runs at the first call with each."""
    return torch.compile(function, dynamic=False, fullgraph=fullgraph, backend=backend)


class CompileFallback:
    """Takes the compiled way until it fails once; from then on the plain way.

    Args:
        subject: What runs, as the beginning of the warning.
        log: Who warns.
    """

    def __init__(self, subject: str, log: logging.Logger) -> None:
        self.subject, self.log = subject, log
        self.failed = False
        """Whether compiling has failed."""

    def run(self, compiled: Callable[[], Any], plain: Callable[[], Any]) -> Any:
        """What ``compiled()`` gives, or ``plain()`` where compiling fails or has failed.

        Raises:
            torch.OutOfMemoryError: Says nothing of the compiler, so there is no second try.
        """
        if self.failed:
            return plain()
        try:
            return compiled()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise almost anything; a fault of the function itself is raised below
            self.failed = True
            first_line = (str(error).splitlines() or [""])[0][:MAX_REASON_CHARS]
            reason = f"{type(error).__name__}: {first_line}"
            self.log.warning("%s runs uncompiled, and slower, since torch.compile failed: %s", self.subject, reason)
        return plain()
