"""``dubito evaluate``: metrics of the pool and of every member on a labelled split, and what they look like."""

import json

from jobs.session import ray_session, run_job
from pipeline.runtime.progress import JobOutput


def run(bundle: str, data: str, split: str, out: str, shift_data: str = "", shift_split: str = "") -> int:
    """Run the job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline import storage
        from pipeline.datasets.dataset import open_dataset
        from pipeline.models.bundle import open_bundle

        where = storage.absolute(bundle), storage.absolute(data)
        with ray_session():
            from pipeline.scoring.evaluate import evaluate

            metrics, scalars = evaluate(
                *where,
                split,
                shift_data=storage.absolute(shift_data) if shift_data else None,
                shift_split=shift_split or None,
                sink=terminal,
            )
        storage.write_bytes(out, json.dumps(metrics, indent=1).encode())
        from pipeline.report import evaluation

        plots = evaluation.write_plots(out, open_bundle(where[0]), open_dataset(where[1]), split, metrics, scalars)
        terminal.close()
        terminal.say(evaluation.describe_evaluation(split, metrics))
        terminal.say(f"metrics {out}; plots {', '.join(plots)}")

    return run_job("evaluate", story)
