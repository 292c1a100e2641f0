"""One scheduled run: is there news; train a challenger; judge it beside the champion; promote it or not.

A run is a function of what it is given. Its id names the champion, the data and the settings; all that it writes lies
below that id and is committed once. So it may die at any moment: the next run of the same inputs takes up what is
there (members, the bundle, counts, the decision). The registry's entry, which makes a champion, is written last.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import Field

from pipeline import storage
from pipeline.config import Settings
from pipeline.datasets.dataset import DATASET_JSON, DatasetInfo, open_dataset
from pipeline.datasets.diff import DIGESTS, DatasetDiff, diff_digests, digests, require_disjoint
from pipeline.errors import DoneError, InputError
from pipeline.models.bundle import open_bundle
from pipeline.retraining import drift, promotion, registry, stored_metrics
from pipeline.retraining.drift import DriftSettings
from pipeline.retraining.promotion import JudgeSettings
from pipeline.runtime.progress import ProgressSink, SilentSink
from pipeline.storage import lease
from pipeline.storage.checksum import read_verified
from pipeline.training import ensemble
from pipeline.training.train_config import TrainConfig

LABELLED = ("train", "val", "calibration")
"""Splits that a challenger learns from, or is chosen or calibrated on."""


class FrozenSettings(Settings):
    """The frozen test: images on which every champion was judged, and will be."""

    data: str
    split: Literal["train", "val", "calibration", "test"] = "test"


class RetrainConfig(Settings):
    """What a scheduled run is given."""

    name: str
    """Of the model in the registry."""
    registry: str
    """URI of the registry."""
    work: str
    """URI of a folder: each run writes below one of its own."""
    data: str
    """URI of a dataset, or of a folder of datasets, of which the last by name counts (``9`` before ``10``)."""
    recipe: dict[str, Any]
    """A config of ``dubito train`` without ``data`` and ``out``; in a file, the path of one is enough."""
    members: int = Field(default=1, ge=1)
    start: Literal["fresh", "warm"] = "fresh"
    """``warm``: the backbone begins with the champion's weights."""
    least_new: int = Field(default=1, ge=1)
    """Labelled images that the champion's data had not, or not with these labels; fewer are no reason to train."""
    test: FrozenSettings | None = None
    """null: the ``test`` split of the first champion's dataset."""
    newest: Literal["val", "calibration", "test"] = "test"
    """The split of ``data`` whose images, as far as the champion's dataset did not have them, are the newest data:
    held out by hash before training (``hold_out.test`` of ``dubito ingest``)."""
    drift: DriftSettings | None = None
    judge: JudgeSettings = Field(default_factory=JudgeSettings)
    lock_s: float = Field(default=900.0, gt=0)
    """How long the lock of a run that died keeps others waiting."""


@dataclass(frozen=True)
class RetrainReason:
    """What a run finds before it does anything."""

    champion: registry.Entry | None
    info: DatasetInfo
    changed: DatasetDiff | None
    drifted: dict[str, Any] | None
    reason: str
    """Why a challenger is to be trained; '' where there is no reason."""
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RetrainOutcome:
    """What became of a run: sentences for a person, and the decision where one was made."""

    kind: Literal["nothing", "dry run", "refused", "promoted", "overtaken"]
    run: str
    said: list[str]
    decision: dict[str, Any] | None = None


def retrain(
    config: RetrainConfig, *, force: bool = False, dry_run: bool = False, sink: ProgressSink | None = None
) -> RetrainOutcome:
    """Train, judge and promote, as far as there is a reason to.

    Args:
        config: What is given; all URIs absolute.
        force: Train without a reason too. The judge is not asked to be kinder.
        dry_run: Only say what would be done.
        sink: Where progress goes.

    Raises:
        InputError: Settings that do not fit one another, images of the frozen test among those to train on, or another
            run that holds the lock.
    """
    sink = sink or SilentSink()
    news = find_reason(config, sink)
    name = run_id(config, news)
    if not news.reason and not force:
        return RetrainOutcome("nothing", name, news.said)
    if dry_run:
        return RetrainOutcome("dry run", name, [*news.said, f"would train run {name} into '{_folder(config, name)}'"])
    decision = registry.decision(config.registry, config.name, name)
    if decision is None:
        where = registry.folder(config.registry, config.name)
        with lease.hold_lease(storage.join(where, "locks"), f"retrain run {name}", config.lock_s):
            decision = _decide(config, news, name, sink)
    return _act(config, news, name, decision)


def find_reason(config: RetrainConfig, sink: ProgressSink) -> RetrainReason:
    """Is there new labelled data since the champion, enough of it; or did doubt drift?"""
    info = open_dataset(newest_dataset(config.data))
    champion = registry.champion(config.registry, config.name)
    if champion is None:
        return RetrainReason(
            None, info, None, None, "there is no champion yet", [f"registry '{config.name}' has no champion"]
        )
    said = [f"champion {champion.number} (bundle {champion.bundle_id}), of data {champion.fingerprint[:12]}"]
    changed = diff_digests(_digests(config, champion), digests(info.uri))
    drifted = None if config.drift is None else drift.measure_drift(config.drift)
    said.append(changed.describe())
    if drifted is not None:
        said.append(drift.describe_drift(drifted))
    reason = ""
    if info.fingerprint != champion.fingerprint and changed.fresh:
        if changed.fresh >= config.least_new:
            reason = "new data"
        elif drifted is not None and drifted["drifted"]:
            reason = "doubt drifted, and there is new data"
    if not reason:
        said.append(f"nothing to do (least_new = {config.least_new})")
    return RetrainReason(champion, info, changed, drifted, reason, said)


def newest_dataset(uri: str) -> str:
    """``uri`` if it is a dataset, else the last by name of the datasets directly below it, ``9`` before ``10``.

    Raises:
        InputError: There is none.
    """
    if storage.exists(storage.join(uri, DATASET_JSON)):
        return uri
    for name in sorted(storage.names_in(uri, folders=True), key=_by_numbers, reverse=True):
        if storage.exists(storage.join(uri, name, DATASET_JSON)):
            return storage.join(uri, name)
    raise InputError(f"data '{uri}' is no dataset and holds none; write one there with dubito ingest --out")


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts names as people count: digits by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"[0-9]+|[^0-9]+", name)]


def run_id(config: RetrainConfig, news: RetrainReason) -> str:
    """Names what decides the outcome: champion, data, settings."""
    champion = None if news.champion is None else [news.champion.number, news.champion.bundle_id]
    settings = {key: value for key, value in config.to_dict().items() if key not in ("data", "work", "lock_s")}
    content = json.dumps([champion, news.info.fingerprint, settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _folder(config: RetrainConfig, name: str) -> str:
    return storage.join(config.work, config.name, name)


def _frozen(config: RetrainConfig, news: RetrainReason) -> FrozenSettings:
    """The frozen test of this run."""
    if config.test is not None:
        return config.test
    if news.champion is not None and news.champion.test:
        return FrozenSettings.parse({"data": news.champion.test, "split": news.champion.test_split}, "registry")
    return FrozenSettings(data=news.info.uri)


def _decide(config: RetrainConfig, news: RetrainReason, name: str, sink: ProgressSink) -> dict[str, Any]:
    """Train and judge; returns the decision as it was committed."""
    frozen = _frozen(config, news)
    test = open_dataset(frozen.data)
    require_disjoint(test, frozen.split, news.info, LABELLED)
    before = registry.decisions_on_test(config.registry, config.name, test.fingerprint, frozen.split)
    challenger = _train(config, news, name, sink)
    verdict = _judge(config, news, frozen, challenger, sink)
    _keep_digests(config, news.info)
    record = {
        **verdict,
        "challenger": {"bundle": challenger, "id": open_bundle(challenger).id},
        "champion": None if news.champion is None else asdict(news.champion),
        "data": {"uri": news.info.uri, "fingerprint": news.info.fingerprint},
        "changes": None if news.changed is None else news.changed.counts(),
        "doubt": news.drifted,
        "test": {"uri": test.uri, "split": frozen.split, "fingerprint": test.fingerprint, "looks_before": before},
        "warnings": _warnings(before),
    }
    return registry.record_decision(config.registry, config.name, name, record)


def _warnings(looks: int) -> list[str]:
    if looks < registry.MAX_DECISIONS_ON_TEST:
        return []
    return [
        f"{looks} decisions looked at this frozen test before: champions were chosen on it, and its figures flatter "
        "them; label a new one, and name it as test"
    ]


def _digests_uri(config: RetrainConfig, fingerprint: str) -> str:
    return storage.join(registry.folder(config.registry, config.name), "digests", f"{fingerprint}.parquet")


def _digests(config: RetrainConfig, champion: registry.Entry) -> Any:
    """What the champion saw: from the registry's own copy, since datasets are deleted."""
    kept = _digests_uri(config, champion.fingerprint)
    return digests(kept if storage.exists(kept) else champion.data)


def _keep_digests(config: RetrainConfig, info: DatasetInfo) -> None:
    kept, source = _digests_uri(config, info.fingerprint), storage.join(info.uri, DIGESTS)
    if storage.exists(kept):
        return
    sha256 = next(file["sha256"] for file in info.meta["files"] if file["path"] == DIGESTS)
    storage.write_bytes(kept, read_verified(source, sha256, "ingest again"))


def _train(config: RetrainConfig, news: RetrainReason, name: str, sink: ProgressSink) -> str:
    """The challenger's bundle; an unfinished one is gone on with."""
    tree = {**config.recipe, "data": news.info.uri, "out": storage.join(_folder(config, name), "challenger")}
    if config.start == "warm" and news.champion is not None:
        weights = storage.join(news.champion.bundle, "members/0/model.safetensors")
        tree["transfer"] = {**tree.get("transfer", {}), "init": "finetune", "weights": weights}
    settings = TrainConfig.parse(tree, "recipe").with_absolute_uris()
    try:
        return ensemble.train_ensemble(settings, config.members, resume=True, sink=sink).uri
    except DoneError:
        return storage.join(settings.out, "bundle")


def _judge(
    config: RetrainConfig, news: RetrainReason, frozen: FrozenSettings, challenger: str, sink: ProgressSink
) -> dict[str, Any]:
    """The judge's record: challenger, champion and the best champion ever on the same images."""
    kept = storage.join(registry.folder(config.registry, config.name), "evaluations")

    def pool(bundle: str, data: str, split: str) -> promotion.Metric:
        return stored_metrics.metrics_on_split(kept, bundle, data, split, sink).pool

    own = pool(challenger, frozen.data, frozen.split)
    if news.champion is None:
        return promotion.decide_promotion(config.judge, promotion.FrozenTestMetrics(own, None), None)
    last = pool(news.champion.bundle, frozen.data, frozen.split)
    best, notes = _best(config, news.champion, lambda bundle: pool(bundle, frozen.data, frozen.split))
    newest = None
    if news.changed is not None and news.changed.unseen and news.info.counts.get(config.newest, {}).get("labelled"):
        mine, its = (pool(bundle, news.info.uri, config.newest) for bundle in (challenger, news.champion.bundle))
        newest = promotion.NewestMetrics(mine, its, news.changed.unseen)
    drifted = news.drifted is not None and bool(news.drifted["drifted"])
    made = promotion.decide_promotion(config.judge, promotion.FrozenTestMetrics(own, last, best), newest, drifted)
    return {**made, "notes": notes}


def _best(
    config: RetrainConfig, champion: registry.Entry, pool: Callable[[str], promotion.Metric]
) -> tuple[promotion.Metric | None, list[str]]:
    """The former champion that is best on the frozen test, unless it is champion again; and what was left out."""
    found: dict[str, promotion.Metric] = {}
    notes: list[str] = []
    for entry in registry.entries(config.registry, config.name):
        if entry.bundle_id in found or entry.bundle_id == champion.bundle_id:
            continue
        try:
            found[entry.bundle_id] = pool(entry.bundle)
        except InputError as error:
            notes.append(f"champion {entry.number} is not compared with: {error}")
    ranked = {key: promotion.main_figure(metric) for key, metric in found.items()}
    known = {key: value for key, value in ranked.items() if value is not None}
    return (found[max(known, key=lambda key: known[key])] if known else None), notes


def _act(config: RetrainConfig, news: RetrainReason, name: str, decision: dict[str, Any]) -> RetrainOutcome:
    """Write the registry's entry if the decision says so; again and again the same one."""
    said = [*news.said, *decision["reasons"], *decision["warnings"]]
    if not decision["promote"]:
        return RetrainOutcome("refused", name, [*said, f"run {name}: the champion stays"], decision)
    try:
        made = registry.add(
            config.registry, config.name, 0 if news.champion is None else news.champion.number, kind="promotion",
            bundle=decision["challenger"]["bundle"], bundle_id=decision["challenger"]["id"],
            data=decision["data"]["uri"], fingerprint=decision["data"]["fingerprint"], test=decision["test"]["uri"],
            test_split=decision["test"]["split"], run=name, reasons=decision["reasons"],
        )  # fmt: skip
    except registry.OvertakenError as error:
        return RetrainOutcome("overtaken", name, [*said, f"{error}; run again to be judged beside that one"], decision)
    said.append(f"run {name}: champion {made.number} of '{config.name}' is bundle {made.bundle_id}")
    return RetrainOutcome("promoted", name, said, decision)
