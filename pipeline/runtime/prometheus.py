"""What a run shows of itself while it goes on: Prometheus metrics, exported by Ray's agent on every node.

``METRICS`` is the one table of them; ``infra/dashboards`` draws it. Numbers are added up in memory and handed to Ray
every few seconds, so a training loop pays for an addition. Without a Ray session nothing is kept.

How Ray 2.60 exports: each name gets the prefix ``ray_``; a process hands its numbers to the agent every 10 s and when
it ends in good order (one that is killed takes its last seconds with it); counters stay until the node goes, gauges
vanish 20 s after they were last set, so they are set again and again; a gauge of NaN is not exported at all; the sum of
a histogram is made of the middles of its buckets, only its counts are exact.
"""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

FLUSH_S = 5.0
"""Ray exports every 10 s, and forgets a gauge after 20 s."""
OF_ALL = ("verb", "stage", "run")
"""Tags of every metric. ``verb`` is no ``job``, which is what Prometheus calls a target."""
PREFIX = "ray_"
SECONDS = [0.001 * 2**n for n in range(17)]
"""Bounds of the histogram's buckets: 1 ms to 65 s."""

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    kind: Kind
    unit: str
    help: str
    tags: tuple[str, ...] = ()
    """Beside those of all."""


METRICS: Mapping[str, Metric] = {
    "dubito_running": Metric("gauge", "", "1 while the stage runs"),
    "dubito_images_total": Metric(
        "counter", "images", "Trained on, padding included; scored; or ingested", ("status",)
    ),
    "dubito_rejects_total": Metric("counter", "images", "Refused while a dataset was made", ("reason",)),
    "dubito_wait_seconds_total": Metric("counter", "s", "A training worker or a scoring actor had nothing to work on"),
    "dubito_step_seconds": Metric("histogram", "s", "An optimiser step, from the moment that its data is asked for"),
    "dubito_steps_total": Metric("counter", "steps", "Optimiser steps"),
    "dubito_epochs": Metric("gauge", "epochs", "Epochs done, parts of them included"),
    "dubito_loss": Metric("gauge", "", "Last loss; split: train, val", ("split",)),
    "dubito_learning_rate": Metric("gauge", "", "Of the last step"),
    "dubito_nonfinite_total": Metric("counter", "losses", "Losses that were no number; training stops at one"),
    "dubito_checkpoints_total": Metric("counter", "", "event: saved, kept (a machine will go), restored", ("event",)),
    "dubito_restarts_total": Metric(
        "counter", "", "Begun again; what: unit (its process died), member (its training failed)", ("what",)
    ),
    "dubito_uncertainty_mean": Metric("gauge", "", "Of the images that the stage scored so far"),
    "dubito_decisions_total": Metric("counter", "images", "Scored images; decision: accept, review", ("decision",)),
}


@dataclass(frozen=True)
class MetricTags:
    """Whose numbers they are: values of the tags of all metrics."""

    verb: str = "library"
    run: str = "none"
    stage: str = "none"

    def tags(self) -> dict[str, str]:
        """As Ray takes them."""
        return {name: getattr(self, name) for name in OF_ALL}


class CurrentRun:
    """The run that a process works for: a job names its own, a process that only uses the library works for none.

    A worker does not ask: whoever starts it hands it its ``MetricTags``.
    """

    def __init__(self) -> None:
        self._tags = MetricTags()

    @contextlib.contextmanager
    def named(self, verb: str, run: str) -> Iterator[None]:
        """Name the run while the block goes on, in all threads: the command's verb, and the id that its log has."""
        before = self._tags
        self._tags = MetricTags(verb, run)
        try:
            yield
        finally:
            self._tags = before

    def stage_tags(self, stage: str) -> MetricTags:
        """Tags of one stage of the run."""
        return MetricTags(self._tags.verb, self._tags.run, stage)


CURRENT_RUN = CurrentRun()
"""That of this process."""


def stage_tags(stage: str) -> MetricTags:
    """Tags of one stage of the run that this process works for."""
    return CURRENT_RUN.stage_tags(stage)


def exported(metric: str) -> list[str]:
    """The names under which Prometheus finds a metric of the table."""
    ends = ("_bucket", "_count", "_sum") if METRICS[metric].kind == "histogram" else ("",)
    return [f"{PREFIX}{metric}{end}" for end in ends]


def as_markdown() -> str:
    """The table, for people."""
    lines = ["| metric | kind | unit | tags beside " + ", ".join(OF_ALL) + " | what |", "|---|---|---|---|---|"]
    for metric, row in METRICS.items():
        cells = (f"`{PREFIX}{metric}`", row.kind, row.unit, ", ".join(row.tags), row.help)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


class MetricsRecorder:
    """Adds up numbers of one source, and hands them to Ray.

    In a ``with`` block a thread does so every ``FLUSH_S`` seconds, and the end of the block at last; else ``flush``
    is the caller's. Any thread may add. Without a Ray session nothing happens.
    """

    def __init__(self, source: MetricTags) -> None:
        self._tags, self._on = source.tags(), _ray_runs()
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = {}
        self._gauges: dict[tuple[str, str], float] = {}
        self._seen: list[tuple[str, float]] = []
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def count(self, metric: str, number: float = 1.0, tag: str = "") -> None:
        """A counter grows by ``number``; ``tag`` is the value of its own tag, if it has one."""
        if not self._on:
            return
        with self._lock:
            self._counts[metric, tag] = self._counts.get((metric, tag), 0.0) + number

    def set(self, metric: str, value: float, tag: str = "") -> None:
        """A gauge is ``value`` now, until this recorder ends."""
        if self._on:
            with self._lock:
                self._gauges[metric, tag] = value

    def observe(self, metric: str, value: float) -> None:
        """One more value of a histogram."""
        if self._on:
            with self._lock:
                self._seen.append((metric, value))

    def flush(self) -> None:
        """Hand over what was added since the last time, and the gauges anew."""
        with self._lock:
            counts, self._counts = self._counts, {}
            seen, self._seen = self._seen, []
            gauges = dict(self._gauges)
        if not _ray_runs():
            return
        for (metric, tag), number in counts.items():
            if number > 0:
                _handle(metric).inc(number, self._of(metric, tag))
        for (metric, tag), value in gauges.items():
            _handle(metric).set(value, self._of(metric, tag))
        for metric, value in seen:
            _handle(metric).observe(value, self._tags)

    def _of(self, metric: str, tag: str) -> dict[str, str]:
        return {**self._tags, **dict.fromkeys(METRICS[metric].tags, tag)}

    def __enter__(self) -> Self:
        if self._on:
            self._thread = threading.Thread(target=self._beat, name="gauges", daemon=True)
            self._thread.start()
        return self

    def _beat(self) -> None:
        while not self._end.wait(FLUSH_S):
            self.flush()

    def __exit__(self, *error: Any) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()


@contextlib.contextmanager
def running(source: MetricTags) -> Iterator[MetricsRecorder]:
    """A recorder for a stage, which is seen to run as long as the block does."""
    with MetricsRecorder(source) as told:
        told.set("dubito_running", 1.0)
        try:
            yield told
        finally:
            told.set("dubito_running", 0.0)


class IdleTimer:
    """How long a process had nothing in hand, from its start to its first work on; calls may overlap."""

    def __init__(self) -> None:
        self._lock, self._busy, self._since, self._waited = threading.Lock(), 0, time.monotonic(), 0.0

    def __enter__(self) -> Self:
        with self._lock:
            if self._busy == 0:
                self._waited += time.monotonic() - self._since
            self._busy += 1
        return self

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._busy -= 1
            self._since = time.monotonic()

    def take_s(self) -> float:
        """Seconds that were waited since the last time this was asked; a wait that goes on is not among them."""
        with self._lock:
            waited, self._waited = self._waited, 0.0
        return waited


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@functools.cache
def _handle(metric: str) -> Any:
    """Ray's object for a metric, one a process."""
    from ray.util import metrics

    row = METRICS[metric]
    options = {"description": f"{row.help} [{row.unit}]" if row.unit else row.help, "tag_keys": (*OF_ALL, *row.tags)}
    if row.kind == "histogram":
        return metrics.Histogram(metric, boundaries=SECONDS, **options)
    return (metrics.Counter if row.kind == "counter" else metrics.Gauge)(metric, **options)
