"""Scored rows -> merged metrics: of the pool and of every member, and how doubt tells a shifted dataset apart."""

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.bundle import open_bundle
from pipeline.datasets import open_dataset
from pipeline.errors import InputError
from pipeline.meters import Meters
from pipeline.metrics import bootstrap
from pipeline.metrics.ranking import auroc, fpr_at_tpr
from pipeline.score import score
from pipeline.telemetry import Sink

GAINS = ("iou", "nll", "brier")
"""Figures that the pool is compared in with its members."""


def evaluate(
    bundle: str,
    data: str,
    split: str,
    *,
    shift_data: str | None = None,
    shift_split: str | None = None,
    sink: Sink | None = None,
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
        - Segmentation: what ``SegmentationMetric.compute`` gives, and ``gain``: pool minus members, with
          95 % intervals over images drawn again; detection: ``map, map50, map75, per_class``.
        - Both: ``members`` (a list of the same for each), ``statuses, uncertainty_mean, split, bundle_id,
          data``, and with ``shift_data`` ``shift_auroc`` and ``shift``.
        - The rows' numbers, without maps.

    Raises:
        InputError: No such split, no labels, or a bundle of another task or of other classes.
    """
    made = score(bundle, data, split=split, measure="metrics", scalars=True, sink=sink, **resources)
    info, opened = open_dataset(data), open_bundle(bundle)
    shift = None
    if shift_data is not None:
        other = score(bundle, shift_data, split=shift_split, scalars=True, sink=sink, **resources)
        shift = shifted(made["scalars"], other["scalars"], shift_data)
    metrics = {
        **made["metrics"],
        **({"gain": gain(made["meters"], opened.manifest["metrics"])} if opened.task == "segmentation" else {}),
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


def gain(meters: Meters, validated: Any) -> dict[str, Any] | None:
    """What the pool adds, on the same images: ``{difference, low, high}`` of IoU, NLL and Brier score.

    ``over_mean_member``: minus the members' mean. ``over_chosen_member``: minus the member that had the
    lowest validation loss, which somebody without an ensemble would use. None for a single member.
    """
    members = [metric.images_table() for metric in meters.members]
    if len(members) < 2 or not len(members[0]["ids"]):
        return None
    pool, background = meters.pool.images_table(), meters.pool.background
    known = [each.get("val_loss") for each in validated] if isinstance(validated, list) else []
    chosen = int(np.argmin(known)) if len(known) == len(members) and None not in known else None
    out: dict[str, Any] = {"over_mean_member": {}, "over_chosen_member": {}, "chosen_member": chosen}
    for figure in GAINS:
        out["over_mean_member"][figure] = bootstrap.paired_mean(pool, members, figure, background=background)
        if chosen is not None:
            out["over_chosen_member"][figure] = bootstrap.paired(pool, members[chosen], figure, background=background)
    return out


def shifted(here: pa.Table, there: pa.Table, where: str) -> dict[str, Any]:
    """How well each number of an image tells ``there`` from ``here``: AUROC, and FPR at a TPR of 95 %.

    ``member_dice`` is taken as doubt: one minus it.
    """
    if not there["uncertainty"].drop_null():
        raise InputError(f"shift data '{where}': no image of it could be predicted; look at the folder")
    out: dict[str, Any] = {"images": len(there["uncertainty"].drop_null()), "auroc": {}, "fpr95": {}}
    for field in here.schema:
        if not pa.types.is_floating(field.type):
            continue
        sign = -1.0 if field.name == "member_dice" else 1.0
        low, high = (sign * np.asarray(table[field.name].drop_null(), np.float64) for table in (here, there))
        if len(low) and len(high):
            out["auroc"][field.name] = auroc(low, high)
            out["fpr95"][field.name] = fpr_at_tpr(low, high)
    return out


def _decisions(scalars: pa.Table) -> dict[str, int] | None:
    """Images accepted and sent to review; None where the bundle has no threshold."""
    words = scalars["decision"].drop_null().to_pylist()
    return {word: words.count(word) for word in ("accept", "review")} if words else None
