"""``dubito verify``: is what lies on storage what was committed?"""

from jobs.session import ray_session, run_job
from pipeline.runtime.progress import JobOutput

SHOWN = 20


def run(uri: str) -> int:
    """Run the job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline.errors import InputError
        from pipeline.storage import absolute

        with ray_session():
            from pipeline.verify import verify

            found = verify(absolute(uri), sink=terminal)
        terminal.close()
        damage = found["damage"]
        for item in damage[:SHOWN]:
            terminal.say(f"{item['file']}: {item['problem']}")
        if damage:
            more = f" ({len(damage) - SHOWN} more are not shown)" if len(damage) > SHOWN else ""
            raise InputError(
                f"{len(damage)} of {found['files']} files of {found['kind']} '{found['uri']}' are damaged{more}; "
                f"restore them from a copy, or make the {found['kind']} again"
            )
        size = f"{found['bytes'] / 1e6:.1f} MB"
        terminal.say(f"{found['kind']} {found['uri']}: {found['files']} files, {size}, all as committed")

    return run_job("verify", story)
