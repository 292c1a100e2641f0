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
COMMON_TAGS = ("verb", "stage", "run")
"""Tags of every metric. ``verb`` is not called ``job``: that is what Prometheus calls a target."""
PREFIX = "ray_"
BUCKET_BOUNDS_S = [0.001 * 2**n for n in range(17)]
"""Bounds of the histogram's buckets: 1 ms to 65 s."""

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    kind: Kind
    unit: str
    help: str
    tags: tuple[str, ...] = ()
    """Beside ``COMMON_TAGS``; one at most."""


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
    """Values of ``COMMON_TAGS``: the command, the run and the stage that a number belongs to."""

    verb: str = "library"
    run: str = "none"
    stage: str = "none"

    def tags(self) -> dict[str, str]:
        """Tag -> value, as Ray takes them."""
        return {name: getattr(self, name) for name in COMMON_TAGS}


class CurrentRun:
    """The run that a process works for: a job names its own; a process that only uses the library works for none.

    Workers do not ask: they get their ``MetricTags`` from the process that starts them.
    """

    def __init__(self) -> None:
        self._tags = MetricTags()

    @contextlib.contextmanager
    def named(self, verb: str, run: str) -> Iterator[None]:
        """Name the run while the block goes on, in all threads: the command's verb, and the id that its log has."""
        outer_tags = self._tags
        self._tags = MetricTags(verb, run)
        try:
            yield
        finally:
            self._tags = outer_tags

    def stage_tags(self, stage: str) -> MetricTags:
        """Tags of one stage of the run."""
        return MetricTags(self._tags.verb, self._tags.run, stage)


CURRENT_RUN = CurrentRun()
"""The run of this process: one process works for one run, whichever of its threads asks."""


def stage_tags(stage: str) -> MetricTags:
    """Tags of one stage of the run that this process works for."""
    return CURRENT_RUN.stage_tags(stage)


def exported_names(metric: str) -> list[str]:
    """The names under which Prometheus finds a metric of the table."""
    ends = ("_bucket", "_count", "_sum") if METRICS[metric].kind == "histogram" else ("",)
    return [f"{PREFIX}{metric}{end}" for end in ends]


def as_markdown() -> str:
    """The table, for people."""
    lines = ["| metric | kind | unit | tags beside " + ", ".join(COMMON_TAGS) + " | what |", "|---|---|---|---|---|"]
    for metric, row in METRICS.items():
        cells = (f"`{PREFIX}{metric}`", row.kind, row.unit, ", ".join(row.tags), row.help)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


class MetricsRecorder:
    """Adds up the numbers of one stage in memory, and hands them to Ray now and then.

    In a ``with`` block a thread flushes every ``FLUSH_S`` seconds, and the end of the block once more; without a block
    the caller flushes. Any thread may add. Without a Ray session nothing is kept, and nothing happens.
    """

    def __init__(self, tags: MetricTags) -> None:
        self._tags = tags.tags()
        self._enabled = _ray_runs()
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = {}
        self._gauges: dict[tuple[str, str], float] = {}
        self._observations: list[tuple[str, float]] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def count(self, metric: str, number: float = 1.0, tag: str = "") -> None:
        """A counter grows by ``number``; ``tag`` is the value of the metric's own tag, if it has one."""
        if not self._enabled:
            return
        with self._lock:
            self._counts[metric, tag] = self._counts.get((metric, tag), 0.0) + number

    def set(self, metric: str, value: float, tag: str = "") -> None:
        """A gauge is ``value`` from now on, until it is set again or this recorder ends."""
        if self._enabled:
            with self._lock:
                self._gauges[metric, tag] = value

    def observe(self, metric: str, value: float) -> None:
        """Add one value to a histogram."""
        if self._enabled:
            with self._lock:
                self._observations.append((metric, value))

    def flush(self) -> None:
        """Hand to Ray what was added since the last flush, and every gauge again, because Ray forgets them."""
        # Taken under the lock, handed over without it: Ray's calls may take long, and adding must not wait for them.
        with self._lock:
            counts, self._counts = self._counts, {}
            observations, self._observations = self._observations, []
            gauges = dict(self._gauges)
        if not _ray_runs():  # the session may have ended before the recorder did
            return
        for (metric, tag), number in counts.items():
            if number > 0:
                _ray_metric(metric).inc(number, self._tags_of(metric, tag))
        for (metric, tag), value in gauges.items():
            _ray_metric(metric).set(value, self._tags_of(metric, tag))
        for metric, value in observations:
            _ray_metric(metric).observe(value, self._tags)

    def _tags_of(self, metric: str, tag: str) -> dict[str, str]:
        """Common tags, and ``tag`` as the value of the metric's own one."""
        return {**self._tags, **dict.fromkeys(METRICS[metric].tags, tag)}

    def __enter__(self) -> Self:
        if self._enabled:
            self._thread = threading.Thread(target=self._flush_regularly, name="metrics", daemon=True)
            self._thread.start()
        return self

    def _flush_regularly(self) -> None:
        while not self._ended.wait(FLUSH_S):
            self.flush()

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()


@contextlib.contextmanager
def running(tags: MetricTags) -> Iterator[MetricsRecorder]:
    """A recorder for a stage; ``dubito_running`` is 1 as long as the block runs."""
    with MetricsRecorder(tags) as recorder:
        recorder.set("dubito_running", 1.0)
        try:
            yield recorder
        finally:
            recorder.set("dubito_running", 0.0)


class IdleTimer:
    """How long a process had nothing to work on. Each piece of work is a ``with`` block; blocks may overlap.

    The clock starts with the timer: waiting for the first piece of work counts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._idle_since_s = time.monotonic()
        self._waited_s = 0.0

    def __enter__(self) -> Self:
        with self._lock:
            if self._calls == 0:
                self._waited_s += time.monotonic() - self._idle_since_s
            self._calls += 1
        return self

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._calls -= 1
            self._idle_since_s = time.monotonic()

    def take_s(self) -> float:
        """Seconds of waiting since the last call of this, which begins anew; a wait that has not ended is not in it."""
        with self._lock:
            waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s


def _ray_runs() -> bool:
    """Whether there is a Ray session. Ray is not imported to find out: where nobody did, there is none."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@functools.cache
def _ray_metric(metric: str) -> Any:
    """Ray's object for a metric; a process makes one of each."""
    from ray.util import metrics

    row = METRICS[metric]
    options = {
        "description": f"{row.help} [{row.unit}]" if row.unit else row.help,
        "tag_keys": (*COMMON_TAGS, *row.tags),
    }
    if row.kind == "histogram":
        return metrics.Histogram(metric, boundaries=BUCKET_BOUNDS_S, **options)
    return (metrics.Counter if row.kind == "counter" else metrics.Gauge)(metric, **options)
