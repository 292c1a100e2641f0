"""``dubito verify``: compares what lies on storage with what was committed."""

from jobs.session import ray_session, run_job
from pipeline.runtime.progress import JobOutput

MAX_SHOWN = 20
"""Damaged files that are listed; the rest are counted."""


def run(uri: str) -> int:
    """Run the job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline.errors import InputError
        from pipeline.storage import absolute

        with ray_session():
            from pipeline.verify import verify

            result = verify(absolute(uri), sink=terminal)
        terminal.close()
        damage = result["damage"]
        for file in damage[:MAX_SHOWN]:
            terminal.say(f"{file['file']}: {file['problem']}")
        if damage:
            more = f" ({len(damage) - MAX_SHOWN} more are not shown)" if len(damage) > MAX_SHOWN else ""
            raise InputError(
                f"{len(damage)} of {result['files']} files of {result['kind']} '{result['uri']}' are damaged{more}; "
                f"restore them from a copy, or make the {result['kind']} again"
            )
        size = f"{result['bytes'] / 1e6:.1f} MB"
        terminal.say(f"{result['kind']} {result['uri']}: {result['files']} files, {size}, all as committed")

    return run_job("verify", story)
