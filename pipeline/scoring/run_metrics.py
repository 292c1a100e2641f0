"""What finished units add to the metrics of a run."""

from collections.abc import Iterator

from pipeline.predictions.unit_file import UnitFile
from pipeline.runtime import prometheus


def count_finished_units(items: Iterator[UnitFile], source: prometheus.MetricTags) -> Iterator[UnitFile]:
    """Finished units as they are, counted for those who watch: each once, however often it was begun."""
    doubt, ok = 0.0, 0
    with prometheus.running(source) as told:
        for item in items:
            for status, count in item.statuses.items():
                told.count("dubito_images_total", count, status)
            for decision, count in item.decisions.items():
                told.count("dubito_decisions_total", count, decision)
            doubt, ok = doubt + item.uncertainty_sum, ok + item.statuses.get("ok", 0)
            if ok:
                told.set("dubito_uncertainty_mean", doubt / ok)
            yield item
