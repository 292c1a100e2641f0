"""Teach a bundle what its doubt is worth: calibration, and the review threshold with its promise.

Both come from the ``calibration`` split alone, which nothing else looks at. Probabilities are pooled first
and calibrated then (Rahaman & Thiery 2021, 2007.08792).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.datasets.dataset import DatasetInfo, open_dataset, row_groups
from pipeline.errors import InputError
from pipeline.models import bundle as bundles
from pipeline.models.bundle import Bundle
from pipeline.runtime.progress import ProgressSink
from pipeline.scoring.job import score
from pipeline.scoring.predictor import Purpose
from pipeline.tasks import TASKS
from pipeline.tasks.build import task_for_bundle
from pipeline.uncertainty import calibration
from pipeline.uncertainty.calibration.settings import CalibrateSettings

SPLIT = "calibration"


def possible(task: str, info: DatasetInfo) -> bool:
    """Whether a bundle for ``task`` can be calibrated on this dataset."""
    return TASKS[task].calibrates and info.counts.get(SPLIT, {}).get("images", 0) > 0


def calibrate(
    bundle: Bundle, data: str, settings: CalibrateSettings, sink: ProgressSink | None = None, **resources: Any
) -> Bundle:
    """The same weights with a calibration, and with ``settings.risk`` a review threshold; not committed.

    A detector also gets its ``score_threshold``, from which a box counts as said: that of the best F1 at IoU 0.5 on
    the ``val`` split, where the dataset has one, so that the promise's losses are not chosen on its own images.

    Args:
        bundle: Staged or opened; what it said of calibration and threshold before is forgotten.
        data: URI of a dataset with a ``calibration`` split.
        settings: Which kind, and what is promised.
        sink: Where progress goes.
        **resources: ``actors, threads``, as in ``score``.

    Raises:
        InputError: The dataset has no such split, or the kind is not for this task.
    """
    info = open_dataset(data)
    row_groups(info, SPLIT)
    kind = _resolve_kind(bundle.task, settings.kind)
    run = _CalibrationData(data, info, sink, resources)
    calibrated = bundles.with_changes(bundle, calibration=None, threshold=None)
    if kind == "isotonic":
        calibrated = _calibrate_boxes(calibrated, run)
    elif kind != "none":
        calibrated = _calibrate_pixels(calibrated, run, kind)
    if bundle.task == "detection" and info.counts.get("val", {}).get("images", 0):
        best = run.score(calibrated, "val", "metrics")["meters"].pool.compute()["best_f1"]
        calibrated = bundles.with_changes(calibrated, score_threshold=best and best["score"])
    if settings.risk is not None:
        calibrated = bundles.with_changes(
            calibrated, threshold=_review_threshold(calibrated, run, settings.risk, settings.delta)
        )
    return calibrated


@dataclass(frozen=True)
class _CalibrationData:
    """The dataset, and how it is scored."""

    data: str
    info: DatasetInfo
    sink: ProgressSink | None
    resources: dict[str, Any]

    @property
    def source(self) -> dict[str, str]:
        """What the manifest says that something was fitted on."""
        return {"data": self.info.name, "fingerprint": self.info.fingerprint, "split": SPLIT}

    def score(self, bundle: Bundle, split: str, measure: Purpose) -> dict[str, Any]:
        """Every image of a split, once."""
        return score(bundle, self.data, split=split, measure=measure, sink=self.sink, **self.resources)


def _resolve_kind(task: str, kind: str) -> str:
    """What ``auto`` is; InputError for a kind that is another task's."""
    fitting = {"segmentation": ["temperature", "vector", "none"], "detection": ["isotonic", "none"]}[task]
    if kind == "auto":
        return fitting[0]
    if kind not in fitting:
        raise InputError(f"calibrate.kind: '{kind}' is not for {task}; choose auto, {' or '.join(fitting)}")
    return kind


def _calibrate_pixels(bundle: Bundle, run: _CalibrationData, kind: Any) -> Bundle:
    sample = run.score(bundle, SPLIT, "sample")["meters"].sample
    if not sample.pixels:
        raise InputError(f"split '{SPLIT}' of '{run.info.uri}' has no labelled pixel; label some of its images")
    fitted = calibration.fit_temperature(sample.rows(), kind).to_dict()
    source = {"fitted_on": run.source, "n": sample.images, "pixels": sample.pixels}
    return bundles.with_changes(bundle, calibration={**fitted, **source})


def _calibrate_boxes(bundle: Bundle, run: _CalibrationData) -> Bundle:
    """Score to precision; unlike members first each to precision times IoU, so that their scores can be compared."""
    parameters: dict[str, Any] = {}
    metrics = run.score(bundle, SPLIT, "sample")["meters"]
    if metrics.member_samples:
        member_rows = [member_sample.rows() for member_sample in metrics.member_samples]
        parameters["members"] = [calibration.fit_isotonic(boxes.score, boxes.overlap) for boxes in member_rows]
        bundle = bundles.with_changes(bundle, calibration={"kind": "isotonic", "parameters": parameters})
        metrics = run.score(bundle, SPLIT, "sample")["meters"]
    sample = metrics.sample
    if not sample.images:
        raise InputError(f"split '{SPLIT}' of '{run.info.uri}' has no labelled image; label some of its images")
    rows = sample.rows()
    parameters["pool"] = calibration.fit_isotonic(rows.score, rows.hit)
    is_hit = rows.hit > 0
    parameters["spread"] = calibration.fit_spread(rows.std[is_hit], rows.error[is_hit], rows.size[is_hit])
    source = {"fitted_on": run.source, "n": sample.images, "boxes": sample.boxes}
    return bundles.with_changes(bundle, calibration={"kind": "isotonic", "parameters": parameters, **source})


def _review_threshold(bundle: Bundle, run: _CalibrationData, risk: float, delta: float) -> dict[str, Any]:
    """The review threshold over the images of the split that are labelled and could be read."""
    rows = run.score(bundle, SPLIT, "metrics")["meters"].pool.images_table()
    is_labelled = np.isfinite(rows["loss"])
    threshold = calibration.fit_review_threshold(rows["score"][is_labelled], rows["loss"][is_labelled], risk, delta)
    return {**threshold.to_dict(), "fitted_on": run.source, "score": task_for_bundle(bundle).uncertainty_measure}


def describe_calibration(bundle: Bundle) -> str:
    """What was found, for a person."""
    fitted, threshold = bundle.manifest["calibration"], bundle.manifest["threshold"]
    parts = ["not calibrated"]
    if fitted is not None:
        parts = [f"calibrated on {fitted['n']} images ({fitted['kind']}: {_values(fitted)})"]
    if bundle.manifest["score_threshold"] is not None:
        parts.append(f"boxes count from a score of {_short(bundle.manifest['score_threshold'])}")
    if threshold is not None:
        parts.append(threshold["note"])
    return "; ".join(parts)


def _values(fitted: dict[str, Any]) -> str:
    """The parameters, or of long ones what they are of."""
    if fitted["kind"] == "isotonic":
        return f"score to precision of {fitted['boxes']} boxes"
    return ", ".join(f"{name} {_short(value)}" for name, value in fitted["parameters"].items())


def _short(value: Any) -> str:
    return f"[{', '.join(_short(number) for number in value)}]" if isinstance(value, list) else f"{value:.4g}"
