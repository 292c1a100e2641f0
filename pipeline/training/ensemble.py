"""Train M members that differ only by seed, and bind them into one bundle.

A single model is an ensemble of one: ``dubito train`` runs the same code with M = 1.
"""

import json
from dataclasses import asdict
from typing import Any

from pipeline import __version__, models, storage
from pipeline.config import first_difference
from pipeline.datasets.dataset import DatasetInfo, open_dataset, row_groups
from pipeline.errors import DoneError, InputError
from pipeline.models import bundle, transfer
from pipeline.runtime import progress
from pipeline.schema import BUNDLE_JSON, SCHEMA_VERSION
from pipeline.scoring import calibrate
from pipeline.training import ray_train
from pipeline.training.member_scheduler import FailedMember, MemberScheduler, TrainMember
from pipeline.training.train_config import TrainConfig

_NOT_INPUTS = ("out", "data", "ensemble")
"""Keys of a config that do not decide what a member becomes: places (the data counts by its fingerprint), retries."""


def train_ensemble(
    config: TrainConfig,
    members: int,
    *,
    resume: bool,
    sink: progress.ProgressSink,
    train_member: TrainMember = ray_train.train_member,
) -> bundle.Bundle:
    """Train ``members`` members into ``config.out`` and write ``config.out/bundle``.

    Args:
        config: Member k runs with seed ``config.seed + k``; nothing else differs.
        members: M, at least 1.
        resume: Go on with an unfinished run of the same inputs.
        sink: Shows the progress of every member.
        train_member: Trains one member.

    Raises:
        DoneError: The bundle is there already, made of the same inputs.
        InputError: ``out`` holds something else, or an unfinished run and ``resume`` is False.
    """
    min_members = config.ensemble.min_members or 1
    if members < min_members:
        raise InputError(f"--members {members}: an ensemble needs at least {min_members} (ensemble.min_members)")
    # Everything that can be refused is refused before the folder is claimed and before a worker starts.
    info = open_dataset(config.data)
    loaded_weights = _check_inputs(config, info)
    inputs = {
        "config": {key: value for key, value in config.resolved().items() if key not in _NOT_INPUTS},
        "members": members,
        "data_fingerprint": info.fingerprint,
        "weights": None if loaded_weights is None else loaded_weights.to_dict(),
        "schema_version": SCHEMA_VERSION,
    }
    _claim_folder(config.out, inputs, resume)

    scheduler = MemberScheduler(config, members, _num_steps(config, info), sink, train_member)
    scheduler.run()

    # The bundle is staged first and committed last: a run that dies in between leaves none, and is resumed.
    manifest = bundle_manifest(config, info, scheduler.results, scheduler.failed) | {"transfer": inputs["weights"]}
    weights = [
        storage.join(result["checkpoint"], "model.safetensors") for _, result in sorted(scheduler.results.items())
    ]
    staged = bundle.stage(_bundle_uri(config.out), manifest, weights)
    if calibrate.possible(config.task, info):
        staged = calibrate.calibrate(staged, config.data, config.calibrate, sink)
    return bundle.commit(staged)


def _bundle_uri(out: str) -> str:
    return storage.join(out, "bundle")


def _check_inputs(config: TrainConfig, info: DatasetInfo) -> transfer.LoadedWeights | None:
    """Refuse what config and dataset cannot do; returns what transfer will load.

    Raises:
        InputError: A split, labels, or settings that do not fit one another.
    """
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


def _claim_folder(out: str, inputs: dict[str, Any], resume: bool) -> None:
    """Make ``out`` the folder of this run, or refuse it.

    Raises:
        DoneError: It holds a bundle of the same inputs.
        InputError: It belongs to a run of other inputs, or to an unfinished one and ``resume`` is False.
    """
    uri = storage.join(out, "config.json")
    content = json.dumps(inputs, indent=1, sort_keys=True).encode()
    # Of two runs that want a new folder, one creates the file; the other goes on as if it had been there.
    is_new = not storage.exists(uri)
    if is_new and storage.create_once(uri, content):
        return
    difference = first_difference(json.loads(storage.read_bytes(uri)), json.loads(content))
    if difference is not None:
        raise InputError(f"'{out}' belongs to a run of other inputs ({difference}); choose another out")
    if storage.exists(storage.join(_bundle_uri(out), BUNDLE_JSON)):
        raise DoneError(f"'{_bundle_uri(out)}' is done already, from the same inputs")
    if not resume:
        raise InputError(f"'{out}' holds an unfinished run of the same inputs; add --resume to go on with it")


def _num_steps(config: TrainConfig, info: DatasetInfo) -> int:
    """Optimiser steps of one member."""
    end, global_batch = config.length(sum(group.rows for group in row_groups(info, "train")))
    return -(-end // global_batch)


def bundle_manifest(
    config: TrainConfig, info: DatasetInfo, results: dict[int, dict[str, Any]], failed: list[FailedMember]
) -> dict[str, Any]:
    """What the bundle says about itself, not yet calibrated.

    Args:
        config: Of the run.
        info: The dataset that it was trained on.
        results: By member: ``metrics`` of its best checkpoint.
        failed: Members that were given up.
    """
    trained = sorted(results.items())
    return {
        "task": config.task,
        "model": models.describe(config.model),
        "classes": info.classes,
        "background": info.background,
        "input": config.input.to_dict(),
        "predict": config.to_dict()["predict"],
        "seeds": [config.seed + member for member, _ in trained],
        "failed": [asdict(member) for member in failed],
        "data": {"name": info.name, "fingerprint": info.fingerprint},
        "metrics": [result["metrics"] for _, result in trained],
        "calibration": None,
        "threshold": None,
        "code_version": __version__,
        "schema_version": SCHEMA_VERSION,
    }
