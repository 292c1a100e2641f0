"""Counts on storage: what was written before is read, and written again byte by byte."""

import io
import zipfile
from pathlib import Path

import pytest

from pipeline.metrics.detection import DetectionMetric
from pipeline.metrics.segmentation import SegmentationMetric
from pipeline.scoring.ensemble_metrics import EnsembleMetrics
from pipeline.uncertainty.calibration.box_sample import BoxSample
from pipeline.uncertainty.calibration.pixel_sample import PixelSample

STORED = Path(__file__).parents[1] / "data" / "ensemble_metrics"
"""Written before counters had fields: of two U-Nets, calibrated; and of three unlike detectors."""


def stored_segmentation() -> EnsembleMetrics:
    data = (STORED / "segmentation_metrics.npz").read_bytes()
    return EnsembleMetrics.from_bytes(data, SegmentationMetric(2, 1), PixelSample(2))


def stored_detection_samples() -> EnsembleMetrics:
    data = (STORED / "detection_sample.npz").read_bytes()
    return EnsembleMetrics.from_bytes(data, DetectionMetric(1), BoxSample())


def entries(data: bytes) -> list[tuple[str, bytes]]:
    """(name, bytes) in order, before compression: zlib's many versions compress differently."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def test_stored_metrics_are_read_into_fields():
    metrics = stored_segmentation()
    assert len(metrics.members) == 2
    assert (metrics.sample, metrics.member_samples) == (None, [])
    figures = metrics.compute()
    assert [figures["images"], *(member["images"] for member in figures["members"])] == [2, 2, 2]
    assert figures["uncalibrated"]["nll"] != figures["nll"]


def test_stored_samples_are_read_into_fields():
    metrics = stored_detection_samples()
    assert (metrics.pool, metrics.members, metrics.uncalibrated) == (None, [], None)
    assert metrics.sample.images == 1
    assert [sample.images for sample in metrics.member_samples] == [1, 1, 1]


@pytest.mark.parametrize(
    ("file", "read"),
    [("segmentation_metrics.npz", stored_segmentation), ("detection_sample.npz", stored_detection_samples)],
)
def test_what_was_stored_is_written_byte_by_byte(file: str, read):
    assert entries(read().to_bytes()) == entries((STORED / file).read_bytes())


def test_merging_adds_to_every_counter():
    metrics = stored_segmentation()
    metrics.merge(stored_segmentation())
    figures = metrics.compute()
    assert [figures["images"], *(member["images"] for member in figures["members"])] == [4, 4, 4]
    samples = stored_detection_samples()
    samples.merge(stored_detection_samples())
    assert [samples.sample.images, *(sample.images for sample in samples.member_samples)] == [2, 2, 2, 2]
