"""``dubito jobs``: what a cluster runs and ran; following and stopping it."""

from datetime import datetime
from typing import Any

from jobs.session import run_job
from jobs.submission import client as client_module
from pipeline.errors import InputError
from pipeline.runtime.progress import JobOutput


def show(address: str) -> int:
    """List the cluster's jobs, the newest first; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        found = [job for job in client_module.connect(address).list_jobs() if job.submission_id]
        found.sort(key=lambda job: -(job.start_time or 0))
        for job in found:
            terminal.say(_line(job))
        if not found:
            terminal.say(f"no jobs were sent to {address}")

    return run_job("jobs", story, here=False)


def _line(job: Any) -> str:
    began = datetime.fromtimestamp(job.start_time / 1000).strftime("%Y-%m-%d %H:%M:%S") if job.start_time else "-"
    seconds = f"{(job.end_time - job.start_time) / 1000:.0f} s" if job.end_time and job.start_time else "-"
    return f"{job.submission_id:40s} {job.status.value:10s} {began:20s} {seconds:>8s}  {_short(job.entrypoint)}"


def _short(entrypoint: str) -> str:
    return entrypoint.replace("python -m jobs.cli", "dubito")


def follow(job: str, address: str) -> int:
    """Show what a job says from its beginning; returns its exit code."""

    def story(terminal: JobOutput) -> int:
        client = client_module.connect(address)
        _require(client, job, address)
        return client_module.follow(client, job, address, terminal)

    return run_job("jobs", story, here=False)


def stop(job: str, address: str) -> int:
    """Stop a job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        client = client_module.connect(address)
        _require(client, job, address)
        stopped = client.stop_job(job)
        terminal.say(f"job {job}: stopping" if stopped else f"job {job} had ended before")

    return run_job("jobs", story, here=False)


def _require(client: Any, job: str, address: str) -> None:
    if client_module.info_of(client, job) is None:
        known = [each.submission_id for each in client.list_jobs() if each.submission_id]
        raise InputError(f"no job '{job}' at {address}; known: {', '.join(sorted(known)[:10]) or 'none'}")
