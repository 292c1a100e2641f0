"""A verb again and again, on a schedule, for those without Kubernetes or cron: each run in a process of its own."""

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
    """``90s``, ``30m``, ``6h``, ``1d``.

    Raises:
        InputError: Anything else, or nothing.
    """
    found = re.fullmatch(r"(\d+)([smhd])", text.strip())
    if not found or not int(found[1]):
        raise InputError(f"--every '{text}': wanted a number and a unit, such as 90s, 30m, 6h or 1d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def trigger(every: str, cron: str) -> Any:
    """What says when: every so often, the first time at once; or as cron does, in UTC.

    Raises:
        InputError: Both or neither are given, or are not understood.
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


def serve(verb: str, command: Callable[[datetime], list[str]], every: str, cron: str) -> int:
    """Run ``dubito`` with what ``command`` gives for the time, whenever it is due, until Ctrl-C.

    A run that lasts beyond the next time puts that one off; times missed meanwhile are made up for by one.
    """
    from apscheduler.schedulers.blocking import BlockingScheduler

    def story(terminal: JobOutput) -> None:
        when = trigger(every, cron)

        def work() -> None:
            now = datetime.now(UTC)
            given = command(now)
            terminal.say(f"{now:%Y-%m-%d %H:%M:%S} UTC: dubito {' '.join(given)}")
            with subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                for line in process.stdout or ():
                    terminal.say(f"  {line.rstrip()}")
            terminal.say(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: exit {process.returncode}; next: {soon(job)}")

        scheduler = BlockingScheduler(timezone=UTC)
        at_once: dict[str, Any] = {"next_run_time": datetime.now(UTC)} if every else {}
        job = scheduler.add_job(work, when, coalesce=True, max_instances=1, misfire_grace_time=None, **at_once)
        if cron:
            terminal.say(f"the first time: {when.get_next_fire_time(None, datetime.now(UTC)):%Y-%m-%d %H:%M} UTC")
        scheduler.start()

    return run_job(verb, story, here=False)


def soon(job: Any) -> str:
    """When it runs next."""
    return f"{job.next_run_time:%Y-%m-%d %H:%M:%S} UTC" if job.next_run_time else "never"
