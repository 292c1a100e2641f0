"""MLflow, for those who keep their runs there: parameters, figures, the decision and the bundle of a scheduled run."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import Settings
from pipeline.errors import InputError

MOST_VALUE = 500
"""Characters of a parameter's value that MLflow takes."""
_NAME = re.compile(r"[^A-Za-z0-9_./ -]")


class TrackingSettings(Settings):
    """Where MLflow keeps runs."""

    uri: str
    """MLflow's tracking URI."""
    experiment: str = "dubito"


def require() -> Any:
    """The library.

    Raises:
        InputError: It is not installed.
    """
    try:
        import mlflow
    except ImportError:
        raise InputError("mlflow wants the extra of that name: pip install 'dubito[mlflow]', or leave it out") from None
    return mlflow


def log(settings: TrackingSettings, run: str, config: dict[str, Any], record: dict[str, Any], bundle: str) -> str:
    """Write one run; the same run again is not written twice.

    Args:
        settings: Where to.
        run: Id of the run.
        config: What was given: parameters.
        record: What came out: each number is a metric, and the whole of it ``decision.json``.
        bundle: URI of the challenger's bundle, whose files become artifacts; '' without one.

    Returns:
        MLflow's id of the run.
    """
    mlflow = require()
    mlflow.set_tracking_uri(settings.uri)
    experiment = mlflow.set_experiment(settings.experiment)
    client = mlflow.MlflowClient()
    known = client.search_runs([experiment.experiment_id], f"tags.dubito_run = '{run}'")
    if known:
        return known[0].info.run_id
    with mlflow.start_run(run_name=run) as active:
        for name, value in leaves(config):
            mlflow.log_param(name, str(value)[:MOST_VALUE])
        for name, value in leaves(record):
            if isinstance(value, (int, float)):
                mlflow.log_metric(name, float(value))
        mlflow.log_dict(record, "decision.json")
        if bundle:
            _artifacts(mlflow, bundle)
        # Last: a run that was cut short is written anew, and only whole ones are found.
        mlflow.set_tags({"dubito_run": run, "promoted": str(record.get("promote"))})
        return active.info.run_id


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that is no mapping and no list, nulls left out."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{prefix}.{number}")
    elif tree is not None:
        yield _NAME.sub("_", prefix), tree


def _artifacts(mlflow: Any, bundle: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file in storage.list_files(bundle):
            path = Path(folder) / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read_bytes(storage.join(bundle, file.path)))
        mlflow.log_artifacts(folder, "bundle")
