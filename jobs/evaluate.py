"""``dubito evaluate``: metrics of the pool and of every member on a labelled split."""

import json

from jobs.session import ray_session, run_job
from pipeline.telemetry import Terminal


def run(bundle: str, data: str, split: str, out: str) -> int:
    """Run the job; returns the exit code."""

    def story(terminal: Terminal) -> None:
        from pipeline import storage

        with ray_session():
            from pipeline.evaluate import evaluate

            metrics = evaluate(storage.absolute(bundle), storage.absolute(data), split, sink=terminal)
        storage.write_bytes(out, json.dumps(metrics, indent=1).encode())
        terminal.close()
        terminal.say(f"metrics of {split}: {out}")

    return run_job("evaluate", story)


if __name__ == "__main__":
    from jobs.cli import main

    main("evaluate")
