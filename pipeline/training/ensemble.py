"""Fit M members that differ only by seed, side by side as resources allow, and bind them into one bundle.

A single model is an ensemble of one: ``dubito train`` runs the same code with M = 1.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import ray

from pipeline import __version__, models, storage
from pipeline.config import first_difference
from pipeline.datasets.dataset import DatasetInfo, open_dataset, row_groups
from pipeline.errors import DoneError, InputError, one_line, root_input_error
from pipeline.models import bundle, transfer
from pipeline.runtime import progress, prometheus
from pipeline.schema import BUNDLE_JSON, SCHEMA_VERSION
from pipeline.scoring import calibrate
from pipeline.training import ray_train
from pipeline.training.train_config import TrainConfig

POLL_S = 0.5
Fit = Callable[[ray_train.MemberRun], dict[str, Any]]
_NO_INPUT = ("out", "data", "ensemble")
"""Keys of a config that do not decide what a member becomes: places (the data counts by its fingerprint), retries."""


def train_ensemble(
    config: TrainConfig, members: int, *, resume: bool, sink: progress.ProgressSink, fit: Fit = ray_train.train_member
) -> bundle.Bundle:
    """Train ``members`` members into ``config.out`` and write ``config.out/bundle``.

    Args:
        config: Member k runs with seed ``config.seed + k``; nothing else differs.
        members: M, at least 1.
        resume: Go on with an unfinished run of the same inputs.
        sink: Shows the progress of every member.
        fit: Trains one member.

    Raises:
        DoneError: The bundle is there already, made of the same inputs.
        InputError: ``out`` holds something else, or an unfinished run and ``resume`` is False.
    """
    least = config.ensemble.min_members or 1
    if members < least:
        raise InputError(f"--members {members}: an ensemble needs at least {least} (ensemble.min_members)")
    info = open_dataset(config.data)
    loaded = _check(config, info)
    inputs = {
        "config": {key: value for key, value in config.resolved().items() if key not in _NO_INPUT},
        "members": members,
        "data_fingerprint": info.fingerprint,
        "weights": None if loaded is None else loaded.to_dict(),
        "schema_version": SCHEMA_VERSION,
    }
    _claim(config.out, inputs, resume)
    fits = _Members(config, members, _steps(config, info), sink, fit)
    fits.run()
    manifest = _manifest(config, info, fits.results, fits.failed) | {"transfer": inputs["weights"]}
    weights = [_weights(result) for _, result in sorted(fits.results.items())]
    staged = bundle.stage(_bundle_uri(config.out), manifest, weights)
    if calibrate.possible(config.task, info):
        staged = calibrate.calibrate(staged, config.data, config.calibrate, sink)
    return bundle.commit(staged)


def _bundle_uri(out: str) -> str:
    return storage.join(out, "bundle")


def _weights(result: dict[str, Any]) -> str:
    return storage.join(result["checkpoint"], "model.safetensors")


def _check(config: TrainConfig, info: DatasetInfo) -> transfer.LoadedWeights | None:
    """Everything about the input that can be refused before a worker starts; what transfer will load."""
    task = config.build_task(info, 1)
    if config.calibrate.risk is not None and not calibrate.possible(config.task, info):
        raise InputError(
            f"calibrate.risk = {config.calibrate.risk} wants a split 'calibration', which "
            f"'{info.uri}' has not; ingest with --set hold_out.calibration=0.1, or set calibrate.risk to null"
        )
    for split in ("train", "val"):
        row_groups(info, split)
    module = models.build_untrained(config.model, task.num_outputs)
    models.require_dropout(module, task.inference.dropout_passes, "config")
    return transfer.load_pretrained(config.transfer, module)


def _claim(out: str, inputs: dict[str, Any], resume: bool) -> None:
    """Make ``out`` this run's, or say whose it is."""
    uri = storage.join(out, "config.json")
    data = json.dumps(inputs, indent=1, sort_keys=True).encode()
    fresh = not storage.exists(uri)
    if fresh and storage.create_once(uri, data):
        return
    difference = first_difference(json.loads(storage.read_bytes(uri)), json.loads(data))
    if difference is not None:
        raise InputError(f"'{out}' belongs to a run of other inputs ({difference}); choose another out")
    if storage.exists(storage.join(_bundle_uri(out), BUNDLE_JSON)):
        raise DoneError(f"'{_bundle_uri(out)}' is done already, from the same inputs")
    if not resume:
        raise InputError(f"'{out}' holds an unfinished run of the same inputs; add --resume to go on with it")


def concurrency(members: int, workers: int, cpus: float, gpus: float) -> int:
    """Members at once: each takes ``workers`` CPUs (or GPUs) and leaves one CPU for its data."""
    fit = int(gpus // workers) if gpus >= workers else int(cpus // (workers + 1))
    return max(1, min(members, fit))


def _steps(config: TrainConfig, info: DatasetInfo) -> int:
    """Optimiser steps of one member."""
    end, global_batch = config.length(sum(group.rows for group in row_groups(info, "train")))
    return -(-end // global_batch)


@dataclass
class _Failed:
    """A member that was given up."""

    member: int
    seed: int
    error: str


class _Members:
    """Fits of the members: each a zero-CPU Ray task, as many at once as there is room for; failed ones are retried.

    A member that failed, or whose task, worker or node died, is taken up again from its last checkpoint: its run has
    a name of its own.
    """

    def __init__(self, config: TrainConfig, members: int, steps: int, sink: progress.ProgressSink, fit: Fit) -> None:
        self.config, self.members, self.steps, self.sink = config, members, steps, sink
        self.board, self.told = progress.start_board(), prometheus.MetricsRecorder(prometheus.stage_tags("members"))
        self.task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD")(fit)
        self.waiting, self.failures = list(range(members)), Counter[int]()
        self.running: dict[ray.ObjectRef, int] = {}
        self.results: dict[int, dict[str, Any]] = {}
        self.failed: list[_Failed] = []

    def run(self) -> None:
        """Until every member is done or given up."""
        while self.waiting or self.running:
            self._start()
            done, _ = ray.wait(list(self.running), timeout=POLL_S)
            self._show()
            for ref in done:
                self._collect(self.running.pop(ref), ref)
        self._show()

    def _start(self) -> None:
        resources, workers = ray.cluster_resources(), self.config.train.workers  # nodes come and go
        at_once = concurrency(self.members, workers, resources.get("CPU", 1), resources.get("GPU", 0))
        threads = self.config.train.threads or max(1, (os.cpu_count() or 1) // (at_once * workers))
        while self.waiting and len(self.running) < at_once:
            k = self.waiting.pop(0)
            run = _member(self.config, k, self.members, threads, self.board)
            self.sink.update(run.stage, 0, self.steps, _retry_note(self.failures[k]), "steps")
            self.running[self.task.remote(run)] = k

    def _collect(self, k: int, ref: Any) -> None:
        try:
            self.results[k] = ray.get(ref)
        except Exception as error:
            if root_input_error(error) is not None:
                raise
            self.failures[k] += 1
            self.told.count("dubito_restarts_total", 1, "member")
            self.told.flush()
            if self.failures[k] <= self.config.ensemble.retries:
                self.waiting.append(k)
                return
            least = self.config.ensemble.min_members or self.members
            self.failed.append(_Failed(k, self.config.seed + k, one_line(error)))
            if self.members - len(self.failed) < least:
                raise

    def _show(self) -> None:
        stages: dict[str, Any] = ray.get(self.board.read.remote())
        for stage, update in sorted(stages.items()):
            self.sink.update(stage, *update)


def _retry_note(failures: int) -> str:
    return f"taken up again after {failures} failure(s)" if failures else ""


def _member(config: TrainConfig, k: int, members: int, threads: int, board: Any) -> ray_train.MemberRun:
    tree = {**config.to_dict(), "seed": config.seed + k}
    stage = "train" if members == 1 else f"member {k}"
    uri, events = (storage.join(config.out, name, str(k)) for name in ("members", "tensorboard"))
    return ray_train.MemberRun(tree, uri, stage, threads, board, events, prometheus.stage_tags(stage))


def _manifest(
    config: TrainConfig, info: DatasetInfo, fitted: dict[int, dict[str, Any]], failed: list[_Failed]
) -> dict[str, Any]:
    results = sorted(fitted.items())
    return {
        "task": config.task,
        "model": models.describe(config.model),
        "classes": info.classes,
        "background": info.background,
        "input": config.input.to_dict(),
        "predict": config.to_dict()["predict"],
        "seeds": [config.seed + k for k, _ in results],
        "failed": [asdict(each) for each in failed],
        "data": {"name": info.name, "fingerprint": info.fingerprint},
        "metrics": [result["metrics"] for _, result in results],
        "calibration": None,
        "threshold": None,
        "code_version": __version__,
        "schema_version": SCHEMA_VERSION,
    }
