"""A schedule that watches growing data, and retraining that is killed again and again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.models.bundle import open_bundle
from pipeline.retraining import registry
from tests.retraining.test_run import LOOSE, RECIPE, write_square

ROOT = Path(__file__).resolve().parents[2]
KILLS = 10

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


def dubito(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments], cwd=folder, env={**kept, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def ingest(folder: Path, version: str) -> None:
    given = ("--format", "instances", "--images", "images", "--labels", "labels", "--classes", "cell")
    finished(dubito(folder, "ingest", *given, "--out", f"datasets/{version}"))


def settings(folder: Path, **changes: Any) -> None:
    tree = {
        "name": "cells", "registry": "registry", "work": "work", "data": "datasets", "recipe": RECIPE,
        "judge": {**LOOSE, "tolerance": 0.05}, **changes,
    }  # fmt: skip
    (folder / "retrain.yaml").write_text(yaml.safe_dump(tree))


def better() -> dict[str, Any]:
    return {**RECIPE, "train": {**RECIPE["train"], "steps": 150, "validate_every": 50}}


def champion(folder: Path) -> Any:
    return registry.champion(str(folder / "registry"), "cells")


def wait_for(text: str, process: subprocess.Popen[str], seconds: float = 240) -> list[str]:
    """Lines up to the one that has ``text``."""
    end, lines = time.monotonic() + seconds, []
    for line in process.stdout or ():
        lines.append(line)
        if text in line:
            return lines
        assert time.monotonic() < end, "".join(lines)
    raise AssertionError("".join(lines))


def test_a_schedule_does_nothing_promotes_and_refuses(tmp_path: Path):
    for n in range(60):
        write_square(tmp_path, n)
    ingest(tmp_path, "1")
    settings(tmp_path)
    service = dubito(tmp_path, "retrain", "retrain.yaml", "--every", "5s")
    try:
        assert "champion 1 of 'cells'" in "".join(wait_for("exit 0; next:", service))
        assert "nothing to do" in "".join(wait_for("exit 0; next:", service)), "no new data"
        settings(tmp_path, recipe=better())
        for n in range(60, 90):
            write_square(tmp_path, n)
        ingest(tmp_path, "2")
        said = "".join(wait_for("champion 2 of 'cells'", service))
        assert "promoted: main figure against the champion: gain +0." in said, "new data"
        settings(tmp_path, recipe={**better(), "seed": 1})
        for n in range(90, 150):
            write_square(tmp_path, n, label=0)  # half of all images say that nothing is there
        for n in range(0, 60):
            if n % 3:
                write_square(tmp_path, n, label=0)
        ingest(tmp_path, "3")
        said = "".join(wait_for("the champion stays", service))
        assert "refused: main figure against the champion: gain -" in said, "labels that are wrong"
    finally:
        os.killpg(service.pid, signal.SIGTERM)
        service.communicate(timeout=60)
    assert champion(tmp_path).number == 2
    decided = registry.decisions(str(tmp_path / "registry"), "cells")
    assert [each["promote"] for each in decided] == [True, True, False]
    assert decided[2]["changes"]["new"] == 60
    assert decided[2]["changes"]["changed"] == 40


def test_ten_kills_leave_no_half_champion_and_the_next_run_finishes(tmp_path: Path):
    for n in range(60):
        write_square(tmp_path, n)
    ingest(tmp_path, "1")
    settings(tmp_path)
    began = time.monotonic()
    finished(dubito(tmp_path, "retrain", "retrain.yaml"))
    whole_s = time.monotonic() - began
    settings(tmp_path, recipe=better())
    images, moments, kills = 60, random.Random(0), 0
    while kills < KILLS:
        if not kills or "nothing to do" in finished(dubito(tmp_path, "retrain", "retrain.yaml", "--dry-run")):
            for n in range(images, images + 30):
                write_square(tmp_path, n)
            images += 30
            ingest(tmp_path, str(images))
        process = dubito(tmp_path, "retrain", "retrain.yaml")
        try:
            process.communicate(timeout=moments.uniform(2, 0.9 * whole_s))
        except subprocess.TimeoutExpired:
            kills += 1
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        for entry in registry.entries(str(tmp_path / "registry"), "cells"):
            assert open_bundle(entry.bundle).id == entry.bundle_id, "a champion is whole"
        for lock in (tmp_path / "registry/cells/locks").glob("*.json"):
            # The next run need not wait for the lease of the one that was killed.
            lock.write_text(json.dumps(json.loads(lock.read_text()) | {"until": 0.0}))
    finished(dubito(tmp_path, "retrain", "retrain.yaml"))
    decided = registry.decisions(str(tmp_path / "registry"), "cells")
    assert champion(tmp_path).number == sum(each["promote"] for each in decided)
    assert len(list((tmp_path / "work/cells").iterdir())) == len(decided), "what was killed was gone on with"
    last = finished(dubito(tmp_path, "retrain", "retrain.yaml"))
    assert "nothing to do" in last or "the champion stays" in last
