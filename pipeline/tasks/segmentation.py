"""Semantic segmentation: a class for each pixel, pooled over members, with the doubt of pixels and images."""

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline import schema
from pipeline.config import Settings
from pipeline.errors import InputError, nearest
from pipeline.images.batch import Batch
from pipeline.losses import LOSSES, categorical
from pipeline.metrics import SegmentationMetric
from pipeline.tasks.base import Task, Term
from pipeline.tasks.packed_masks import own_size, pack, unpack, valid_area
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


@dataclass
class Prediction:
    """One member: ``probabilities`` (N, C, h, w) float32 in the network's frame."""

    probabilities: Tensor


class Mean:
    """Mean of one member's predictions."""

    def __init__(self) -> None:
        self._mean = measures.RunningMean()

    def add(self, prediction: Prediction) -> None:
        """Take in one."""
        self._mean.add(prediction.probabilities)

    def result(self) -> Prediction:
        """The mean."""
        return Prediction(self._mean.mean)


@dataclass
class Fused:
    """The pool of M members, in the network's frame."""

    probabilities: Tensor
    """(N, C, h, w) mean over members, calibrated where the bundle is."""
    uncalibrated: Tensor
    """(N, C, h, w) mean over members as it is; the same tensor where there is no calibration."""
    expected_entropy: Tensor
    """(N, h, w) mean of the members' entropies."""
    maps: list[Tensor]
    """M maps (N, h, w) uint8, each member's own most probable class: all that is kept of one."""
    measures: dict[str, Tensor] = field(default_factory=dict)
    """Measures of the images, (N,) float64 each, once somebody asked for them."""

    @cached_property
    def total(self) -> Tensor:
        """(N, h, w) entropy of the pool."""
        one = len(self.maps) == 1 and self.uncalibrated is self.probabilities
        return self.expected_entropy if one else measures.entropy(self.probabilities, 1)

    @cached_property
    def mutual(self) -> Tensor:
        """(N, h, w) what members disagree about, before calibration."""
        total = self.total if self.uncalibrated is self.probabilities else measures.entropy(self.uncalibrated, 1)
        return measures.mutual_information(total, self.expected_entropy)

    @cached_property
    def said(self) -> tuple[Tensor, Tensor]:
        """The pool's largest probability (N, h, w) and its class, uint8."""
        return measures.most_probable(self.probabilities)


class Segmentation(Task):
    """Logits (N, C, H, W) and masks."""

    name = "segmentation"
    label_column = "mask"
    calibrates = True
    settings: SegmentationPredict

    def _parse_predict(self, values: dict[str, Any]) -> Settings:
        return SegmentationPredict.parse(values, "predict")

    def _set_loss(self, values: dict[str, Any]) -> None:
        self._losses = {name: _loss_term(name, value) for name, value in (values or {"cross_entropy": 1.0}).items()}
        nothing = torch.full((1, 1, 1), schema.VOID, dtype=torch.uint8)
        for name, (_, settings) in self._losses.items():
            # Wrong settings are refused now, not at the first step.
            LOSSES[name](torch.zeros(1, self.num_outputs, 1, 1), nothing, **settings)

    @property
    def inference(self) -> InferenceSettings:
        """As set under ``predict``."""
        return self.settings

    @property
    def uncertainty_measure(self) -> str:
        """One of the measures."""
        return self.settings.uncertainty

    @property
    def num_outputs(self) -> int:
        """All classes, the background among them."""
        return len(self.classes)

    @property
    def loss_terms(self) -> list[str]:
        """Names of the losses in the mix."""
        return sorted(self._losses)

    def _labels(self, column: pa.ChunkedArray, ids: list[str], sizes: list[tuple[int, int]]) -> dict[str, Any]:
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
        return {name: LOSSES[name].count(batch.masks) for name in self._losses}

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Term]:
        """Each loss of the mix over (N, C, H, W) logits."""
        assert batch.masks is not None, "a batch without masks has no loss"
        return {
            name: (weight, *LOSSES[name](outputs, batch.masks, **settings))
            for name, (weight, settings) in self._losses.items()
        }

    def predict(
        self, outputs: Tensor, batch: Batch, look: View | None = None, seen: tuple[int, int] | None = None
    ) -> Prediction:
        """Softmax of (N, C, h, w) logits, in float32; a binary head's (N, 1, h, w) against 0."""
        del seen
        logits = outputs.float()
        if look is not None and look != View():
            logits = look.invert(logits, (batch.images.shape[-2], batch.images.shape[-1]))
        return Prediction((categorical(logits) if self.num_outputs > 1 else logits).softmax(1))

    def new_view_mean(self) -> Mean:
        """Mean of probabilities."""
        return Mean()

    def without_calibration(self, fused: Fused) -> Prediction:
        """The pool's mean over members."""
        return Prediction(fused.uncalibrated)

    def fuse(self, members: Iterable[Prediction]) -> Fused:
        """Pool probabilities, not logits (Lakshminarayanan et al. 2017), then calibrate (Rahaman & Thiery 2021)."""
        pool, expected = measures.RunningMean(), measures.RunningMean()
        maps: list[Tensor] = []
        for member in members:
            pool.add(member.probabilities)
            expected.add(measures.entropy(member.probabilities, 1))
            maps.append(measures.most_probable(member.probabilities)[1])
            del member
        return Fused(calibration.apply_temperature(self.calibration, pool.mean), pool.mean, expected.mean, maps)

    def metric(self, calibrated: bool = True) -> SegmentationMetric:
        """Empty."""
        del calibrated
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
        """Empty."""
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
        for n, packed in enumerate(self._truth(truth).to_pylist()):
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
        total, mutual, labels, settings = fused.total, fused.mutual, fused.said[1], self.settings
        valid = valid_area(batch, total)
        found = {
            "entropy_mean": measures.masked_mean(total, valid),
            "entropy_p95": measures.masked_quantile(total, valid, 0.95),
            "expected_entropy_mean": measures.masked_mean(fused.expected_entropy, valid),
            "mutual_information_mean": measures.masked_mean(mutual, valid),
            "mutual_information_p95": measures.masked_quantile(mutual, valid, 0.95),
            "entropy_patch_max": measures.max_patch_mean(total, valid, settings.patch),
            "entropy_inner_mean": measures.interior_mean(total, labels, valid, settings.boundary),
            "member_dice": measures.pairwise_dice(fused.maps, valid, self.num_outputs, self.background),
        }
        fused.measures = {name: value.double() for name, value in found.items()}
        return fused.measures

    def to_columns(self, fused: Fused, batch: Batch) -> dict[str, list[Any]]:
        """Masks and maps at each image's own size; all measures over its area in the network's frame."""
        image_measures = self._measures(fused, batch)
        columns: dict[str, list[Any]] = dict(
            zip(image_measures, torch.stack(list(image_measures.values())).tolist(), strict=True)
        )
        columns |= {"uncertainty": self._uncertainty(fused, batch), "classes": self._classes(fused, batch)}
        return columns | self._pictures(fused.probabilities, fused.total, batch)

    def _classes(self, fused: Fused, batch: Batch) -> list[list[dict[str, Any]]]:
        """What each predicted class covers of each image, and the means over it."""
        (confidence, labels), valid = fused.said, valid_area(batch, fused.total)
        area, *sums = measures.class_table(labels, valid, self.num_outputs, confidence, fused.total, fused.mutual)
        share = area / area.sum(1, keepdim=True).clamp(min=1)  # one copy for everything: (5, N, C)
        table = torch.stack([area, share, *(each / area.clamp(min=1) for each in sums)]).cpu().numpy()
        names = ("area_fraction", "probability", "entropy", "mutual_information")
        return [
            [
                {"label": int(label)} | dict(zip(names, table[1:, n, label].tolist(), strict=True))
                for label in np.flatnonzero(table[0, n])
            ]
            for n in range(table.shape[1])
        ]

    def _pictures(self, probabilities: Tensor, total: Tensor, batch: Batch) -> dict[str, list[Any]]:
        """Packed masks and maps, one image at a time: at its own size it may be far larger than the frame."""
        names = ("mask", "confidence_map", "uncertainty_map", "map_height", "map_width")
        out: dict[str, list[Any]] = {name: [None] * len(batch) for name in names}
        matrices, sizes, scale = batch.matrices.cpu(), batch.sizes.cpu(), self.settings.map_scale
        relative = (total / math.log(max(2, self.num_outputs)))[:, None]
        for n, (height, width) in enumerate(sizes.tolist()):
            (confidence,), (labels,) = measures.most_probable(own_size(probabilities, matrices, sizes, n)[None])
            out["mask"][n] = pack(labels)
            if not self.settings.maps:
                continue
            doubt, small = own_size(relative, matrices, sizes, n)[0], (-(-height // scale), -(-width // scale))
            maps = F.adaptive_avg_pool2d(torch.stack([confidence, doubt])[None], small)[0]
            # Both lie in 0..1 but for rounding.
            maps = (maps.clamp(0, 1) * 255).round()
            out["confidence_map"][n], out["uncertainty_map"][n] = pack(maps[0]), pack(maps[1])
            out["map_height"][n], out["map_width"][n] = small
        return out


def _loss_term(name: str, value: Any) -> tuple[float, dict[str, Any]]:
    """(weight, settings) from ``1.0`` or ``{"weight": 1.0, "gamma": 2}``."""
    if name not in LOSSES:
        raise InputError(f"loss: unknown name '{name}'.{nearest(name, LOSSES)}")
    settings = dict(value) if isinstance(value, dict) else {"weight": value}
    weight = settings.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise InputError(f"loss.{name}: wanted a positive weight, found {weight!r}; write {name}: 1.0")
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    known = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    for key in settings:
        if key not in known:
            raise InputError(f"loss.{name}: unknown key '{key}'.{nearest(key, ['weight', *known])}")
    values = {key: tuple(item) if isinstance(item, list) else item for key, item in settings.items()}
    return float(weight), values
