"""Scored rows -> merged metrics: of the pool and of every member, and how doubt tells a shifted dataset apart."""

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.datasets.dataset import open_dataset
from pipeline.errors import InputError
from pipeline.metrics import bootstrap, detection_bootstrap
from pipeline.metrics.ranking import auroc, fpr_at_tpr, spearman
from pipeline.models.bundle import Bundle, open_bundle
from pipeline.runtime.progress import ProgressSink
from pipeline.scoring.ensemble_metrics import EnsembleMetrics
from pipeline.scoring.job import score
from pipeline.scoring.plan import plan_scoring

GAINS = ("iou", "nll", "brier")
"""Figures that the pool is compared in with its members."""


def evaluate(
    bundle: str,
    data: str,
    split: str,
    *,
    shift_data: str | None = None,
    shift_split: str | None = None,
    sink: ProgressSink | None = None,
    **resources: Any,
) -> tuple[dict[str, Any], pa.Table]:
    """Metrics of ``bundle`` on ``split``; nothing is written.

    Every image is read and decoded once; the units' counts add up, so the result depends neither on the
    number of actors nor on the order in which they finish.

    Args:
        bundle: URI of a bundle.
        data: URI of a dataset with labels for the bundle's task, of the same classes.
        split: One of its splits.
        shift_data: URI of a dataset or of a folder of images that are unlike those; labels are not needed.
        shift_split: Split of ``shift_data``; None for all.
        sink: Where progress goes.
        **resources: ``actors, threads``, as in ``score``.

    Returns:
        - What ``SegmentationMetric.compute`` or ``DetectionMetric.compute`` gives; ``gain``: pool minus members, with
          95 % intervals over images drawn again; ``spearman_by_measure``.
        - ``members`` (a list of the metrics for each), ``statuses, uncertainty_mean, split, bundle_id,
          data``, and with ``shift_data`` ``shift_auroc`` and ``shift``.
        - The rows' numbers, without maps.

    Raises:
        InputError: No such split, no labels, or a bundle of another task or of other classes.
    """
    opened = open_bundle(bundle)
    if shift_data is not None:
        plan_scoring(opened, shift_data, shift_split, measure=False)  # refused now, not after the first pass
    scored = score(opened, data, split=split, measure="metrics", scalars=True, sink=sink, **resources)
    info, shift = open_dataset(data), None
    if shift_data is not None:
        shifted = score(opened, shift_data, split=shift_split, scalars=True, sink=sink, **resources)
        shift = shift_detection(scored["scalars"], shifted["scalars"], shift_data)
    metrics = {
        **scored["metrics"],
        **_image_comparisons(scored["meters"], scored["scalars"], opened),
        "shift_auroc": None if shift is None else shift["auroc"]["uncertainty"],
        "shift": shift,
        "statuses": scored["statuses"],
        "decisions": _decisions(scored["scalars"]),
        "uncertainty_mean": scored["uncertainty_mean"],
        "split": split,
        "bundle_id": scored["bundle_id"],
        "data": {"uri": info.uri, "name": info.name, "fingerprint": info.fingerprint},
    }
    return metrics, scored["scalars"]


def _image_comparisons(metrics: EnsembleMetrics, scalars: pa.Table, bundle: Bundle) -> dict[str, Any]:
    gain_function = segmentation_gain if bundle.task == "segmentation" else detection_gain
    # Losses of unlike models cannot be compared.
    validated = bundle.manifest["metrics"] if bundle.same_model else None
    return {
        "gain": gain_function(metrics, validated),
        "spearman_by_measure": rank_uncertainty_measures(metrics, scalars),
    }


def segmentation_gain(metrics: EnsembleMetrics, validated: Any) -> dict[str, Any] | None:
    """What the pool adds, on the same images: ``{difference, low, high}`` of IoU, NLL and Brier score.

    ``over_mean_member``: minus the members' mean. ``over_chosen_member``: minus the member that had the
    lowest validation loss, which somebody without an ensemble would use. None for a single member.
    """
    members = [metric.images_table() for metric in metrics.members]
    if len(members) < 2 or not len(members[0]["ids"]):
        return None
    pool, background = metrics.pool.images_table(), metrics.pool.background
    chosen = _best_validated_member(validated, len(members))
    gain: dict[str, Any] = {"over_mean_member": {}, "over_chosen_member": {}, "chosen_member": chosen}
    for figure in GAINS:
        gain["over_mean_member"][figure] = bootstrap.paired_mean(pool, members, figure, background=background)
        if chosen is not None:
            gain["over_chosen_member"][figure] = bootstrap.paired(pool, members[chosen], figure, background=background)
    return gain


def detection_gain(metrics: EnsembleMetrics, validated: Any) -> dict[str, Any] | None:
    """What the pool adds, as ``segmentation_gain``, in mAP, mAP@.5 and LaECE; calibrated where the bundle is."""
    if len(metrics.members) < 2 or not len(metrics.pool.images_table()["ids"]):
        return None
    chosen = _best_validated_member(validated, len(metrics.members))
    return {**detection_bootstrap.paired(metrics.pool, metrics.members, chosen), "chosen_member": chosen}


def _best_validated_member(validated: Any, members: int) -> int | None:
    """The member with the lowest validation loss, where every one has one and they can be compared."""
    losses = [member.get("val_loss") for member in validated] if isinstance(validated, list) else []
    return int(np.argmin(losses)) if len(losses) == members and None not in losses else None


def rank_uncertainty_measures(metrics: EnsembleMetrics, scalars: pa.Table) -> dict[str, float | None]:
    """Spearman's correlation of each number of an image with its IoU, to choose ``predict.uncertainty`` by.

    The more negative the better; of ``member_dice``, which is no doubt but its opposite, one minus it is taken.
    """
    rows = metrics.pool.images_table()
    row_of = {name: row for row, name in enumerate(scalars["image_id"].to_pylist())}
    order = pa.array([row_of[name] for name in rows["ids"].tolist()], pa.int64())
    is_labelled = np.isfinite(rows["loss"])
    correlations: dict[str, float | None] = {}
    for name, values in _measures(scalars.take(order)).items():
        value = spearman(values[is_labelled], 1 - rows["loss"][is_labelled])
        correlations[name] = value if np.isfinite(value) else None
    return correlations


def _measures(scalars: pa.Table) -> dict[str, np.ndarray]:
    """The floating columns as doubt, float64, NaN where null."""
    names = [field.name for field in scalars.schema if pa.types.is_floating(field.type)]
    columns = {name: np.asarray(scalars[name].to_numpy(zero_copy_only=False), np.float64) for name in names}
    return {name: 1 - values if name == "member_dice" else values for name, values in columns.items()}


def shift_detection(scalars: pa.Table, shifted_scalars: pa.Table, shift_data: str) -> dict[str, Any]:
    """How well each number of an image tells ``there`` from ``here``: AUROC, and FPR at a TPR of 95 %.

    ``member_dice`` is taken as doubt: one minus it.
    """
    if not shifted_scalars["uncertainty"].drop_null():
        raise InputError(f"shift data '{shift_data}': no image of it could be predicted; look at the folder")
    detection: dict[str, Any] = {"images": len(shifted_scalars["uncertainty"].drop_null()), "auroc": {}, "fpr95": {}}
    shifted_measures = _measures(shifted_scalars)
    for name, values in _measures(scalars).items():
        low, high = (column[np.isfinite(column)] for column in (values, shifted_measures[name]))
        if len(low) and len(high):
            detection["auroc"][name] = auroc(low, high)
            detection["fpr95"][name] = fpr_at_tpr(low, high)
    return detection


def _decisions(scalars: pa.Table) -> dict[str, int] | None:
    """Images accepted and sent to review; None where the bundle has no threshold."""
    words = scalars["decision"].drop_null().to_pylist()
    return {word: words.count(word) for word in ("accept", "review")} if words else None
