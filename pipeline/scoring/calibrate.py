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
    kind = _kind(bundle.task, settings.kind)
    run = _Run(data, info, sink, resources)
    made = bundles.with_changes(bundle, calibration=None, threshold=None)
    if kind == "isotonic":
        made = _boxes(made, run)
    elif kind != "none":
        made = _pixels(made, run, kind)
    if bundle.task == "detection" and info.counts.get("val", {}).get("images", 0):
        best = run.score(made, "val", "metrics")["meters"].pool.compute()["best_f1"]
        made = bundles.with_changes(made, score_threshold=best and best["score"])
    if settings.risk is not None:
        made = bundles.with_changes(made, threshold=_threshold(made, run, settings.risk, settings.delta))
    return made


@dataclass(frozen=True)
class _Run:
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


def _kind(task: str, kind: str) -> str:
    """What ``auto`` is; InputError for a kind that is another task's."""
    fitting = {"segmentation": ["temperature", "vector", "none"], "detection": ["isotonic", "none"]}[task]
    if kind == "auto":
        return fitting[0]
    if kind not in fitting:
        raise InputError(f"calibrate.kind: '{kind}' is not for {task}; choose auto, {' or '.join(fitting)}")
    return kind


def _pixels(made: Bundle, run: _Run, kind: Any) -> Bundle:
    counted = run.score(made, SPLIT, "sample")["meters"].sample
    if not counted.pixels:
        raise InputError(f"split '{SPLIT}' of '{run.info.uri}' has no labelled pixel; label some of its images")
    fitted = calibration.fit_temperature(counted.rows(), kind).to_dict()
    known = {"fitted_on": run.source, "n": counted.images, "pixels": counted.pixels}
    return bundles.with_changes(made, calibration={**fitted, **known})


def _boxes(made: Bundle, run: _Run) -> Bundle:
    """Score to precision; unlike members first each to precision times IoU, so that their scores can be compared."""
    parameters: dict[str, Any] = {}
    meters = run.score(made, SPLIT, "sample")["meters"]
    if meters.member_samples:
        own = [each.rows() for each in meters.member_samples]
        parameters["members"] = [calibration.fit_isotonic(each.score, each.overlap) for each in own]
        made = bundles.with_changes(made, calibration={"kind": "isotonic", "parameters": parameters})
        meters = run.score(made, SPLIT, "sample")["meters"]
    counted = meters.sample
    if not counted.images:
        raise InputError(f"split '{SPLIT}' of '{run.info.uri}' has no labelled image; label some of its images")
    rows = counted.rows()
    parameters["pool"] = calibration.fit_isotonic(rows.score, rows.hit)
    right = rows.hit > 0
    parameters["spread"] = calibration.fit_spread(rows.std[right], rows.error[right], rows.size[right])
    known = {"fitted_on": run.source, "n": counted.images, "boxes": counted.boxes}
    return bundles.with_changes(made, calibration={"kind": "isotonic", "parameters": parameters, **known})


def _threshold(bundle: Bundle, run: _Run, risk: float, delta: float) -> dict[str, Any]:
    """The review threshold over the images of the split that are labelled and could be read."""
    rows = run.score(bundle, SPLIT, "metrics")["meters"].pool.images_table()
    use = np.isfinite(rows["loss"])
    threshold = calibration.fit_review_threshold(rows["score"][use], rows["loss"][use], risk, delta)
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
    return f"[{', '.join(_short(each) for each in value)}]" if isinstance(value, list) else f"{value:.4g}"
