"""Whether the challenger becomes champion: a decision over counts on the same images, with every number and reason.

It becomes champion under three conditions:

1. On the frozen test, the one-sided lower limit of its gain in the main figure, by paired bootstrap over images, is
   above ``-tolerance``: against the champion, and against the best champion ever, so that small losses cannot add up.
2. Its main figure is better on the frozen test or on the newest data.
3. Its likelihood, calibration, ranking of uncertainty and worst class are worse than the champion's by no more than a
   tolerance each.

Drifted uncertainty is only a reason to train; whether it helped shows on the newest data (2).

=============  ==============================================  =============================================
figure         segmentation                                    detection
=============  ==============================================  =============================================
main           mean IoU over classes, without the background   mAP (COCO)
nll            mean -ln p of the true class, pixels            mean -ln p of right or wrong, p by the score
ece            expected calibration error, pixels              LaECE
aurc           area under risk-coverage, images (1 - IoU)      the same (1 - F1 at IoU 0.5)
recall         of the worst class, pixels                      of the worst class, boxes said, IoU 0.5
=============  ==============================================  =============================================

The likelihood of box edges is no guard metric: where one member gives no spread, it is some 20 nats, and it differs by
more than one nat between detectors that are equally good.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.config import Settings
from pipeline.metrics import detection_bootstrap
from pipeline.metrics.bootstrap import differences, iou_of
from pipeline.metrics.detection import DetectionMetric
from pipeline.metrics.segmentation import SegmentationMetric

Metric = SegmentationMetric | DetectionMetric
GUARD_METRICS = {"nll": -1, "ece": -1, "aurc": -1, "recall": 1}
"""Figures of condition 3 -> 1 where more is better, -1 where less is."""
_GUARD_TITLES = {
    "nll": "NLL",
    "ece": "calibration error",
    "aurc": "risk-coverage",
    "recall": "recall of the worst class",
}
Figures = dict[str, float | None]
"""``main`` and the ``GUARD_METRICS`` of a bundle on the frozen test; None where not defined."""


class JudgeSettings(Settings):
    """How much worse a challenger may be, in units of the figures."""

    tolerance: float = Field(default=0.01, ge=0)
    """The lower limit of the gain in the main figure must be above minus this."""
    nll: float = Field(default=0.02, ge=0)
    """Nats that the likelihood may be worse by."""
    ece: float = Field(default=0.02, ge=0)
    """What the calibration error may be worse by."""
    aurc: float = Field(default=0.02, ge=0)
    """What the area under risk-coverage may be worse by."""
    recall: float = Field(default=0.05, ge=0)
    """What the worst class's recall may be worse by."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence of the one-sided lower limit."""
    resamples: int = Field(default=2000, ge=1000)
    """Bootstrap samples of the images."""
    seed: int = 0
    """Of the bootstrap."""


@dataclass(frozen=True)
class FrozenTestMetrics:
    """Counts of each side on the frozen test; None: there is no such champion."""

    challenger: Metric
    champion: Metric | None
    best: Metric | None = None
    """Of the best champion ever, if that is not the present one."""


@dataclass(frozen=True)
class NewestMetrics:
    """Counts of both sides on a split that has the newest images."""

    challenger: Metric
    champion: Metric
    ids: frozenset[str]
    """The newest images: those that the champion's dataset did not have."""


def decide_promotion(
    settings: JudgeSettings, frozen: FrozenTestMetrics, newest: NewestMetrics | None, drifted: bool = False
) -> dict[str, Any]:
    """Decide whether the challenger becomes champion.

    Args:
        settings: Tolerances.
        frozen: Counts on the frozen test.
        newest: Counts on the newest data; None where there are none.
        drifted: Whether the uncertainty drifted; recorded, and named with condition 2.

    Returns:
        As JSON:
        ``promote``; ``reasons``: sentences; ``conditions``: a list of ``{name, wanted, found, holds}``;
        ``figures``: of each side on the frozen test; ``gain``: ``{difference, lower}`` of the main figure
        ``over_champion`` and ``over_best``; ``newest``: ``{images, challenger, champion}``, null without newest
        images; ``drifted``.
    """
    challenger = figures(frozen.challenger)
    champion = None if frozen.champion is None else figures(frozen.champion)
    best = None if frozen.best is None else figures(frozen.best)
    sides = {"challenger": challenger, "champion": champion, "best": best}
    record: dict[str, Any] = {"figures": sides, "gain": {}, "newest": None, "drifted": drifted, "conditions": []}

    # Without labels nothing can be compared; without a champion there is nothing to compare with.
    if challenger["main"] is None:
        return {**record, "promote": False, "reasons": ["refused: the frozen test has no labels to judge by"]}
    if frozen.champion is None or champion is None:
        reasons = ["there is no champion to compare with: the first challenger is promoted"]
        return {**record, "promote": True, "reasons": reasons}

    # Condition 1: no real loss against the champion, nor against the best champion ever.
    conditions: list[dict[str, Any]] = []
    for name, rival in (("champion", frozen.champion), ("best", frozen.best)):
        if rival is not None:
            gain = paired_gain(settings, frozen.challenger, rival)
            record["gain"][f"over_{name}"] = gain
            conditions.append(_lower_limit_condition(settings, name, gain))
    # Condition 2: better somewhere, or there would be no reason to change anything.
    record["newest"] = None if newest is None or not newest.ids else _newest_figures(newest)
    conditions.append(_improvement_condition(record))
    # Condition 3: a higher main figure may not be paid for by what the uncertainty is worth.
    conditions += [_guard_condition(name, getattr(settings, name), challenger, champion) for name in GUARD_METRICS]

    failed = [condition for condition in conditions if not condition["holds"]]
    if failed:
        reasons = [f"refused: {failure['name']}: {failure['found']}; wanted {failure['wanted']}" for failure in failed]
    else:
        reasons = [f"promoted: {condition['name']}: {condition['found']}" for condition in conditions]
    return {**record, "promote": not failed, "reasons": reasons, "conditions": conditions}


def figures(metric: Metric) -> Figures:
    """``main`` and the ``GUARD_METRICS`` of a metric; None where not defined."""
    values = metric.compute()
    if isinstance(metric, SegmentationMetric):
        excluded_class = metric.background
        names = {"nll": "nll", "ece": "ece", "aurc": "aurc_image"}
    else:
        excluded_class = metric.num_classes  # the confusion matrix's last row: boxes that match no object
        names = {"nll": "nll_score", "ece": "laece", "aurc": "aurc_image"}
    return {
        "main": main_figure(metric),
        **{key: values.get(name) for key, name in names.items()},
        "recall": _worst_recall(np.asarray(values["confusion"], np.float64), excluded_class),
    }


def main_figure(metric: Metric) -> float | None:
    """Mean IoU or mAP over all images; None where it is not defined."""
    return _finite(_main_by_weights(metric)(np.ones((1, len(metric.images_table()["ids"]))))[0])


def _worst_recall(confusion: np.ndarray, excluded_class: int | None) -> float | None:
    """Recall of the class with the lowest one, from (C, C) counts by true and predicted class; None without labels."""
    labelled = confusion.sum(1)
    counted = labelled > 0
    if excluded_class is not None and excluded_class < len(counted):
        counted[excluded_class] = False
    return float((np.diagonal(confusion)[counted] / labelled[counted]).min()) if counted.any() else None


def _main_by_weights(metric: Metric) -> Callable[[np.ndarray], np.ndarray]:
    """A function of (D, N) weights of the images, in the order of ids, that returns (D,) main figures."""
    if isinstance(metric, SegmentationMetric):
        return iou_of(metric.images_table(), metric.background)
    return detection_bootstrap.map_of(metric)


def paired_gain(settings: JudgeSettings, challenger: Metric, rival: Metric) -> dict[str, float | None]:
    """``difference`` of the main figures, challenger minus rival, and its one-sided ``lower`` limit.

    Both are None where not defined.

    Raises:
        InputError: The metrics are not of the same images.
    """
    ids = [metric.images_table()["ids"] for metric in (challenger, rival)]
    main_figures = [_main_by_weights(challenger), _main_by_weights(rival)]
    values = differences(ids, main_figures, settings.resamples, settings.seed)
    # The first value is of the images as they are, the others of their resamples.
    resampled = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(resampled):
        return {"difference": None, "lower": None}
    return {"difference": float(values[0]), "lower": float(np.quantile(resampled, 1 - settings.confidence))}


def _lower_limit_condition(settings: JudgeSettings, rival: str, gain: dict[str, float | None]) -> dict[str, Any]:
    """Condition 1 against the ``champion`` or the ``best`` champion ever."""
    lower, difference = gain["lower"], gain["difference"]
    return {
        "name": "main figure against " + ("the champion" if rival == "champion" else "the best champion ever"),
        "wanted": f"a lower limit ({settings.confidence:.0%}, one-sided) of the gain above {-settings.tolerance:g}",
        "found": "not defined" if lower is None else f"gain {difference:+.4f}, lower limit {lower:+.4f}",
        "holds": lower is not None and lower > -settings.tolerance,
    }


def _newest_figures(newest: NewestMetrics) -> dict[str, Any]:
    """``images``: how many of the newest are labelled; main figures of ``challenger`` and ``champion`` over them."""
    record: dict[str, Any] = {}
    for name, metric in (("challenger", newest.challenger), ("champion", newest.champion)):
        ids = metric.images_table()["ids"]
        weights = np.isin(ids, list(newest.ids)).astype(np.float64)[None]
        record["images"] = int(weights.sum())
        record[name] = _finite(_main_by_weights(metric)(weights)[0]) if record["images"] else None
    return record


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _improvement_condition(record: dict[str, Any]) -> dict[str, Any]:
    """Condition 2, from ``gain`` and ``newest`` of the record."""
    difference = record["gain"]["over_champion"]["difference"]
    newest = record["newest"] or {"images": 0, "challenger": None, "champion": None}
    challenger, champion = newest["challenger"], newest["champion"]
    on_newest = None if challenger is None or champion is None else challenger - champion
    on_frozen_text = "frozen test: not defined" if difference is None else f"frozen test {difference:+.4f}"
    on_newest_text = "not defined" if on_newest is None else f"{on_newest:+.4f}"
    return {
        "name": "improvement" + (" (doubt drifted)" if record["drifted"] else ""),
        "wanted": "a better main figure on the frozen test or on the newest data",
        "found": f"{on_frozen_text}, newest data ({newest['images']} images): {on_newest_text}",
        "holds": any(value is not None and value > 0 for value in (difference, on_newest)),
    }


def _guard_condition(name: str, tolerance: float, challenger: Figures, champion: Figures) -> dict[str, Any]:
    """Condition 3 for one figure; where the champion has none it holds: there is nothing to compare with."""
    new, old = challenger[name], champion[name]
    if old is None or new is None:
        holds = old is None
        comparison = f"challenger {_text(new)}, champion {_text(old)}"
    else:
        loss = (old - new) * GUARD_METRICS[name]
        holds = loss <= tolerance
        comparison = f"challenger {new:.4f}, champion {old:.4f}, {abs(loss):.4f} {'worse' if loss > 0 else 'better'}"
    return {
        "name": _GUARD_TITLES[name],
        "wanted": f"at most {tolerance:g} worse than the champion",
        "found": comparison,
        "holds": holds,
    }


def _text(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"
