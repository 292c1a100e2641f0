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

            summary = ingest.ingest(
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
        terminal.say(describe_ingest(summary))

    return run_job("ingest", story)


def describe_ingest(summary: dict[str, Any]) -> str:
    """One sentence on a dataset: its counts, and everything that was left out, repaired or rejected."""
    splits = ", ".join(f"{name} {count}" for name, count in summary["splits"].items())
    clauses = [
        f"dataset {summary['uri']}: {summary['images']} images ({splits}), classes {', '.join(summary['classes'])}"
    ]
    for kind in ("rejects", "repairs"):
        if summary[kind]:
            clauses.append(f"{kind}: " + ", ".join(f"{name} {count}" for name, count in summary[kind].items()))
    for kind in ("unlabelled", "left_out"):
        if summary[kind]:
            clauses.append(f"{kind.replace('_', ' ')}: {summary[kind]}")
    clauses += summary["notes"]
    clauses.append("done already" if summary["already"] else f"{summary['seconds']:.1f} s")
    return "; ".join(clauses)
