"""Metrics as Prometheus finds them: a tiny dataset, training and scoring, scraped from Ray's agent while they go on."""

import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import predictions
from pipeline.datasets import ingest
from pipeline.runtime import prometheus
from pipeline.runtime.progress import SilentSink
from pipeline.scoring.job import predict
from pipeline.training import ensemble
from pipeline.training.train_config import TrainConfig
from tests.support.event_files import require_increasing, scalars
from tests.support.tiny import UNET, make_bundle, make_squares, png

RUN, TABLE = "seen-from-outside", "every-metric"
PATIENCE_S = 45
"""A process exports every 10 s."""
SPLITS = {"train": range(20), "val": range(20, 25)}
STEPS, BATCH = 6, 4
Key = tuple[str, str, str]
"""Metric without its prefix, stage, own tag."""


class Prometheus:
    """Scrapes Ray's agent all the time, as Prometheus does, and keeps the last value of each series, and all it saw."""

    def __init__(self) -> None:
        import ray

        self._url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
        self.names: set[str] = set()
        self._values: dict[tuple[Key, str], float] = {}
        self.seen: dict[Key, set[float]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(0.5):
            self.scrape()

    def scrape(self) -> None:
        with urllib.request.urlopen(self._url, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            name, tags = line.split("{")[0], dict(re.findall(r'(\w+)="([^"]*)"', line))
            if tags.get("run") == TABLE:
                self.names.add(name)
            if tags.get("run") == RUN:
                assert tags["verb"] == "test"
                own = [tags[label] for label in ("status", "reason", "split", "event", "decision") if label in tags]
                key, value = (
                    (name.removeprefix("ray_dubito_"), tags["stage"], "".join(own)),
                    float(line.rsplit(" ")[-1]),
                )
                self._values[key, tags["WorkerId"] + tags.get("le", "")] = value
                self.seen.setdefault(key, set()).add(value)

    def values(self) -> Counter[Key]:
        """Sums over processes."""
        sums: Counter[Key] = Counter()
        for (key, _), value in list(self._values.items()):
            sums[key] += value  # type: ignore[assignment]
        return sums

    def wait_for(self, wanted: dict[Key, float]) -> Counter[Key]:
        """Until these are what is exported, or long enough."""
        deadline = time.monotonic() + PATIENCE_S
        while any(self.values()[key] != value for key, value in wanted.items()) and time.monotonic() < deadline:
            time.sleep(0.2)
        found = self.values()
        assert {key: found[key] for key in wanted} == wanted
        return found

    def close(self) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture
def server(ray_local: None) -> Iterator[Prometheus]:
    scraper = Prometheus()
    with prometheus.CURRENT_RUN.named("test", RUN):
        yield scraper
    scraper.close()


def config(data: str, out: str) -> TrainConfig:
    tree: dict[str, Any] = {
        "task": "segmentation", "data": data, "out": out, "model": UNET, "loss": {"cross_entropy": 1},
        "input": {"size": [32, 32]}, "augment": {},
        "train": {"batch_size": BATCH, "steps": STEPS, "threads": 1, "log_every": 2, "validate_every": 3},
    }  # fmt: skip
    return TrainConfig.parse(tree, "test")


def test_what_prometheus_finds_is_what_was_done(server: Prometheus, tmp_path: Path):
    every_metric()
    data = make_squares(tmp_path, SPLITS)
    (tmp_path / "images" / "image24.png").write_bytes(b"no image")
    again = ("instances", str(tmp_path / "images"), str(tmp_path / "labels"), str(tmp_path / "again"))
    ingest.ingest(*again, classes=["cell"], options={"max_reject_fraction": 0.5})

    out = tmp_path / "out"
    made = ensemble.train_ensemble(config(data, str(out)), 1, resume=False, sink=SilentSink())
    curves = scalars(str(out / "tensorboard" / "0"))
    require_increasing(curves)
    assert [step for step, _ in curves["loss/train"]] == [2, 4, 6]
    assert [step for step, _ in curves["loss/validation"]] == [3, 6]
    assert all(value > 0 for _, value in curves["speed/images_s"])

    (tmp_path / "new").mkdir()
    for n in range(11):
        (tmp_path / "new" / f"{n}.png").write_bytes(png(32, 32, n) if n else b"no image")
    bundle = make_bundle(tmp_path / "model", UNET, threshold={"value": 0.0, "risk": 0.5, "delta": 0.5})
    scored = predict(bundle, str(tmp_path / "new"), str(tmp_path / "predictions"), unit_rows=5)
    decided = Counter(predictions.read(str(tmp_path / "predictions"))["decision"].to_pylist())
    assert decided["review"] == 10

    found = server.wait_for(
        {
            ("images_total", "ingest", "ok"): 25 + 24,
            ("rejects_total", "ingest", "corrupt"): 1,
            ("images_total", "train", "ok"): STEPS * BATCH,
            ("steps_total", "train", ""): STEPS,
            ("step_seconds_count", "train", ""): STEPS,
            ("checkpoints_total", "train", "saved"): 2,
            ("images_total", "predict", "ok"): 10,
            ("images_total", "predict", "corrupt"): 1,
            ("decisions_total", "predict", "review"): decided["review"],
        }
    )
    assert found["epochs", "train", ""] == pytest.approx(STEPS * BATCH / 20)
    assert found["loss", "train", "val"] == pytest.approx(made.manifest["metrics"][0]["val_loss"])
    assert found["loss", "train", "train"] == pytest.approx(curves["loss/train"][-1][1], rel=1e-5)
    assert found["uncertainty_mean", "predict", ""] == pytest.approx(scored["uncertainty_mean"])
    assert found["wait_seconds_total", "train", ""] > 0
    assert found["wait_seconds_total", "predict", ""] > 0
    assert found["restarts_total", "predict", ""] == 0
    assert 1.0 in server.seen["running", "train", ""], "nobody could see that it ran"
    assert server.values()["running", "predict", ""] == 0, "a stage that has ended runs no more"
    names = {name for metric in prometheus.METRICS for name in prometheus.exported_names(metric)}
    assert server.names == names, "the table and what Ray exports differ"


def every_metric() -> None:
    """One number of each, from this process."""
    recorder = prometheus.MetricsRecorder(prometheus.MetricTags("test", TABLE, "none"))
    for metric, row in prometheus.METRICS.items():
        add = {"counter": recorder.count, "gauge": recorder.set}.get(row.kind)
        if add is None:
            recorder.observe(metric, 1.0)
        else:
            add(metric, 1.0, "some" if row.tags else "")
    recorder.flush()


def test_without_a_ray_session_nothing_is_kept_and_nothing_is_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prometheus, "_ray_runs", lambda: False)
    monkeypatch.setattr(prometheus, "_ray_metric", lambda metric: pytest.fail("Ray was asked"))
    threads = threading.active_count()
    with prometheus.running(prometheus.stage_tags("train")) as recorder:
        for _ in range(1000):
            recorder.count("dubito_images_total", 8, "ok")
            recorder.observe("dubito_step_seconds", 0.1)
        assert threading.active_count() == threads
    monkeypatch.setattr(prometheus, "_ray_runs", lambda: True)
    recorder.flush()  # with anything kept, Ray's object of a metric would now be asked for


def test_calls_that_overlap_are_no_waiting(monkeypatch: pytest.MonkeyPatch):
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(prometheus, "time", clock)
    idle = prometheus.IdleTimer()
    first, second = prometheus.IdleTimer.__enter__, prometheus.IdleTimer.__exit__
    clock.now = 3.0
    first(idle)
    assert idle.take_s() == 3.0
    clock.now = 4.0
    first(idle)
    clock.now = 6.0
    second(idle)
    clock.now = 7.0
    second(idle)
    clock.now = 9.0
    first(idle)
    assert idle.take_s() == 2.0, "only from 7 to 9 was nothing in hand"
    assert idle.take_s() == 0.0


def test_what_a_process_does_names_its_stages():
    current = prometheus.CurrentRun()
    assert current.stage_tags("x").tags() == {"verb": "library", "run": "none", "stage": "x"}
    with current.named("predict", "predict-1"):
        assert current.stage_tags("evaluate").tags() == {"verb": "predict", "run": "predict-1", "stage": "evaluate"}
    assert current.stage_tags("x").tags() == {"verb": "library", "run": "none", "stage": "x"}
