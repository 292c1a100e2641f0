"""``dubito ingest``: labels as people have them -> a dataset."""

from typing import Any

from jobs.session import ray_session, run_job
from pipeline.runtime.progress import JobOutput


def run(format: str, images: str, labels: str, out: str, classes: str, splits: str, sets: list[str]) -> int:
    """Run the job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline.config import parse_sets
        from pipeline.storage import absolute

        options = parse_sets(sets)
        names = [name.strip() for name in classes.split(",") if name.strip()] or None
        with ray_session():
            from pipeline.datasets import ingest

            made = ingest.ingest(
                format,
                images or None,
                labels or None,
                out,
                classes=names,
                splits=absolute(splits) if splits else None,
                options=options,
                sink=terminal,
            )
        terminal.close()
        terminal.say(describe_ingest(made))

    return run_job("ingest", story)


def describe_ingest(made: dict[str, Any]) -> str:
    """One paragraph of what was made: counts, and everything that was left out, mended or refused."""
    splits = ", ".join(f"{name} {count}" for name, count in made["splits"].items())
    parts = [f"dataset {made['uri']}: {made['images']} images ({splits}), classes {', '.join(made['classes'])}"]
    for what in ("rejects", "repairs"):
        if made[what]:
            parts.append(f"{what}: " + ", ".join(f"{name} {count}" for name, count in made[what].items()))
    for what in ("unlabelled", "left_out"):
        if made[what]:
            parts.append(f"{what.replace('_', ' ')}: {made[what]}")
    parts += made["notes"]
    parts.append("done already" if made["already"] else f"{made['seconds']:.1f} s")
    return "; ".join(parts)
