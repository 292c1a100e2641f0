"""Runs a verb on a schedule, for those without Kubernetes or cron. Each run has a process of its own."""

import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from jobs.session import run_job
from pipeline.errors import InputError, one_line
from pipeline.runtime.progress import JobOutput

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def interval(text: str) -> timedelta:
    """The time that ``90s``, ``30m``, ``6h`` or ``1d`` means.

    Raises:
        InputError: The text is anything else, or the time is zero.
    """
    match = re.fullmatch(r"(\d+)([smhd])", text.strip())
    if not match or not int(match[1]):
        raise InputError(f"--every '{text}': wanted a number and a unit, such as 90s, 30m, 6h or 1d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def trigger(every: str, cron: str) -> Any:
    """APScheduler's trigger: every so often; or as cron does, in UTC.

    Raises:
        InputError: Both or neither are set, or they cannot be read.
    """
    from apscheduler.triggers.cron import CronTrigger
    from apscheduler.triggers.interval import IntervalTrigger

    if bool(every) == bool(cron):
        raise InputError("give exactly one of --every and --cron")
    if every:
        return IntervalTrigger(seconds=int(interval(every).total_seconds()), timezone=UTC)
    try:
        return CronTrigger.from_crontab(cron, timezone=UTC)
    except ValueError as error:
        raise InputError(f"--cron '{cron}': {one_line(error)}; wanted five fields such as '0 3 * * *'") from None


def serve(verb: str, arguments_at: Callable[[datetime], list[str]], every: str, cron: str) -> int:
    """Run ``dubito`` whenever it is due, until Ctrl-C.

    A run that lasts beyond the next time delays that one; all times missed meanwhile are made up for by one run.

    Args:
        verb: For messages.
        arguments_at: Time of a run -> the arguments of ``dubito``.
        every: Interval, the first run at once; '' for none.
        cron: Five fields of cron; '' for none.

    Returns:
        The exit code.
    """
    from apscheduler.schedulers.blocking import BlockingScheduler

    def story(terminal: JobOutput) -> None:
        due = trigger(every, cron)

        def run_once() -> None:
            now = datetime.now(UTC)
            arguments = arguments_at(now)
            terminal.say(f"{now:%Y-%m-%d %H:%M:%S} UTC: dubito {' '.join(arguments)}")
            with subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process:
                for line in process.stdout or ():
                    terminal.say(f"  {line.rstrip()}")
            terminal.say(
                f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: exit {process.returncode}; next: {next_time(job)}"
            )

        scheduler = BlockingScheduler(timezone=UTC)
        at_once: dict[str, Any] = {"next_run_time": datetime.now(UTC)} if every else {}
        job = scheduler.add_job(run_once, due, coalesce=True, max_instances=1, misfire_grace_time=None, **at_once)
        if cron:
            terminal.say(f"the first time: {due.get_next_fire_time(None, datetime.now(UTC)):%Y-%m-%d %H:%M} UTC")
        scheduler.start()

    return run_job(verb, story, on_this_machine=False)


def next_time(job: Any) -> str:
    """When APScheduler's job runs next, for people."""
    return f"{job.next_run_time:%Y-%m-%d %H:%M:%S} UTC" if job.next_run_time else "never"
