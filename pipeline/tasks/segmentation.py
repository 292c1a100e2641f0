"""Semantic segmentation: a class for each pixel, pooled over members, with the doubt of pixels and images."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline import schema
from pipeline.errors import InputError
from pipeline.images.batch import Batch
from pipeline.images.decode import Size
from pipeline.losses import Term, categorical
from pipeline.metrics import SegmentationMetric
from pipeline.tasks.base import Task
from pipeline.tasks.packed_masks import own_size, pack, unpack, valid_area
from pipeline.tasks.pooled_maps import Fused, Prediction, PredictionMean
from pipeline.tasks.segmentation_loss import SegmentationLoss
from pipeline.uncertainty import calibration, measures
from pipeline.uncertainty.calibration import PixelSample
from pipeline.uncertainty.tta import InferenceSettings, View

Score = Literal[
    "entropy_mean", "entropy_p95", "expected_entropy_mean", "mutual_information_mean", "mutual_information_p95",
    "entropy_patch_max", "entropy_inner_mean", "member_dice",
]  # fmt: skip


class SegmentationPredict(InferenceSettings):
    """How members are asked, what is written, and how images' doubt is summed up, in pixels of the frame."""

    uncertainty: Score = "entropy_mean"
    """Which measure is an image's ``uncertainty``, that the review threshold acts on; of ``member_dice``, one
    minus it."""
    maps: bool = True
    """Whether confidence and uncertainty maps are written."""
    map_scale: int = Field(default=4, ge=1)
    """Pixels of the image in one of the maps, each way."""
    patch: int = Field(default=16, ge=1, le=256)
    """Side of the window whose largest mean entropy is reported."""
    boundary: int = Field(default=2, ge=0)
    """``entropy_inner_mean`` leaves out what is this near to another class."""


class Segmentation(Task):
    """Logits (N, C, H, W) and masks."""

    name = "segmentation"
    label_column = "mask"
    calibrates = True
    settings: SegmentationPredict
    _loss: SegmentationLoss

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Class weights that do not fit the number of classes are refused now, not at the first step.
        self._loss.check(self.num_outputs)

    @classmethod
    def parse_loss(cls, values: dict[str, Any], where: str) -> SegmentationLoss:
        """A weighted sum of terms; {} = cross entropy."""
        return SegmentationLoss.parse(values, where)

    @classmethod
    def parse_predict(cls, values: dict[str, Any], where: str) -> SegmentationPredict:
        """See ``SegmentationPredict``."""
        return SegmentationPredict.parse(values, where)

    @property
    def inference(self) -> InferenceSettings:
        """The views, windows and dropout passes set under ``predict``."""
        return self.settings

    @property
    def uncertainty_measure(self) -> str:
        """A measure of ``Score``, as set under ``predict``."""
        return self.settings.uncertainty

    @property
    def loss_terms(self) -> list[str]:
        """Names of the losses in the weighted sum."""
        return sorted(self._loss.terms)

    def read_labels(self, column: pa.ChunkedArray, ids: list[str], sizes: list[Size]) -> dict[str, Any]:
        """``masks``: N arrays (H, W) uint8, or None."""
        masks = []
        for image_id, packed, size in zip(ids, column.to_pylist(), sizes, strict=True):
            mask = None if packed is None else unpack(packed, size, image_id)
            if mask is not None and ((mask >= self.num_outputs) & (mask != schema.VOID)).any():
                value = int(mask[mask != schema.VOID].max())
                raise InputError(
                    f"mask of image '{image_id}' has the value {value}, but there are {self.num_outputs} "
                    f"classes, from 0 on ({schema.VOID} = void); use a dataset of the same classes"
                )
            masks.append(mask)
        return {"masks": masks}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Labelled pixels or images, by term."""
        assert batch.masks is not None, "a batch without masks has no loss"
        return self._loss.counts(batch.masks)

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Term]:
        """Each term of the weighted sum over (N, C, H, W) logits."""
        assert batch.masks is not None, "a batch without masks has no loss"
        return self._loss(outputs, batch.masks)

    def predict(
        self, outputs: Tensor, batch: Batch, view: View | None = None, view_size: tuple[int, int] | None = None
    ) -> Prediction:
        """Softmax of (N, C, h, w) logits, in float32; a binary head's (N, 1, h, w) against 0."""
        logits = outputs.float()
        if view is not None and view != View():
            logits = view.invert(logits, (batch.images.shape[-2], batch.images.shape[-1]))
        return Prediction((categorical(logits) if self.num_outputs > 1 else logits).softmax(1))

    def new_view_mean(self) -> PredictionMean:
        """An empty mean of probabilities."""
        return PredictionMean()

    def without_calibration(self, fused: Fused) -> Prediction:
        """The pool's mean over members, before calibration."""
        return Prediction(fused.uncalibrated)

    def fuse(self, members: Iterable[Prediction]) -> Fused:
        """Pool probabilities, not logits (Lakshminarayanan et al. 2017), then calibrate (Rahaman & Thiery 2021)."""
        pool = measures.RunningMean()
        expected_entropy = measures.RunningMean()
        maps: list[Tensor] = []
        for member in members:
            pool.add(member.probabilities)
            expected_entropy.add(measures.entropy(member.probabilities, 1))
            maps.append(measures.most_probable(member.probabilities)[1])
            # Freed before the next member is computed: two of them at once would double the peak of memory.
            del member
        calibrated = calibration.apply_temperature(self.calibration, pool.mean)
        return Fused(calibrated, pool.mean, expected_entropy.mean, maps)

    def metric(self, calibrated: bool = True) -> SegmentationMetric:
        """An empty metric: the same before and after calibration."""
        return SegmentationMetric(self.num_outputs, self.background)

    def update_metric(
        self, predicted: Prediction | Fused, batch: Batch, truth: pa.Table | None, metric: SegmentationMetric
    ) -> None:
        """Probabilities, interpolated to each image's own size, against its mask."""
        if isinstance(predicted, Fused):
            scores = self._uncertainty(predicted, batch)
        else:
            total = measures.entropy(predicted.probabilities, 1)
            scores = measures.masked_mean(total, valid_area(batch, total)).tolist()
        for n, probabilities, mask in self._labelled(predicted.probabilities, batch, truth):
            metric.update(probabilities, mask, batch.image_ids[n], scores[n])

    def new_calibration_sample(self) -> PixelSample:
        """An empty sample of pixels."""
        return PixelSample(self.num_outputs)

    def update_sample(self, fused: Fused, batch: Batch, truth: pa.Table | None, sample: PixelSample) -> None:
        """Pixels of the uncalibrated pool, at each image's own size, with their labels."""
        for n, probabilities, mask in self._labelled(fused.uncalibrated, batch, truth):
            sample.update(probabilities, mask, batch.image_ids[n])

    def _labelled(
        self, probabilities: Tensor, batch: Batch, truth: pa.Table | None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(row, probabilities (C, H, W), mask (H, W)) of images that have one, at their own sizes."""
        matrices, sizes = batch.matrices.cpu(), batch.sizes.cpu()
        for n, packed in enumerate(self._require_labels(truth).to_pylist()):
            if packed is not None:
                size = (int(sizes[n, 0]), int(sizes[n, 1]))
                mask = torch.from_numpy(unpack(packed, size, batch.image_ids[n]))
                yield n, own_size(probabilities, matrices, sizes, n), mask

    def _uncertainty(self, fused: Fused, batch: Batch) -> list[float]:
        """The score of each image, as it is written: float32."""
        name = self.settings.uncertainty
        values = self._measures(fused, batch)[name]
        return (1 - values if name == "member_dice" else values).float().tolist()

    def _measures(self, fused: Fused, batch: Batch) -> dict[str, Tensor]:
        """All measures of the images over their area in the frame, (N,) float64 each; computed once.

        Mutual information compares members and pool as they are: calibration is of the pool alone, so only
        without one is it the difference of ``entropy_mean`` and ``expected_entropy_mean``.
        """
        if fused.measures:
            return fused.measures
        total = fused.total
        mutual = fused.mutual
        labels = fused.most_probable[1]
        settings = self.settings
        # Padding around the image has probabilities too, but says nothing about the image.
        valid = valid_area(batch, total)
        values = {
            "entropy_mean": measures.masked_mean(total, valid),
            "entropy_p95": measures.masked_quantile(total, valid, 0.95),
            "expected_entropy_mean": measures.masked_mean(fused.expected_entropy, valid),
            "mutual_information_mean": measures.masked_mean(mutual, valid),
            "mutual_information_p95": measures.masked_quantile(mutual, valid, 0.95),
            "entropy_patch_max": measures.max_patch_mean(total, valid, settings.patch),
            "entropy_inner_mean": measures.interior_mean(total, labels, valid, settings.boundary),
            "member_dice": measures.pairwise_dice(fused.maps, valid, self.num_outputs, self.background),
        }
        fused.measures = {name: value.double() for name, value in values.items()}
        return fused.measures

    def to_columns(self, fused: Fused, batch: Batch) -> dict[str, list[Any]]:
        """Masks and maps at each image's own size; all measures over its area in the network's frame."""
        image_measures = self._measures(fused, batch)
        columns: dict[str, list[Any]] = dict(
            zip(image_measures, torch.stack(list(image_measures.values())).tolist(), strict=True)
        )
        columns |= {"uncertainty": self._uncertainty(fused, batch), "classes": self._classes(fused, batch)}
        return columns | self._packed_maps(fused.probabilities, fused.total, batch)

    def _classes(self, fused: Fused, batch: Batch) -> list[list[dict[str, Any]]]:
        """What each predicted class covers of each image, and the means over it."""
        confidence, labels = fused.most_probable
        valid = valid_area(batch, fused.total)
        # Pixels of each class in each image, and the sums of confidence, entropy, mutual information over them: (N, C).
        area, *sums = measures.class_table(labels, valid, self.num_outputs, confidence, fused.total, fused.mutual)
        share = area / area.sum(1, keepdim=True).clamp(min=1)
        # One copy to the host for everything: (5, N, C).
        table = torch.stack([area, share, *(total / area.clamp(min=1) for total in sums)]).cpu().numpy()
        names = ("area_fraction", "probability", "entropy", "mutual_information")
        return [
            [
                {"label": int(label)} | dict(zip(names, table[1:, n, label].tolist(), strict=True))
                for label in np.flatnonzero(table[0, n])
            ]
            for n in range(table.shape[1])
        ]

    def _packed_maps(self, probabilities: Tensor, total: Tensor, batch: Batch) -> dict[str, list[Any]]:
        """Packed masks and maps, one image at a time: at its own size it may be far larger than the frame."""
        names = ("mask", "confidence_map", "uncertainty_map", "map_height", "map_width")
        columns: dict[str, list[Any]] = {name: [None] * len(batch) for name in names}
        # Sizes are read as numbers below: from the host, so that no image waits for the device.
        matrices, sizes = batch.matrices.cpu(), batch.sizes.cpu()
        scale = self.settings.map_scale
        # Entropy relative to its maximum, that of C equally probable classes: in 0..1.
        relative_entropy = (total / math.log(max(2, self.num_outputs)))[:, None]
        for n, (height, width) in enumerate(sizes.tolist()):
            # The class of a pixel is that of the interpolated probabilities: interpolated classes mean nothing.
            (confidence,), (labels,) = measures.most_probable(own_size(probabilities, matrices, sizes, n)[None])
            columns["mask"][n] = pack(labels)
            if not self.settings.maps:
                continue
            entropy = own_size(relative_entropy, matrices, sizes, n)[0]
            map_size = (-(-height // scale), -(-width // scale))
            maps = F.adaptive_avg_pool2d(torch.stack([confidence, entropy])[None], map_size)[0]
            # Both lie in 0..1 but for rounding.
            maps = (maps.clamp(0, 1) * 255).round()
            columns["confidence_map"][n] = pack(maps[0])
            columns["uncertainty_map"][n] = pack(maps[1])
            columns["map_height"][n], columns["map_width"][n] = map_size
        return columns
