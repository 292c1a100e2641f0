"""What finished units add to the metrics of a run."""

from collections.abc import Iterator

from pipeline.predictions.unit_file import UnitFile
from pipeline.runtime import prometheus


def count_finished_units(unit_files: Iterator[UnitFile], metric_tags: prometheus.MetricTags) -> Iterator[UnitFile]:
    """Finished units as they are, counted for those who watch: each once, however often it was begun."""
    doubt, ok = 0.0, 0
    with prometheus.running(metric_tags) as recorder:
        for unit_file in unit_files:
            for status, count in unit_file.statuses.items():
                recorder.count("dubito_images_total", count, status)
            for decision, count in unit_file.decisions.items():
                recorder.count("dubito_decisions_total", count, decision)
            doubt, ok = doubt + unit_file.uncertainty_sum, ok + unit_file.statuses.get("ok", 0)
            if ok:
                recorder.set("dubito_uncertainty_mean", doubt / ok)
            yield unit_file
