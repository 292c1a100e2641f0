"""One scheduled run: is there new data; train a challenger; compare it with the champion; promote it or not.

A run is a function of its inputs. Its id names the champion, the data and the settings; all that it writes lies below
that id and is committed once. So it may die at any moment: the next run of the same inputs goes on with what is stored
(members, the bundle, counts, the decision). The registry's entry, which makes a champion, is written last.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline import storage
from pipeline.datasets.dataset import open_dataset
from pipeline.datasets.diff import require_disjoint
from pipeline.models.bundle import open_bundle
from pipeline.retraining import challenger, registry
from pipeline.retraining.reason import RetrainReason, find_reason, keep_digests
from pipeline.retraining.settings import FrozenSettings, RetrainConfig
from pipeline.runtime.progress import ProgressSink, SilentSink
from pipeline.storage import lease

LEARNED_SPLITS = ("train", "val", "calibration")
"""Splits that a challenger learns from, or is chosen or calibrated on."""


@dataclass(frozen=True)
class RetrainOutcome:
    """What became of a run."""

    kind: Literal["nothing", "dry run", "refused", "promoted", "overtaken"]
    run: str
    """Id of the run."""
    messages: list[str]
    """Sentences for a person."""
    decision: dict[str, Any] | None = None
    """The decision as it is stored, where one was made."""


def retrain(
    config: RetrainConfig, *, force: bool = False, dry_run: bool = False, sink: ProgressSink | None = None
) -> RetrainOutcome:
    """Train a challenger, compare it with the champion and promote it, if there is a reason to.

    Args:
        config: Settings; all URIs absolute.
        force: Train without a reason too. The conditions of a promotion stay the same.
        dry_run: Only say what would be done.
        sink: Where progress goes.

    Raises:
        InputError: Settings that do not fit one another, images of the frozen test among those to train on, or another
            run that holds the lock.
    """
    sink = sink or SilentSink()
    # Is there a reason to train? This only reads, so most scheduled runs end here and leave nothing behind.
    reason = find_reason(config)
    run = run_id(config, reason)
    if not reason.text and not force:
        return RetrainOutcome("nothing", run, reason.messages)
    if dry_run:
        message = f"would train run {run} into '{_folder(config, run)}'"
        return RetrainOutcome("dry run", run, [*reason.messages, message])
    # Train and decide, under a lock: two runs of one model would train the same challenger twice. A decision that an
    # earlier attempt of this run has stored is final.
    decision = registry.decision(config.registry, config.name, run)
    if decision is None:
        locks = storage.join(registry.folder(config.registry, config.name), "locks")
        with lease.hold_lease(locks, f"retrain run {run}", config.lock_s):
            decision = _decide(config, reason, run, sink)
    # Act on it last, outside the lock: writing the entry is safe against other runs by itself.
    return _act(config, reason, run, decision)


def run_id(config: RetrainConfig, reason: RetrainReason) -> str:
    """A digest of everything that decides the outcome: champion, data, settings; not where they lie."""
    champion = None if reason.champion is None else [reason.champion.number, reason.champion.bundle_id]
    settings = {key: value for key, value in config.to_dict().items() if key not in ("data", "work", "lock_s")}
    content = json.dumps([champion, reason.info.fingerprint, settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _folder(config: RetrainConfig, run: str) -> str:
    return storage.join(config.work, config.name, run)


def _frozen_test(config: RetrainConfig, reason: RetrainReason) -> FrozenSettings:
    """The frozen test of this run: the config's, else the champion's, else the first dataset's test split."""
    if config.test is not None:
        return config.test
    if reason.champion is not None and reason.champion.test:
        return FrozenSettings.parse({"data": reason.champion.test, "split": reason.champion.test_split}, "registry")
    return FrozenSettings(data=reason.info.uri)


def _decide(config: RetrainConfig, reason: RetrainReason, run: str, sink: ProgressSink) -> dict[str, Any]:
    """Train a challenger and compare it with the champions; returns the decision as it is stored."""
    # A challenger that learns from images of the frozen test would seem better than it is: refused before training.
    frozen = _frozen_test(config, reason)
    test = open_dataset(frozen.data)
    require_disjoint(test, frozen.split, reason.info, LEARNED_SPLITS)
    decisions_before = registry.decisions_on_test(config.registry, config.name, test.fingerprint, frozen.split)

    # Both steps store what they made, so an attempt after a crash does only the rest.
    out = storage.join(_folder(config, run), "challenger")
    bundle = challenger.train_challenger(config, reason, out, sink)
    verdict = challenger.compare_with_champions(config, reason, frozen, bundle, sink)

    # The digests before the decision: once it is stored this function is not called again.
    keep_digests(config, reason.info)
    record = {
        **verdict,
        "challenger": {"bundle": bundle, "id": open_bundle(bundle).id},
        "champion": None if reason.champion is None else asdict(reason.champion),
        "data": {"uri": reason.info.uri, "fingerprint": reason.info.fingerprint},
        "changes": None if reason.diff is None else reason.diff.counts(),
        "doubt": reason.drift,
        "test": {
            "uri": test.uri,
            "split": frozen.split,
            "fingerprint": test.fingerprint,
            "looks_before": decisions_before,
        },
        "warnings": _warnings(decisions_before),
    }
    return registry.record_decision(config.registry, config.name, run, record)


def _warnings(decisions_before: int) -> list[str]:
    """What is said of a frozen test that so many decisions were made on before."""
    if decisions_before < registry.MAX_DECISIONS_ON_TEST:
        return []
    return [
        f"{decisions_before} decisions looked at this frozen test before: champions were chosen on it, and its figures "
        "flatter them; label a new one, and name it as test"
    ]


def _act(config: RetrainConfig, reason: RetrainReason, run: str, decision: dict[str, Any]) -> RetrainOutcome:
    """Write the registry's entry if the decision says so; repeated, it finds the same entry."""
    messages = [*reason.messages, *decision["reasons"], *decision["warnings"]]
    if not decision["promote"]:
        return RetrainOutcome("refused", run, [*messages, f"run {run}: the champion stays"], decision)
    try:
        entry = registry.add(
            config.registry,
            config.name,
            after=0 if reason.champion is None else reason.champion.number,
            kind="promotion",
            bundle=decision["challenger"]["bundle"],
            bundle_id=decision["challenger"]["id"],
            data=decision["data"]["uri"],
            fingerprint=decision["data"]["fingerprint"],
            test=decision["test"]["uri"],
            test_split=decision["test"]["split"],
            run=run,
            reasons=decision["reasons"],
        )
    except registry.OvertakenError as error:
        message = f"{error}; run again to be judged beside that one"
        return RetrainOutcome("overtaken", run, [*messages, message], decision)
    messages.append(f"run {run}: champion {entry.number} of '{config.name}' is bundle {entry.bundle_id}")
    return RetrainOutcome("promoted", run, messages, decision)
