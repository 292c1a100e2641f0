"""``dubito ensemble``: fit M members that differ by seed; one bundle."""

from jobs.session import ray_session, run_job
from pipeline.runtime.progress import JobOutput


def run(config: str, members: int, resume: bool, sets: list[str], verb: str = "ensemble") -> int:
    """Run the job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline.config import load
        from pipeline.training.train_config import TrainConfig

        settings = TrainConfig.parse(load(config, sets), config).with_absolute_uris()
        with ray_session(settings.train.workers):
            from pipeline.models import transfer
            from pipeline.scoring import calibrate
            from pipeline.training import ensemble

            bundle = ensemble.train_ensemble(settings, members, resume=resume, sink=terminal)
            from pipeline.report import curves

            plot = curves.write_loss_plot(settings.out, members)
        terminal.close()
        losses = ", ".join(f"{metrics['val_loss']:.4f}" for metrics in bundle.manifest["metrics"])
        terminal.say(
            f"bundle {bundle.uri} (id {bundle.id}, {members} member(s), validation loss {losses}); curves {plot}"
        )
        if bundle.manifest["transfer"] is not None:
            terminal.say(transfer.LoadedWeights(**bundle.manifest["transfer"]).describe())
        terminal.say(calibrate.describe_calibration(bundle))

    return run_job(verb, story)
