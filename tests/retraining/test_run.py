"""Scheduled retraining on growing data, through real fits; the judge's refusals; what a run finds and leaves."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.datasets import ingest as ingest_module
from pipeline.datasets.diff import digests
from pipeline.errors import InputError
from pipeline.models import bundle
from pipeline.retraining import challenger, registry, run, stored_metrics
from pipeline.retraining.reason import RetrainReason, newest_dataset
from pipeline.retraining.settings import RetrainConfig
from tests.support import tiny

RECIPE = {
    "task": "segmentation",
    "model": {"name": "unet", "width": 4, "depth": 2},
    "loss": {"cross_entropy": 1},
    "input": {"size": [32, 32]},
    "optim": {"lr": 0.02, "warmup_steps": 4},
    "train": {"batch_size": 8, "steps": 30, "validate_every": 15, "threads": 1},
}
LOOSE = {"tolerance": 1.0, "nll": 9.0, "ece": 1.0, "aurc": 1.0, "recall": 1.0}


def write_square(root: Path, n: int, label: int = 1) -> None:
    """A bright square on noise, labelled as it is; ``label`` 0: nothing is said to be there."""
    rng = np.random.default_rng(n)
    ids = np.zeros((32, 32), np.uint8)
    ids[4 + n % 5 : 20, 6 : 14 + n % 7] = 1
    noise = rng.integers(0, 90, (32, 32, 3)) + 120 * (ids[..., None] > 0)
    for folder, pixels in (("images", noise), ("labels", ids * label)):
        path = root / folder / f"image{n:03d}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(tiny.encode(pixels.astype(np.uint8)))


def ingest(root: Path, version: str) -> str:
    """What is there now, as a dataset: 10 % each of val, calibration and test, by hash."""
    out = str(root / "datasets" / version)
    ingest_module.ingest("instances", str(root / "images"), str(root / "labels"), out, classes=["cell"])
    return out


def config(root: Path, **changes: Any) -> RetrainConfig:
    tree = {
        "name": "cells", "registry": str(root / "registry"), "work": str(root / "work"),
        "data": str(root / "datasets"), "recipe": RECIPE, "judge": LOOSE, **changes,
    }  # fmt: skip
    return RetrainConfig.parse(tree, "test")


@pytest.fixture(scope="module")
def grown(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a champion, trained on sixty images."""
    root = tmp_path_factory.mktemp("retrain")
    for n in range(60):
        write_square(root, n)
    ingest(root, "2026-11-01")
    outcome = run.retrain(config(root))
    assert outcome.kind == "promoted", outcome.messages
    return root


def copy_of(grown: Path, tmp_path: Path, more: Iterable[int] = ()) -> Path:
    """The folder, with a second dataset if there are more images."""
    root = tmp_path / "root"
    shutil.copytree(grown, root)
    for n in more:
        write_square(root, n)
    if more:
        ingest(root, "2026-11-02")
    return root


def test_the_first_run_makes_a_champion_and_keeps_what_it_saw(grown: Path):
    entry = registry.champion(str(grown / "registry"), "cells")
    assert entry is not None
    assert (entry.number, entry.kind, entry.parent) == (1, "promotion", None)
    assert entry.reasons == ["there is no champion to compare with: the first challenger is promoted"]
    assert entry.test == entry.data == str(grown / "datasets" / "2026-11-01")
    decision = registry.decision(str(grown / "registry"), "cells", entry.run)
    assert decision is not None
    assert decision["challenger"]["id"] == entry.bundle_id
    assert decision["figures"]["challenger"]["main"] > 0
    kept = f"{grown}/registry/cells/digests/{entry.fingerprint}.parquet"
    assert digests(kept).equals(digests(entry.data))


def test_without_new_data_nothing_is_done(grown: Path):
    before = sorted(path for path in (grown / "work").rglob("*"))
    outcome = run.retrain(config(grown))
    assert outcome.kind == "nothing"
    assert "0 new, 0 changed and 0 removed images since the champion's data, 0 to learn from" in outcome.messages
    assert sorted(path for path in (grown / "work").rglob("*")) == before


def test_too_little_new_data_waits_unless_doubt_drifted_or_it_is_forced(grown: Path, tmp_path: Path):
    root = copy_of(grown, tmp_path, more=range(60, 64))
    settings = config(root, least_new=5)
    outcome = run.retrain(settings)
    assert outcome.kind == "nothing"
    assert "4 new, 0 changed and 0 removed images since the champion's data, 4 to learn from" in outcome.messages
    assert "nothing to do (least_new = 5)" in outcome.messages
    assert run.retrain(settings, dry_run=True, force=True).kind == "dry run"
    for name, brightness in (("then", 0), ("now", 100)):
        for n in range(20):
            path = tmp_path / name / f"{n}.png"
            path.parent.mkdir(exist_ok=True)
            noise = np.random.default_rng(n).integers(brightness, brightness + 50, (32, 32, 3), dtype=np.uint8)
            path.write_bytes(tiny.encode(noise))
        from pipeline.scoring.job import predict

        entry = registry.champion(settings.registry, "cells")
        assert entry is not None
        predict(entry.bundle, str(tmp_path / name), str(tmp_path / f"{name}-out"))
    drift = {"reference": str(tmp_path / "then-out"), "recent": str(tmp_path / "now-out"), "least": 10}
    outcome = run.retrain(config(root, least_new=5, drift=drift), dry_run=True)
    assert outcome.kind == "dry run", outcome.messages
    assert any(sentence.startswith("doubt drifted") for sentence in outcome.messages)


def test_of_a_folder_of_datasets_the_last_that_is_whole_counts(grown: Path, tmp_path: Path):
    root = copy_of(grown, tmp_path)
    (root / "datasets" / "2027-unfinished" / "data").mkdir(parents=True)
    assert newest_dataset(str(root / "datasets")) == str(root / "datasets" / "2026-11-01")
    one = str(root / "datasets" / "2026-11-01")
    assert newest_dataset(one) == one
    for name in ("v9", "v10"):
        shutil.copytree(one, root / "numbered" / name)
    assert newest_dataset(str(root / "numbered")) == str(root / "numbered" / "v10")
    with pytest.raises(InputError, match="is no dataset and holds none; write one there with dubito ingest"):
        newest_dataset(str(root / "work"))


@pytest.mark.long
def test_a_run_that_ended_anywhere_is_finished_by_the_next(grown: Path, tmp_path: Path, monkeypatch: Any):
    """After the training, after the evaluations, after the decision: each time the rest alone is done."""
    root = copy_of(grown, tmp_path, more=range(60, 80))
    settings = config(
        root, recipe={**RECIPE, "seed": 5, "train": {**RECIPE["train"], "steps": 150, "validate_every": 150}}
    )

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    for where, name in (
        (stored_metrics, "metrics_on_split"),
        (registry, "record_decision"),
        (registry, "add"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, broken)
            with pytest.raises(KeyboardInterrupt):
                run.retrain(settings)
        entry = registry.champion(settings.registry, "cells")
        assert entry is not None
        assert entry.number == 1, "no half champion"
    outcome = run.retrain(settings)
    assert outcome.kind == "promoted", outcome.messages
    runs = list((root / "work" / "cells").iterdir())
    assert len(runs) == 2, "the champion's and one more"
    assert len(registry.decisions(settings.registry, "cells")) == 2
    again = run.retrain(settings)
    assert again.kind == "nothing"
    assert len(registry.decisions(settings.registry, "cells")) == 2


@pytest.mark.long
def test_somebody_else_promoted_meanwhile(grown: Path, tmp_path: Path, monkeypatch: Any):
    root = copy_of(grown, tmp_path, more=range(60, 80))
    settings, decide = config(root), registry.record_decision
    other = tiny.make_bundle(tmp_path / "other", tiny.UNET)

    def decides(*args: Any) -> Any:
        registry.promote(settings.registry, "cells", other)
        return decide(*args[:3], {**args[3], "promote": True})

    with monkeypatch.context() as patch:
        patch.setattr(registry, "record_decision", decides)
        outcome = run.retrain(settings)
    assert outcome.kind == "overtaken"
    assert "was made by run promote-" in outcome.messages[-1]
    assert [entry.kind for entry in registry.entries(settings.registry, "cells")] == ["promotion", "manual"]


def test_a_frozen_test_that_is_trained_on_is_refused(grown: Path, tmp_path: Path):
    test = {"data": str(grown / "datasets" / "2026-11-01"), "split": "train"}
    with pytest.raises(InputError, match=r"images of split 'train' of .* are in the frozen test"):
        run.retrain(config(grown, test=test, registry=str(tmp_path / "registry")))


@pytest.mark.long
def test_many_looks_at_one_test_are_warned_of(grown: Path, tmp_path: Path, monkeypatch: Any):
    root = copy_of(grown, tmp_path)
    monkeypatch.setattr(registry, "MAX_DECISIONS_ON_TEST", 1)
    for n in range(60, 70):
        write_square(root, n)
    ingest(root, "2026-11-02")
    outcome = run.retrain(config(root))
    assert any(sentence.startswith("1 decisions looked at this frozen test before") for sentence in outcome.messages)
    assert outcome.decision is not None
    assert outcome.decision["test"]["looks_before"] == 1


@pytest.mark.long
def test_one_that_knows_less_what_it_knows_is_refused_though_as_accurate(grown: Path, tmp_path: Path, monkeypatch: Any):
    """The champion's own weights with a temperature that makes it unsure of everything: the same pixels are right."""
    root = copy_of(grown, tmp_path, more=range(60, 70))
    settings = config(root, judge={"tolerance": 0.01})

    def flattened(config: Any, reason: RetrainReason, out: str, sink: Any) -> str:
        assert reason.champion is not None
        source = bundle.open_bundle(reason.champion.bundle)
        flat = {"kind": "temperature", "parameters": {"temperature": 30.0}, "fitted_on": "nothing", "n": 0}
        changed = bundle.with_changes(source, calibration=flat)
        return bundle.write_bundle(str(tmp_path / "flat"), changed.manifest, bundle.member_uris(source)).uri

    monkeypatch.setattr(challenger, "train_challenger", flattened)
    outcome = run.retrain(settings)
    assert outcome.kind == "refused"
    assert outcome.decision is not None
    assert outcome.decision["gain"]["over_champion"]["difference"] == pytest.approx(0, abs=1e-6)
    failed = {each["name"] for each in outcome.decision["conditions"] if not each["holds"]}
    assert {"NLL", "calibration error"} <= failed
    assert registry.entries(settings.registry, "cells")[-1].number == 1


def test_the_command_says_it_all(grown: Path, tmp_path: Path):
    import subprocess
    import sys

    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "data": "x", "out": "y"}))
    tree = config(grown).to_dict() | {"recipe": str(tmp_path / "recipe.yaml")}
    (tmp_path / "retrain.yaml").write_text(yaml.safe_dump(tree))
    root = Path(__file__).resolve().parents[2]
    for arguments, wanted in (
        (["retrain", str(tmp_path / "retrain.yaml")], "nothing to do (least_new = 1)"),
        (["registry", "list", "--registry", tree["registry"]], "cells:    1  "),
        (["registry", "show", "cells", "--registry", tree["registry"]], "the first challenger is promoted"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", *arguments], cwd=tmp_path, env={**_clean(), "PYTHONPATH": str(root)},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert wanted in done.stdout


def _clean() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
