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
    made = score(opened, data, split=split, measure="metrics", scalars=True, sink=sink, **resources)
    info, shift = open_dataset(data), None
    if shift_data is not None:
        other = score(opened, shift_data, split=shift_split, scalars=True, sink=sink, **resources)
        shift = shift_detection(made["scalars"], other["scalars"], shift_data)
    metrics = {
        **made["metrics"],
        **_of_images(made["meters"], made["scalars"], opened),
        "shift_auroc": None if shift is None else shift["auroc"]["uncertainty"],
        "shift": shift,
        "statuses": made["statuses"],
        "decisions": _decisions(made["scalars"]),
        "uncertainty_mean": made["uncertainty_mean"],
        "split": split,
        "bundle_id": made["bundle_id"],
        "data": {"uri": info.uri, "name": info.name, "fingerprint": info.fingerprint},
    }
    return metrics, made["scalars"]


def _of_images(meters: EnsembleMetrics, scalars: pa.Table, bundle: Bundle) -> dict[str, Any]:
    added = segmentation_gain if bundle.task == "segmentation" else detection_gain
    # Losses of unlike models cannot be compared.
    validated = bundle.manifest["metrics"] if bundle.same_model else None
    return {"gain": added(meters, validated), "spearman_by_measure": rank_uncertainty_measures(meters, scalars)}


def segmentation_gain(meters: EnsembleMetrics, validated: Any) -> dict[str, Any] | None:
    """What the pool adds, on the same images: ``{difference, low, high}`` of IoU, NLL and Brier score.

    ``over_mean_member``: minus the members' mean. ``over_chosen_member``: minus the member that had the
    lowest validation loss, which somebody without an ensemble would use. None for a single member.
    """
    members = [metric.images_table() for metric in meters.members]
    if len(members) < 2 or not len(members[0]["ids"]):
        return None
    pool, background = meters.pool.images_table(), meters.pool.background
    chosen = _chosen(validated, len(members))
    out: dict[str, Any] = {"over_mean_member": {}, "over_chosen_member": {}, "chosen_member": chosen}
    for figure in GAINS:
        out["over_mean_member"][figure] = bootstrap.paired_mean(pool, members, figure, background=background)
        if chosen is not None:
            out["over_chosen_member"][figure] = bootstrap.paired(pool, members[chosen], figure, background=background)
    return out


def detection_gain(meters: EnsembleMetrics, validated: Any) -> dict[str, Any] | None:
    """The same in mAP, mAP@.5 and LaECE of the pool, calibrated where the bundle is."""
    if len(meters.members) < 2 or not len(meters.pool.images_table()["ids"]):
        return None
    chosen = _chosen(validated, len(meters.members))
    return {**detection_bootstrap.paired(meters.pool, meters.members, chosen), "chosen_member": chosen}


def _chosen(validated: Any, members: int) -> int | None:
    """The member with the lowest validation loss, where every one has one and they can be compared."""
    known = [each.get("val_loss") for each in validated] if isinstance(validated, list) else []
    return int(np.argmin(known)) if len(known) == members and None not in known else None


def rank_uncertainty_measures(meters: EnsembleMetrics, scalars: pa.Table) -> dict[str, float | None]:
    """Spearman's correlation of each number of an image with its IoU, to choose ``predict.uncertainty`` by.

    The more negative the better; of ``member_dice``, which is no doubt but its opposite, one minus it is taken.
    """
    rows = meters.pool.images_table()
    at = {name: row for row, name in enumerate(scalars["image_id"].to_pylist())}
    order = pa.array([at[name] for name in rows["ids"].tolist()], pa.int64())
    known = np.isfinite(rows["loss"])
    out: dict[str, float | None] = {}
    for name, values in _measures(scalars.take(order)).items():
        value = spearman(values[known], 1 - rows["loss"][known])
        out[name] = value if np.isfinite(value) else None
    return out


def _measures(scalars: pa.Table) -> dict[str, np.ndarray]:
    """The floating columns as doubt, float64, NaN where null."""
    names = [field.name for field in scalars.schema if pa.types.is_floating(field.type)]
    columns = {name: np.asarray(scalars[name].to_numpy(zero_copy_only=False), np.float64) for name in names}
    return {name: 1 - values if name == "member_dice" else values for name, values in columns.items()}


def shift_detection(here: pa.Table, there: pa.Table, where: str) -> dict[str, Any]:
    """How well each number of an image tells ``there`` from ``here``: AUROC, and FPR at a TPR of 95 %.

    ``member_dice`` is taken as doubt: one minus it.
    """
    if not there["uncertainty"].drop_null():
        raise InputError(f"shift data '{where}': no image of it could be predicted; look at the folder")
    out: dict[str, Any] = {"images": len(there["uncertainty"].drop_null()), "auroc": {}, "fpr95": {}}
    others = _measures(there)
    for name, values in _measures(here).items():
        low, high = (each[np.isfinite(each)] for each in (values, others[name]))
        if len(low) and len(high):
            out["auroc"][name] = auroc(low, high)
            out["fpr95"][name] = fpr_at_tpr(low, high)
    return out


def _decisions(scalars: pa.Table) -> dict[str, int] | None:
    """Images accepted and sent to review; None where the bundle has no threshold."""
    words = scalars["decision"].drop_null().to_pylist()
    return {word: words.count(word) for word in ("accept", "review")} if words else None
