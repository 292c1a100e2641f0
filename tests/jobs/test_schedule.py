"""When a scheduled verb runs, and what of it goes to MLflow."""

import json
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs import mlflow_log, schedule
from pipeline.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("6h", 21600), ("1d", 86400)])
def test_intervals_have_units(text: str, seconds: int):
    assert schedule.interval(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "6", "h", "0h", "6 hours", "-1h"])
def test_other_intervals_are_refused(text: str):
    with pytest.raises(InputError, match="wanted a number and a unit, such as 90s, 30m, 6h or 1d"):
        schedule.interval(text)


def test_cron_is_read_as_cron_does():
    trigger = schedule.trigger("", "0 3 * * *")
    noon = datetime(2026, 11, 23, 12, tzinfo=UTC)
    assert trigger.get_next_fire_time(None, noon) == datetime(2026, 11, 24, 3, tzinfo=UTC)
    with pytest.raises(InputError, match=r"--cron '61 \* \* \* \*': .*wanted five fields such as '0 3 \* \* \*'"):
        schedule.trigger("", "61 * * * *")
    for both in (("1h", "0 3 * * *"), ("", "")):
        with pytest.raises(InputError, match="exactly one of --every and --cron"):
            schedule.trigger(*both)


def test_the_service_runs_the_command_again_and_again_and_says_how_it_ended(tmp_path: Path):
    """A config that is not there: each run is one sentence and exit code 2, and the service goes on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "retrain", "nowhere.yaml", "--every", "1s"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines, end = [], time.monotonic() + 60
    for line in process.stdout or ():
        lines.append(line)
        if sum("exit 2; next: 2" in each for each in lines) == 2 or time.monotonic() > end:
            break
    process.terminate()
    process.communicate(timeout=30)
    said = "".join(lines)
    assert said.count("UTC: dubito retrain nowhere.yaml") == 2, said
    assert said.count("  dubito retrain: config file 'nowhere.yaml' not found") == 2


def test_mlflow_has_each_run_once_with_its_figures_and_its_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    bundle = tmp_path / "bundle"
    (bundle / "members" / "0").mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")
    (bundle / "members" / "0" / "model.safetensors").write_bytes(b"weights")
    settings = mlflow_log.TrackingSettings.parse({"uri": f"file://{tmp_path}/mlflow", "experiment": "cells"}, "test")
    record = {"promote": True, "figures": {"challenger": {"main": 0.5, "nll": None}}, "reasons": ["better"]}
    run = mlflow_log.log_run(settings, "abc", {"name": "cells", "judge": {"tolerance": 0.01}}, record, str(bundle))
    assert mlflow_log.log_run(settings, "abc", {}, record, str(bundle)) == run
    client = mlflow.MlflowClient()
    found = client.get_run(run)
    assert found.data.params == {"name": "cells", "judge.tolerance": "0.01"}
    assert found.data.metrics == {"promote": 1.0, "figures.challenger.main": 0.5}
    assert found.data.tags["promoted"] == "True"
    assert json.loads(Path(client.download_artifacts(run, "decision.json")).read_text()) == record
    weights = Path(client.download_artifacts(run, "bundle/members/0/model.safetensors"))
    assert weights.read_bytes() == b"weights"


def test_without_mlflow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"pip install 'dubito\[mlflow\]'"):
        mlflow_log.require_mlflow()
