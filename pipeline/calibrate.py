"""Teach a bundle what its doubt is worth: calibration, and the review threshold with its promise.

Both come from the ``calibration`` split alone, which nothing else looks at. Probabilities are pooled first
and calibrated then (Rahaman & Thiery 2021, 2007.08792).
"""

from typing import Any

from pipeline import bundle as bundles
from pipeline import calibration
from pipeline.bundle import Bundle
from pipeline.datasets import DatasetInfo, open_dataset, row_groups
from pipeline.errors import InputError
from pipeline.predict import task_of
from pipeline.recipe import CalibrateSettings
from pipeline.score import score
from pipeline.tasks import TASKS
from pipeline.telemetry import Sink

SPLIT = "calibration"


def possible(task: str, info: DatasetInfo) -> bool:
    """Whether a bundle for ``task`` can be calibrated on this dataset."""
    return TASKS[task].calibrates and info.counts.get(SPLIT, {}).get("images", 0) > 0


def calibrate(
    bundle: Bundle, data: str, settings: CalibrateSettings, sink: Sink | None = None, **resources: Any
) -> Bundle:
    """The same weights with a calibration, and with ``settings.risk`` a review threshold; not committed.

    Args:
        bundle: Staged or opened; what it said of calibration and threshold before is forgotten.
        data: URI of a dataset with a ``calibration`` split.
        settings: Which kind, and what is promised.
        sink: Where progress goes.
        **resources: ``actors, threads``, as in ``score``.

    Raises:
        InputError: The task cannot be calibrated, or the dataset has no such split.
    """
    info = open_dataset(data)
    if not TASKS[bundle.task].calibrates:
        raise InputError(f"bundle '{bundle.uri}' is for {bundle.task}: only segmentation can be calibrated so far")
    row_groups(info, SPLIT)
    source = {"data": info.name, "fingerprint": info.fingerprint, "split": SPLIT}
    made = bundles.derive(bundle, calibration=None, threshold=None)
    if settings.kind != "none":
        counted = score(made, data, split=SPLIT, measure="sample", sink=sink, **resources)["meters"].sample
        if not counted.pixels:
            raise InputError(f"split '{SPLIT}' of '{info.uri}' has no labelled pixel; label some of its images")
        fitted = calibration.fit(counted.rows(), settings.kind)
        made = bundles.derive(
            made, calibration={**fitted.to_dict(), "fitted_on": source, "n": counted.images, "pixels": counted.pixels}
        )
    if settings.risk is not None:
        made = bundles.derive(
            made, threshold={**_threshold(made, data, settings, sink, resources), "fitted_on": source}
        )
    return made


def _threshold(
    bundle: Bundle, data: str, settings: CalibrateSettings, sink: Sink | None, resources: dict[str, Any]
) -> dict[str, Any]:
    """The review threshold over the images of the split that have a labelled pixel and could be read."""
    found = score(bundle, data, split=SPLIT, measure="metrics", sink=sink, **resources)
    rows = found["meters"].pool.images_table()
    use = rows["pixels"] > 0
    assert settings.risk is not None
    threshold = calibration.review_threshold(rows["score"][use], rows["loss"][use], settings.risk, settings.delta)
    return {**threshold.to_dict(), "score": task_of(bundle).score}


def sentence(bundle: Bundle) -> str:
    """What was found, for a person."""
    fitted, threshold = bundle.manifest["calibration"], bundle.manifest["threshold"]
    parts = ["not calibrated"]
    if fitted is not None:
        values = ", ".join(f"{name} {_short(value)}" for name, value in fitted["parameters"].items())
        parts = [f"calibrated on {fitted['n']} images ({fitted['kind']}: {values})"]
    if threshold is not None:
        parts.append(threshold["note"])
    return "; ".join(parts)


def _short(value: Any) -> str:
    return f"[{', '.join(_short(each) for each in value)}]" if isinstance(value, list) else f"{value:.4g}"
