"""MLflow, for those who keep their runs there: settings, metrics, the decision and the bundle of a retraining."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import Settings
from pipeline.errors import InputError

MAX_VALUE_CHARS = 500
"""Longest value of a parameter that MLflow takes."""
_NAME = re.compile(r"[^A-Za-z0-9_./ -]")


class TrackingSettings(Settings):
    """The ``mlflow`` section of a retraining's config."""

    uri: str
    """MLflow's tracking URI."""
    experiment: str = "dubito"
    """Name of MLflow's experiment."""


def require_mlflow() -> Any:
    """MLflow's module.

    Raises:
        InputError: It is not installed.
    """
    try:
        import mlflow
    except ImportError:
        raise InputError("mlflow wants the extra of that name: pip install 'dubito[mlflow]', or leave it out") from None
    return mlflow


def log_run(settings: TrackingSettings, run: str, config: dict[str, Any], record: dict[str, Any], bundle: str) -> str:
    """Write one run to MLflow, unless it is there already.

    Args:
        settings: MLflow's place and experiment.
        run: Id of the retraining.
        config: Its settings, which become parameters.
        record: Its decision: each number becomes a metric, and the whole is stored as ``decision.json``.
        bundle: URI of the challenger's bundle, whose files become artifacts; '' if there is none.

    Returns:
        MLflow's id of the run.
    """
    mlflow = require_mlflow()
    mlflow.set_tracking_uri(settings.uri)
    experiment = mlflow.set_experiment(settings.experiment)
    client = mlflow.MlflowClient()
    earlier_runs = client.search_runs([experiment.experiment_id], f"tags.dubito_run = '{run}'")
    if earlier_runs:
        return earlier_runs[0].info.run_id
    with mlflow.start_run(run_name=run) as active:
        for name, value in leaves(config):
            mlflow.log_param(name, str(value)[:MAX_VALUE_CHARS])
        for name, value in leaves(record):
            if isinstance(value, (int, float)):
                mlflow.log_metric(name, float(value))
        mlflow.log_dict(record, "decision.json")
        if bundle:
            _log_artifacts(mlflow, bundle)
        # Last: a run that was cut short is written anew, and only whole ones are found.
        mlflow.set_tags({"dubito_run": run, "promoted": str(record.get("promote"))})
        return active.info.run_id


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every plain value in nested mappings and lists, nulls left out."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{prefix}.{number}")
    elif tree is not None:
        yield _NAME.sub("_", prefix), tree


def _log_artifacts(mlflow: Any, bundle: str) -> None:
    """Copy the bundle's files to MLflow, through a local folder, which is all that MLflow takes."""
    with tempfile.TemporaryDirectory() as folder:
        for file in storage.list_files(bundle):
            path = Path(folder) / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read_bytes(storage.join(bundle, file.path)))
        mlflow.log_artifacts(folder, "bundle")
