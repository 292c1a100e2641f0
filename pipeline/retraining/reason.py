"""Is there a reason to train a challenger: new labelled data since the champion, or uncertainty that drifted."""

import re
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.datasets.dataset import DATASET_JSON, DatasetInfo, open_dataset
from pipeline.datasets.diff import DIGESTS, DatasetDiff, diff_digests, digests
from pipeline.errors import InputError
from pipeline.retraining import drift, registry
from pipeline.retraining.settings import RetrainConfig
from pipeline.storage.checksum import read_verified


@dataclass(frozen=True)
class RetrainReason:
    """What speaks for training a challenger, found before anything is done."""

    champion: registry.Entry | None
    """None: there is none yet."""
    info: DatasetInfo
    """The newest dataset."""
    diff: DatasetDiff | None
    """How it differs from the champion's; None without a champion."""
    drift: dict[str, Any] | None
    """What ``measure_drift`` returned; None: drift is not measured."""
    text: str
    """Why a challenger is to be trained; '' where there is no reason."""
    messages: list[str] = field(default_factory=list)
    """Sentences for a person."""


def find_reason(config: RetrainConfig) -> RetrainReason:
    """Whether there is enough new labelled data since the champion, or less but with drifted uncertainty."""
    info = open_dataset(newest_dataset(config.data))
    champion = registry.champion(config.registry, config.name)
    if champion is None:
        return RetrainReason(
            None, info, None, None, "there is no champion yet", [f"registry '{config.name}' has no champion"]
        )
    messages = [f"champion {champion.number} (bundle {champion.bundle_id}), of data {champion.fingerprint[:12]}"]
    diff = diff_digests(_champion_digests(config, champion), digests(info.uri))
    messages.append(diff.describe())
    measured = None if config.drift is None else drift.measure_drift(config.drift)
    if measured is not None:
        messages.append(drift.describe_drift(measured))
    # Without any new label a challenger would learn from the same data again, whatever drifted.
    reason = ""
    if info.fingerprint != champion.fingerprint and diff.fresh:
        if diff.fresh >= config.least_new:
            reason = "new data"
        elif measured is not None and measured["drifted"]:
            reason = "doubt drifted, and there is new data"
    if not reason:
        messages.append(f"nothing to do (least_new = {config.least_new})")
    return RetrainReason(champion, info, diff, measured, reason, messages)


def newest_dataset(uri: str) -> str:
    """``uri`` if it is a dataset, else the last by name of the datasets directly below it, ``9`` before ``10``.

    Raises:
        InputError: There is no dataset.
    """
    if storage.exists(storage.join(uri, DATASET_JSON)):
        return uri
    for name in sorted(storage.names_in(uri, folders=True), key=_natural_order, reverse=True):
        if storage.exists(storage.join(uri, name, DATASET_JSON)):
            return storage.join(uri, name)
    raise InputError(f"data '{uri}' is no dataset and holds none; write one there with dubito ingest --out")


def _natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts digits in names by their value."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _digests_uri(config: RetrainConfig, fingerprint: str) -> str:
    return storage.join(registry.folder(config.registry, config.name), "digests", f"{fingerprint}.parquet")


def _champion_digests(config: RetrainConfig, champion: registry.Entry) -> Any:
    """Digests of the champion's dataset: the registry's copy if there is one, since datasets are deleted."""
    copy = _digests_uri(config, champion.fingerprint)
    return digests(copy if storage.exists(copy) else champion.data)


def keep_digests(config: RetrainConfig, info: DatasetInfo) -> None:
    """Copy a dataset's digests into the registry, where later runs compare with them."""
    copy = _digests_uri(config, info.fingerprint)
    if storage.exists(copy):
        return
    sha256 = next(file["sha256"] for file in info.meta["files"] if file["path"] == DIGESTS)
    storage.write_bytes(copy, read_verified(storage.join(info.uri, DIGESTS), sha256, "ingest again"))
