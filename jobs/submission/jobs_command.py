"""``dubito jobs``: lists the jobs of a cluster, follows one, stops one."""

from datetime import datetime
from typing import Any

from jobs.session import run_job
from jobs.submission.client import connect, info_of
from jobs.submission.follow import follow_job
from pipeline.errors import InputError
from pipeline.runtime.progress import JobOutput


def show(address: str) -> int:
    """List the cluster's jobs, the newest first; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        jobs = [job for job in connect(address).list_jobs() if job.submission_id]
        jobs.sort(key=lambda job: -(job.start_time or 0))
        for job in jobs:
            terminal.say(_line(job))
        if not jobs:
            terminal.say(f"no jobs were sent to {address}")

    return run_job("jobs", story, on_this_machine=False)


def _line(job: Any) -> str:
    """One job as a row of the list; Ray's times are in milliseconds."""
    began = "-"
    duration = "-"
    if job.start_time:
        began = datetime.fromtimestamp(job.start_time / 1000).strftime("%Y-%m-%d %H:%M:%S")
    if job.start_time and job.end_time:
        duration = f"{(job.end_time - job.start_time) / 1000:.0f} s"
    return f"{job.submission_id:40s} {job.status.value:10s} {began:20s} {duration:>8s}  {_as_typed(job.entrypoint)}"


def _as_typed(entrypoint: str) -> str:
    """The command as a person would give it."""
    return entrypoint.replace("python -m jobs.cli", "dubito")


def follow(job: str, address: str) -> int:
    """Show what a job says from its beginning; returns its exit code."""

    def story(terminal: JobOutput) -> int:
        client = connect(address)
        _require_job(client, job, address)
        return follow_job(client, job, address, terminal)

    return run_job("jobs", story, on_this_machine=False)


def stop(job: str, address: str) -> int:
    """Stop a job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        client = connect(address)
        _require_job(client, job, address)
        stopped = client.stop_job(job)
        terminal.say(f"job {job}: stopping" if stopped else f"job {job} had ended before")

    return run_job("jobs", story, on_this_machine=False)


def _require_job(client: Any, job: str, address: str) -> None:
    """Refuse a name that the cluster has no job of.

    Raises:
        InputError: There is none; some that there are are named.
    """
    if info_of(client, job) is None:
        names = [row.submission_id for row in client.list_jobs() if row.submission_id]
        raise InputError(f"no job '{job}' at {address}; known: {', '.join(sorted(names)[:10]) or 'none'}")
