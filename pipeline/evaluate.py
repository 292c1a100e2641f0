"""Scored rows -> merged metrics: of the pool, and of every member, on a labelled split."""

from typing import Any

from pipeline.datasets import open_dataset
from pipeline.score import score
from pipeline.telemetry import Sink


def evaluate(bundle: str, data: str, split: str, sink: Sink | None = None, **resources: Any) -> dict[str, Any]:
    """Metrics of ``bundle`` on ``split``; nothing is written.

    Every image is read and decoded once; the units' counts add up, so the result depends neither on the
    number of actors nor on the order in which they finish.

    Args:
        bundle: URI of a bundle.
        data: URI of a dataset with labels for the bundle's task, of the same classes.
        split: One of its splits.
        sink: Where progress goes.
        **resources: ``actors, threads``, as in ``score``.

    Returns:
        Segmentation: ``iou, miou, dice, accuracy, nll, brier, ece``; detection: ``map, map50, map75,
        per_class``; both: ``members`` (a list of the same for each), ``images`` (those with a label and a
        prediction), ``statuses, uncertainty_mean, split, bundle_id, data`` (URI, name and fingerprint).

    Raises:
        InputError: No such split, no labels, or a bundle of another task or of other classes.
    """
    made = score(bundle, data, split=split, measure=True, sink=sink, **resources)
    info = open_dataset(data)
    return {
        **made["metrics"],
        "statuses": made["statuses"],
        "uncertainty_mean": made["uncertainty_mean"],
        "split": split,
        "bundle_id": made["bundle_id"],
        "data": {"uri": info.uri, "name": info.name, "fingerprint": info.fingerprint},
    }
