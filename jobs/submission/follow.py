"""Shows on this machine what a job of a cluster says, until it ends, and finds its exit code."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from pipeline.errors import one_line
from pipeline.runtime.json_log import JsonLogReplay
from pipeline.runtime.progress import JobOutput

RETRY_S = 1.0
"""Seconds between two attempts to follow a log whose connection was lost."""
PATIENCE_S = 120.0
"""Seconds for which a cluster that has stopped to answer is asked again."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, and of a job that was stopped."""


def follow_job(client: Any, name: str, address: str, terminal: JobOutput) -> int:
    """Show what the job says until it ends; returns its exit code. Ctrl-C detaches, and the job goes on.

    Args:
        client: Ray's client of the cluster.
        name: Submission id of the job.
        address: Of the cluster's dashboard, for messages.
        terminal: Where it is shown.

    Raises:
        OSError: The cluster has not answered for ``PATIENCE_S``.
    """
    replay = JsonLogReplay(terminal)
    num_shown = 0

    def show(text: str) -> None:
        nonlocal num_shown
        num_shown += len(text)
        replay.feed(text)

    try:
        info = _show_until_ended(client, name, address, show, lambda: num_shown)
        # The log's last piece may have come after the connection was closed.
        show(client.get_job_logs(name)[num_shown:])
        replay.close()
        return _exit_code(info, name, terminal, list(replay.chatter))
    except KeyboardInterrupt:
        replay.close()
        terminal.say(
            f"detached; job {name} goes on. Follow it with: {jobs_command_line('follow', name, address)}; "
            f"stop it with: {jobs_command_line('stop', name, address)}"
        )
        return INTERRUPTED


def _show_until_ended(
    client: Any, name: str, address: str, show: Callable[[str], None], num_shown: Callable[[], int]
) -> Any:
    """Follow the log, over as many connections as it takes; returns what the cluster knows of the job that ended."""
    silent_since_s: float | None = None
    while True:
        # A connection that is lost ends the tail as the end of the job does: the job's state says which it was.
        with contextlib.suppress(Exception):
            asyncio.run(_tail(client, name, show, num_shown()))
        try:
            info = client.get_job_info(name)
            silent_since_s = None
            if info.status.is_terminal():
                return info
        except Exception as error:  # of the network, in any of its libraries
            now_s = time.monotonic()
            silent_since_s = now_s if silent_since_s is None else silent_since_s
            if now_s - silent_since_s > PATIENCE_S:
                raise OSError(f"the cluster at {address} does not answer any more: {error}") from error
        time.sleep(RETRY_S)


async def _tail(client: Any, name: str, show: Callable[[str], None], skip: int) -> None:
    """Show the log as it grows. A connection begins at the log's start, of which ``skip`` characters were shown."""
    async for text in client.tail_job_logs(name):
        if skip >= len(text):
            skip -= len(text)
        else:
            show(text[skip:])
            skip = 0


def _exit_code(info: Any, name: str, terminal: JobOutput, chatter: list[str]) -> int:
    """The exit code of a job that ended; says why it failed where the job itself did not."""
    if info.status.value == "SUCCEEDED":
        return 0
    if info.status.value == "STOPPED":
        terminal.fail(f"job {name} was stopped")
        return INTERRUPTED
    code = getattr(info, "driver_exit_code", None)
    # With one of these codes the job's own process has said what was wrong, and it was shown.
    if code not in (1, 2, INTERRUPTED):
        reason = "\n  ".join([one_line(info.message or "without a message"), *chatter])
        terminal.fail(f"job {name} failed: {reason}")
    return code or 1


def jobs_command_line(verb: str, name: str, address: str) -> str:
    """The command that a person gives to follow or stop a job."""
    return f"dubito jobs {verb} {name} --address {address}"
