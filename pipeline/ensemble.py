"""Fit M members that differ only by seed, side by side as resources allow, and bind them into one bundle.

A single model is an ensemble of one: ``dubito train`` runs the same code with M = 1.
"""

import json
import os
from typing import Any

import ray

from pipeline import __version__, bundle, calibrate, models, storage, telemetry, train
from pipeline.config import first_difference
from pipeline.datasets import DatasetInfo, open_dataset, row_groups
from pipeline.errors import DoneError, InputError
from pipeline.models import transfer
from pipeline.recipe import TrainConfig
from pipeline.schema import SCHEMA_VERSION

POLL_S = 0.5


def run(config: TrainConfig, members: int, *, resume: bool, sink: telemetry.Sink) -> bundle.Bundle:
    """Train ``members`` members into ``config.out`` and write ``config.out/bundle``.

    Args:
        config: Member k runs with seed ``config.seed + k``; nothing else differs.
        members: M, at least 1.
        resume: Go on with an unfinished run of the same inputs.
        sink: Shows the progress of every member.

    Raises:
        DoneError: The bundle is there already, made of the same inputs.
        InputError: ``out`` holds something else, or an unfinished run and ``resume`` is False.
    """
    if members < 1:
        raise InputError(f"--members {members}: an ensemble needs at least 1 member")
    info = open_dataset(config.data)
    loaded = _check(config, info)
    inputs = {
        "config": {key: value for key, value in config.resolved().items() if key not in ("out", "data")},
        "members": members,
        "data_fingerprint": info.fingerprint,
        "weights": None if loaded is None else loaded.to_dict(),
        "schema_version": SCHEMA_VERSION,
    }
    _claim(config.out, inputs, resume)
    results = _fit_members(config, members, _steps(config, info), sink)
    manifest = _manifest(config, info, members, results) | {"transfer": inputs["weights"]}
    staged = bundle.stage(_bundle_uri(config.out), manifest, [_weights(result) for result in results])
    if calibrate.possible(config.task, info):
        staged = calibrate.calibrate(staged, config.data, config.calibrate, sink)
    return bundle.commit(staged)


def _bundle_uri(out: str) -> str:
    return storage.join(out, "bundle")


def _weights(result: dict[str, Any]) -> str:
    return storage.join(result["checkpoint"], "model.safetensors")


def _check(config: TrainConfig, info: DatasetInfo) -> transfer.Loaded | None:
    """Everything about the input that can be refused before a worker starts; what transfer will load."""
    settings = config.model_settings()
    task = config.build_task(info, 1)
    if config.calibrate.risk is not None and not calibrate.possible(config.task, info):
        raise InputError(
            f"calibrate.risk = {config.calibrate.risk} wants a split 'calibration', which "
            f"'{info.uri}' has not; ingest with --set hold_out.calibration=0.1, or set calibrate.risk to null"
        )
    for split in ("train", "val"):
        row_groups(info, split)
    module = models.skeleton(settings, task.num_outputs)
    models.require_dropout(module, task.inference.dropout_passes, "config")
    return transfer.prepare(config.transfer, module)


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
    if storage.exists(storage.join(_bundle_uri(out), "manifest.json")):
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


def _fit_members(config: TrainConfig, members: int, steps: int, sink: telemetry.Sink) -> list[dict[str, Any]]:
    """Each member is a zero-CPU Ray task around one fit; at most ``concurrency`` at a time."""
    resources = ray.cluster_resources()
    at_once = concurrency(members, config.train.workers, resources.get("CPU", 1), resources.get("GPU", 0))
    threads = config.train.threads or max(1, (os.cpu_count() or 1) // (at_once * config.train.workers))
    board = telemetry.start_board()
    fit = ray.remote(num_cpus=0, max_retries=0)(train.fit)
    waiting = list(range(members))
    running: dict[ray.ObjectRef, int] = {}
    results: dict[int, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            k = waiting.pop(0)
            run = _member(config, k, members, threads, board)
            sink.update(run.stage, 0, steps, "", "steps")
            running[fit.remote(run)] = k
        done, _ = ray.wait(list(running), timeout=POLL_S)
        _show(board, sink)
        for ref in done:
            results[running.pop(ref)] = ray.get(ref)
    _show(board, sink)
    return [results[k] for k in range(members)]


def _member(config: TrainConfig, k: int, members: int, threads: int, board: Any) -> train.Fit:
    tree = {**config.to_dict(), "seed": config.seed + k}
    stage = "train" if members == 1 else f"member {k}"
    return train.Fit(tree, storage.join(config.out, "members", str(k)), stage, threads, board)


def _show(board: Any, sink: telemetry.Sink) -> None:
    stages: dict[str, Any] = ray.get(board.read.remote())
    for stage, update in sorted(stages.items()):
        sink.update(stage, *update)


def _manifest(config: TrainConfig, info: DatasetInfo, members: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": config.task,
        "model": models.describe(config.model_settings()),
        "classes": info.classes,
        "background": info.background,
        "input": config.input.to_dict(),
        "predict": config.predict,
        "seeds": [config.seed + k for k in range(members)],
        "data": {"name": info.name, "fingerprint": info.fingerprint},
        "metrics": [result["metrics"] for result in results],
        "calibration": None,
        "threshold": None,
        "code_version": __version__,
        "schema_version": SCHEMA_VERSION,
    }
