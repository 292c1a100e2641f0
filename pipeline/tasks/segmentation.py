"""Semantic segmentation: a class for each pixel, pooled over members, with the doubt of pixels and images."""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline import schema, uncertainty
from pipeline.augment import Batch, unframe_maps
from pipeline.config import Settings
from pipeline.errors import InputError, nearest
from pipeline.losses import LOSSES
from pipeline.metrics import SegmentationMetric
from pipeline.tasks.base import Task, Term, image_area


class SegmentationPredict(Settings):
    """What is written, and how images' doubt is summed up. Pixels are those of the network's frame."""

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


@dataclass
class Fused:
    """The pool of M members, in the network's frame."""

    probabilities: Tensor
    """(N, C, h, w) mean over members."""
    expected_entropy: Tensor
    """(N, h, w) mean of the members' entropies."""
    maps: list[Tensor]
    """M maps (N, h, w) uint8, each member's own most probable class: all that is kept of one."""


class Segmentation(Task):
    """Logits (N, C, H, W) and masks."""

    name = "segmentation"
    label_column = "mask"
    settings: SegmentationPredict

    def _parse_predict(self, values: dict[str, Any]) -> Settings:
        return SegmentationPredict.parse(values, "predict")

    def _set_loss(self, values: dict[str, Any]) -> None:
        self._losses = {name: _loss_term(name, value) for name, value in (values or {"cross_entropy": 1.0}).items()}

    @property
    def num_outputs(self) -> int:
        """All classes, the background among them."""
        return len(self.classes)

    @property
    def terms(self) -> list[str]:
        """Names of the losses in the mix."""
        return sorted(self._losses)

    def _labels(self, column: pa.ChunkedArray, ids: list[str], sizes: list[tuple[int, int]]) -> dict[str, Any]:
        masks = []
        for image_id, packed, size in zip(ids, column.to_pylist(), sizes, strict=True):
            mask = None if packed is None else _unpack(packed, size, image_id)
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

    def predict(self, outputs: Tensor, batch: Batch) -> Prediction:
        """Softmax of (N, C, h, w) logits, in float32."""
        del batch
        return Prediction(outputs.float().softmax(1))

    def fuse(self, members: Iterable[Prediction]) -> Fused:
        """Pool probabilities, not logits (reference: Lakshminarayanan et al. 2017)."""
        pool, expected = uncertainty.RunningMean(), uncertainty.RunningMean()
        maps: list[Tensor] = []
        for member in members:
            pool.add(member.probabilities)
            expected.add(uncertainty.entropy(member.probabilities, 1))
            # max is measured ten times as fast as argmax over an axis that is not the last.
            maps.append(member.probabilities.max(1).indices.to(torch.uint8))
            del member
        return Fused(pool.mean, expected.mean, maps)

    def metric(self) -> SegmentationMetric:
        """Empty."""
        return SegmentationMetric(self.num_outputs)

    def measure(
        self, predicted: Prediction | Fused, batch: Batch, truth: pa.Table | None, metric: SegmentationMetric
    ) -> None:
        """Probabilities, interpolated to each image's own size, against its mask."""
        matrices, sizes = batch.matrices.cpu(), batch.sizes.cpu()
        for n, packed in enumerate(self._truth(truth).to_pylist()):
            if packed is None:
                continue
            size = (int(sizes[n, 0]), int(sizes[n, 1]))
            mask = torch.from_numpy(_unpack(packed, size, batch.image_ids[n]))
            metric.update(_own_size(predicted.probabilities, matrices, sizes, n), mask)

    def to_columns(self, fused: Fused, batch: Batch) -> dict[str, list[Any]]:
        """Masks and maps at each image's own size; all measures over its area in the network's frame."""
        total = uncertainty.entropy(fused.probabilities, 1)
        mutual = uncertainty.mutual_information(total, fused.expected_entropy)
        valid = _valid(batch, total)
        confidence, labels = fused.probabilities.max(1)
        settings = self.settings
        measures = {
            "entropy_mean": uncertainty.masked_mean(total, valid),
            "entropy_p95": uncertainty.masked_quantile(total, valid, 0.95),
            "expected_entropy_mean": uncertainty.masked_mean(fused.expected_entropy, valid),
            "mutual_information_mean": uncertainty.masked_mean(mutual, valid),
            "mutual_information_p95": uncertainty.masked_quantile(mutual, valid, 0.95),
            "entropy_patch_max": uncertainty.patch_max(total, valid, settings.patch),
            "entropy_inner_mean": uncertainty.inner_mean(total, labels, valid, settings.boundary),
            "member_dice": uncertainty.pairwise_dice(fused.maps, valid, self.num_outputs, self.background),
        }
        values = torch.stack([measure.double() for measure in measures.values()]).tolist()
        columns: dict[str, list[Any]] = dict(zip(measures, values, strict=True))
        columns["uncertainty"] = list(columns["entropy_mean"])
        columns["classes"] = self._classes(labels, valid, confidence, total, mutual)
        return columns | self._pictures(fused.probabilities, total, batch)

    def _classes(
        self, labels: Tensor, valid: Tensor, confidence: Tensor, total: Tensor, mutual: Tensor
    ) -> list[list[dict[str, Any]]]:
        """What each predicted class covers of each image, and the means over it."""
        count = self.num_outputs
        area = uncertainty.class_sums(labels, valid, count)
        sums = [uncertainty.class_sums(labels, valid, count, each) for each in (confidence, total, mutual)]
        # One copy for everything: (5, N, C).
        share = area / area.sum(1, keepdim=True).clamp(min=1)
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
        matrices, sizes = batch.matrices.cpu(), batch.sizes.cpu()
        scale = self.settings.map_scale
        relative = (total / math.log(max(2, self.num_outputs)))[:, None]
        for n, (height, width) in enumerate(sizes.tolist()):
            confidence, labels = _own_size(probabilities, matrices, sizes, n).max(0)
            out["mask"][n] = _pack(labels)
            if not self.settings.maps:
                continue
            doubt = _own_size(relative, matrices, sizes, n)
            small = (-(-height // scale), -(-width // scale))
            maps = F.adaptive_avg_pool2d(torch.stack([confidence, doubt[0]])[None], small)[0]
            # Both lie in 0..1 but for rounding.
            maps = (maps.clamp(0, 1) * 255).round()
            out["confidence_map"][n], out["uncertainty_map"][n] = _pack(maps[0]), _pack(maps[1])
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


def _unpack(packed: bytes, size: tuple[int, int], image_id: str) -> np.ndarray:
    try:
        values = schema.unpack_map(packed, *size)
        return np.frombuffer(values, np.uint8).reshape(size).copy()  # writable, as torch wants it
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"mask of image '{image_id}' is not {size[0]}x{size[1]} packed pixels ({reason}); ingest it again"
        ) from None


def _pack(values: Tensor) -> bytes:
    return schema.pack_map(values.to("cpu", torch.uint8).contiguous().numpy().tobytes())


def _own_size(maps: Tensor, matrices: Tensor, sizes: Tensor, n: int) -> Tensor:
    """Image n's maps (C, H, W) at its own size, from (N, C, h, w) in the frame."""
    return unframe_maps(maps[n : n + 1], matrices[n : n + 1], sizes[n : n + 1])[0]


def _valid(batch: Batch, like: Tensor) -> Tensor:
    """(N, h, w) bool: pixels of the frame whose centre lies in the image."""
    area = image_area(batch).to(like.device)[:, :, None]
    rows = torch.arange(like.shape[1], device=like.device) + 0.5
    columns = torch.arange(like.shape[2], device=like.device) + 0.5
    inside_rows = (rows > area[:, 1]) & (rows < area[:, 3])
    inside_columns = (columns > area[:, 0]) & (columns < area[:, 2])
    return inside_rows[:, :, None] & inside_columns[:, None, :]
