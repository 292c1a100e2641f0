"""Is the challenger to be champion? A decision over counts on the same images, with every number and reason.

It is to be champion if, on the frozen test, (1) the one-sided lower limit of what it gains in the main figure, by
paired bootstrap over images, is above ``-tolerance``, against the champion and against the best champion ever, so
that small losses cannot add up; (2) its main figure is better on the frozen test or on the newest data; (3) its
likelihood, calibration, ranking of doubt and worst class are no worse than the champion's beyond tolerances of
their own. Drifted doubt is a reason to look, and the newest data is where it must get better (2).

=============  ==============================================  =============================================
figure         segmentation                                    detection
=============  ==============================================  =============================================
main           mean IoU over classes, without the background   mAP (COCO)
nll            mean -ln p of the true class, pixels            mean -ln p of right or wrong, p by the score
ece            expected calibration error, pixels              LaECE
aurc           area under risk-coverage, images (1 - IoU)      the same (1 - F1 at IoU 0.5)
recall         of the worst class, pixels                      of the worst class, boxes said, IoU 0.5
=============  ==============================================  =============================================

The likelihood of box edges is no such figure: where one member gives no spread, it is some 20 nats and differs by more
than one between detectors that are equally good.
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
"""Figure -> 1 where more is better, -1 where less is."""


class JudgeSettings(Settings):
    """How much worse a challenger may be, in units of the figures."""

    tolerance: float = Field(default=0.01, ge=0)
    """Of the main figure: the lower limit of the gain is above minus this."""
    nll: float = Field(default=0.02, ge=0)
    ece: float = Field(default=0.02, ge=0)
    aurc: float = Field(default=0.02, ge=0)
    recall: float = Field(default=0.05, ge=0)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the one-sided limit."""
    resamples: int = Field(default=2000, ge=1000)
    seed: int = 0


@dataclass(frozen=True)
class FrozenTestMetrics:
    """Counts on the same images; None: there is no such champion."""

    challenger: Metric
    champion: Metric | None
    best: Metric | None = None
    """The best champion ever, if that is another one."""


@dataclass(frozen=True)
class NewestMetrics:
    """Counts on a split that has the newest images, and which of its images those are."""

    challenger: Metric
    champion: Metric
    ids: frozenset[str]


def decide_promotion(
    settings: JudgeSettings, frozen: FrozenTestMetrics, newest: NewestMetrics | None, drifted: bool = False
) -> dict[str, Any]:
    """The decision, as JSON.

    Returns:
        ``promote``; ``reasons``: sentences; ``conditions``: a list of ``{name, wanted, found, holds}``;
        ``figures``: of each side on the frozen test; ``gain``: ``{difference, lower}`` of the main figure
        ``over_champion`` and ``over_best``; ``newest``: ``{images, challenger, champion}``, null without newest
        images; ``drifted``.
    """
    own = figures(frozen.challenger)
    sides = {"challenger": own, "champion": _figures(frozen.champion), "best": _figures(frozen.best)}
    record: dict[str, Any] = {"figures": sides, "gain": {}, "newest": None, "drifted": drifted, "conditions": []}
    if own["main"] is None:
        return {**record, "promote": False, "reasons": ["refused: the frozen test has no labels to judge by"]}
    if frozen.champion is None or sides["champion"] is None:
        reasons = ["there is no champion to compare with: the first challenger is promoted"]
        return {**record, "promote": True, "reasons": reasons}
    conditions: list[dict[str, Any]] = []
    for name, other in (("champion", frozen.champion), ("best", frozen.best)):
        if other is not None:
            gained = paired_gain(settings, frozen.challenger, other)
            record["gain"][f"over_{name}"] = gained
            conditions.append(_limit(settings, name, gained))
    record["newest"] = None if newest is None or not newest.ids else _newest(newest)
    conditions.append(_improves(record))
    conditions += [_guard(name, getattr(settings, name), own, sides["champion"]) for name in GUARD_METRICS]
    failed = [each for each in conditions if not each["holds"]]
    reasons = [f"refused: {each['name']}: {each['found']}; wanted {each['wanted']}" for each in failed]
    reasons = reasons or [f"promoted: {each['name']}: {each['found']}" for each in conditions]
    return {**record, "promote": not failed, "reasons": reasons, "conditions": conditions}


def _figures(metric: Metric | None) -> dict[str, float | None] | None:
    return None if metric is None else figures(metric)


def figures(metric: Metric) -> dict[str, float | None]:
    """``main`` and the ``GUARDS`` of a metric; None where not defined."""
    found = metric.compute()
    if isinstance(metric, SegmentationMetric):
        confusion, left_out = np.asarray(found["confusion"], np.float64), metric.background
        names = {"nll": "nll", "ece": "ece", "aurc": "aurc_image"}
    else:
        confusion, left_out = np.asarray(found["confusion"], np.float64), metric.num_classes  # the last row: nothing
        names = {"nll": "nll_score", "ece": "laece", "aurc": "aurc_image"}
    return {
        "main": main_figure(metric),
        **{key: found.get(name) for key, name in names.items()},
        "recall": _worst(confusion, left_out),
    }


def main_figure(metric: Metric) -> float | None:
    """The figure that counts most, of all images; None where it is not defined."""
    return _finite(_main(metric)(np.ones((1, len(metric.images_table()["ids"]))))[0])


def _worst(confusion: np.ndarray, left_out: int | None) -> float | None:
    """Lowest share of a class's truth that was found; classes without truth do not count."""
    total = confusion.sum(1)
    known = total > 0
    if left_out is not None and left_out < len(known):
        known[left_out] = False
    return float((np.diagonal(confusion)[known] / total[known]).min()) if known.any() else None


def _main(metric: Metric) -> Callable[[np.ndarray], np.ndarray]:
    """(D, N) weights of images, in the order of ids -> (D,) the main figure."""
    if isinstance(metric, SegmentationMetric):
        return iou_of(metric.images_table(), metric.background)
    return detection_bootstrap.map_of(metric)


def paired_gain(settings: JudgeSettings, challenger: Metric, other: Metric) -> dict[str, float | None]:
    """``difference`` of the main figures, and its one-sided ``lower`` limit; None where not defined.

    Raises:
        InputError: The metrics are not of the same images.
    """
    ids = [metric.images_table()["ids"] for metric in (challenger, other)]
    values = differences(ids, [_main(challenger), _main(other)], settings.resamples, settings.seed)
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(drawn):
        return {"difference": None, "lower": None}
    return {"difference": float(values[0]), "lower": float(np.quantile(drawn, 1 - settings.confidence))}


def _limit(settings: JudgeSettings, name: str, gained: dict[str, float | None]) -> dict[str, Any]:
    against = "the champion" if name == "champion" else "the best champion ever"
    lower, difference = gained["lower"], gained["difference"]
    return {
        "name": f"main figure against {against}",
        "wanted": f"a lower limit ({settings.confidence:.0%}, one-sided) of the gain above {-settings.tolerance:g}",
        "found": "not defined" if lower is None else f"gain {difference:+.4f}, lower limit {lower:+.4f}",
        "holds": lower is not None and lower > -settings.tolerance,
    }


def _newest(newest: NewestMetrics) -> dict[str, Any]:
    """The main figures over the newest images that are labelled."""
    out: dict[str, Any] = {}
    for name, metric in (("challenger", newest.challenger), ("champion", newest.champion)):
        ids = metric.images_table()["ids"]
        chosen = np.isin(ids, list(newest.ids)).astype(np.float64)[None]
        out["images"] = int(chosen.sum())
        out[name] = _finite(_main(metric)(chosen)[0]) if out["images"] else None
    return out


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _improves(record: dict[str, Any]) -> dict[str, Any]:
    difference = record["gain"]["over_champion"]["difference"]
    newest = record["newest"] or {"images": 0, "challenger": None, "champion": None}
    both = newest["challenger"], newest["champion"]
    on_newest = None if None in both else both[0] - both[1]
    parts = [
        "frozen test: not defined" if difference is None else f"frozen test {difference:+.4f}",
        f"newest data ({newest['images']} images): " + ("not defined" if on_newest is None else f"{on_newest:+.4f}"),
    ]
    return {
        "name": "improvement" + (" (doubt drifted)" if record["drifted"] else ""),
        "wanted": "a better main figure on the frozen test or on the newest data",
        "found": ", ".join(parts),
        "holds": any(value is not None and value > 0 for value in (difference, on_newest)),
    }


_SAID = {"nll": "NLL", "ece": "calibration error", "aurc": "risk-coverage", "recall": "recall of the worst class"}


def _guard(name: str, tolerance: float, own: dict[str, float | None], other: dict[str, float | None]) -> dict[str, Any]:
    """One figure of (3); where the champion has none there is nothing to compare with."""
    mine, its = own[name], other[name]
    if its is None or mine is None:
        holds, found = its is None, f"challenger {_text(mine)}, champion {_text(its)}"
    else:
        worse = (its - mine) * GUARD_METRICS[name]
        holds = worse <= tolerance
        found = f"challenger {mine:.4f}, champion {its:.4f}, {abs(worse):.4f} {'worse' if worse > 0 else 'better'}"
    return {
        "name": _SAID[name],
        "wanted": f"at most {tolerance:g} worse than the champion",
        "found": found,
        "holds": holds,
    }


def _text(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"
