"""``dubito retrain``: a challenger on new labelled data, compared with the champion; once, or on a schedule."""

from typing import Any

from jobs.session import ray_session, run_job
from pipeline.runtime.progress import JobOutput


def run(config: str, force: bool, dry_run: bool, every: str, cron: str, sets: list[str]) -> int:
    """Run the job; returns the exit code."""
    if every or cron:
        from jobs import schedule

        flags = ["--force"] if force else []
        arguments = ["retrain", config, *flags, *(f"--set={pair}" for pair in sets)]
        return schedule.serve("retrain", lambda now: arguments, every, cron)

    def story(terminal: JobOutput) -> None:
        from jobs import mlflow_log
        from pipeline.retraining.run import retrain

        settings, log = _settings(config, sets)
        if log is not None:
            mlflow_log.require_mlflow()
        with ray_session(settings.recipe.get("train", {}).get("workers", 1)):
            outcome = retrain(settings, force=force, dry_run=dry_run, sink=terminal)
        terminal.close()
        for sentence in outcome.messages:
            terminal.say(sentence)
        if log is not None and outcome.decision is not None:
            bundle = outcome.decision["challenger"]["bundle"]
            name = mlflow_log.log_run(log, outcome.run, settings.to_dict(), outcome.decision, bundle)
            terminal.say(f"mlflow run {name} in experiment '{log.experiment}'")

    return run_job("retrain", story)


def _settings(path: str, sets: list[str]) -> tuple[Any, Any]:
    """(settings of the retraining, with absolute URIs; those of MLflow, or None where the config has none)."""
    from jobs.mlflow_log import TrackingSettings
    from pipeline.config import load
    from pipeline.retraining.settings import RetrainConfig
    from pipeline.storage import absolute

    tree = load(path, sets)
    log = tree.pop("mlflow", None)
    recipe = tree.get("recipe")
    if isinstance(recipe, str):
        tree["recipe"] = load(recipe, [])
    # Data and output of each training are the retraining's to choose; a recipe made for ``train`` may name others.
    for key in ("data", "out"):
        tree["recipe"] = {name: value for name, value in (tree.get("recipe") or {}).items() if name != key}
    settings = RetrainConfig.parse(tree, path)
    places = {key: absolute(getattr(settings, key)) for key in ("registry", "work", "data")}
    return settings.model_copy(update=places), None if log is None else TrackingSettings.parse(log, path)
