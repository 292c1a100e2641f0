"""``dubito predict``: score a dataset or a folder of images; one Parquet row an image."""

from jobs.session import ray_session, run_job
from pipeline.runtime.progress import JobOutput


def run(bundle: str, data: str, out: str, split: str) -> int:
    """Run the job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline.storage import absolute

        with ray_session():
            from pipeline.scoring.job import predict

            summary = predict(absolute(bundle), absolute(data), absolute(out), split=split or None, sink=terminal)
        terminal.close()
        statuses = ", ".join(f"{word} {count}" for word, count in sorted(summary["statuses"].items()))
        doubt = "" if summary["uncertainty_mean"] is None else f", mean uncertainty {summary['uncertainty_mean']:.4g}"
        done = "done already" if summary["already"] else f"{summary['seconds']:.1f} s"
        terminal.say(f"predictions {summary['out']}: {summary['rows']} rows ({statuses}){doubt}; {done}")

    return run_job("predict", story)
