"""A challenger: trained, and compared with the champions on the same images."""

from collections.abc import Callable
from typing import Any

from pipeline import storage
from pipeline.errors import DoneError, InputError
from pipeline.retraining import promotion, registry, stored_metrics
from pipeline.retraining.reason import RetrainReason
from pipeline.retraining.settings import FrozenSettings, RetrainConfig
from pipeline.runtime.progress import ProgressSink
from pipeline.training import ensemble
from pipeline.training.train_config import TrainConfig


def train_challenger(config: RetrainConfig, reason: RetrainReason, out: str, sink: ProgressSink) -> str:
    """Train a challenger into ``out``, going on with an unfinished one; returns its bundle's URI."""
    tree = {**config.recipe, "data": reason.info.uri, "out": out}
    if config.start == "warm" and reason.champion is not None:
        weights = storage.join(reason.champion.bundle, "members/0/model.safetensors")
        tree["transfer"] = {**tree.get("transfer", {}), "init": "finetune", "weights": weights}
    settings = TrainConfig.parse(tree, "recipe").with_absolute_uris()
    try:
        return ensemble.train_ensemble(settings, config.members, resume=True, sink=sink).uri
    except DoneError:  # an earlier attempt of the same run has trained it
        return storage.join(settings.out, "bundle")


def compare_with_champions(
    config: RetrainConfig, reason: RetrainReason, frozen: FrozenSettings, challenger: str, sink: ProgressSink
) -> dict[str, Any]:
    """The promotion's record: challenger, champion and the best champion ever on the same images.

    Args:
        config: Settings.
        reason: With the champion, and what is new since its dataset.
        frozen: The frozen test.
        challenger: URI of a bundle.
        sink: Where progress goes, as far as bundles are scored now.
    """
    folder = storage.join(registry.folder(config.registry, config.name), "evaluations")

    def pool_metrics(bundle: str, data: str, split: str) -> promotion.Metric:
        return stored_metrics.metrics_on_split(folder, bundle, data, split, sink).pool

    def on_frozen_test(bundle: str) -> promotion.Metric:
        return pool_metrics(bundle, frozen.data, frozen.split)

    challenger_metrics = on_frozen_test(challenger)
    if reason.champion is None:
        frozen_test = promotion.FrozenTestMetrics(challenger_metrics, None)
        return promotion.decide_promotion(config.judge, frozen_test, None)
    champion_metrics = on_frozen_test(reason.champion.bundle)
    best, notes = _best_former_champion(config, reason.champion, on_frozen_test)

    # The newest images show whether the challenger has learned what changed; there are some only if the champion's
    # dataset did not have them all, and they are labelled.
    newest = None
    if reason.diff is not None and reason.diff.unseen and reason.info.counts.get(config.newest, {}).get("labelled"):
        newest = promotion.NewestMetrics(
            challenger=pool_metrics(challenger, reason.info.uri, config.newest),
            champion=pool_metrics(reason.champion.bundle, reason.info.uri, config.newest),
            ids=reason.diff.unseen,
        )
    drifted = reason.drift is not None and bool(reason.drift["drifted"])
    frozen_test = promotion.FrozenTestMetrics(challenger_metrics, champion_metrics, best)
    record = promotion.decide_promotion(config.judge, frozen_test, newest, drifted)
    return {**record, "notes": notes}


def _best_former_champion(
    config: RetrainConfig, champion: registry.Entry, on_frozen_test: Callable[[str], promotion.Metric]
) -> tuple[promotion.Metric | None, list[str]]:
    """(metrics of the former champion that is best on the frozen test, notes on those that could not be compared).

    None: there is no other bundle than the present champion's.
    """
    metrics: dict[str, promotion.Metric] = {}
    notes: list[str] = []
    for entry in registry.entries(config.registry, config.name):
        # After a rollback a bundle has several entries.
        if entry.bundle_id in metrics or entry.bundle_id == champion.bundle_id:
            continue
        try:
            metrics[entry.bundle_id] = on_frozen_test(entry.bundle)
        except InputError as error:  # an old bundle may be gone, or have other classes
            notes.append(f"champion {entry.number} is not compared with: {error}")
    figures = {bundle_id: promotion.main_figure(metric) for bundle_id, metric in metrics.items()}
    ranked = {bundle_id: figure for bundle_id, figure in figures.items() if figure is not None}
    if not ranked:
        return None, notes
    return metrics[max(ranked, key=lambda bundle_id: ranked[bundle_id])], notes
