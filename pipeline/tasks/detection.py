"""Object detection: members of one architecture are pooled location by location, then suppressed once.

Route 2 of ensembling detectors: equal members predict at the same locations, so class vectors and boxes are
averaged there, no clustering is needed, and the spread of a box is that of the members at its location.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from pipeline import boxes as box_ops
from pipeline import losses, uncertainty
from pipeline.augment import Batch, unframe_boxes
from pipeline.config import Settings
from pipeline.errors import InputError
from pipeline.metrics import DetectionMetric
from pipeline.tasks.base import Task, Term, image_area
from pipeline.views import InferenceSettings

MEASURED_FROM = 0.01
"""Metrics look at boxes down to this score, whatever is written: average precision needs them."""
_CANDIDATES = 1000
"""Best-scoring locations of an image that enter suppression."""
_MIN_WEIGHT = 1e-6


class DetectionPredict(Settings):
    """Which boxes are kept. A score is class probability times quality."""

    score_threshold: float = Field(default=0.05, ge=0, le=1)
    nms_iou: float = Field(default=0.6, gt=0, le=1)
    """Of two boxes of one class that overlap more than this, the one with the lower score goes."""
    max_boxes: int = Field(default=100, ge=1)
    """Of one image; metrics count at most COCO's 100."""


@dataclass
class Prediction:
    """One member, at L locations of N images, in the network's frame."""

    probabilities: Tensor
    """(N, L, K + 1), the last "none of these"."""
    scores: Tensor
    """(N, L, K) class probability times quality."""
    boxes: Tensor
    """(N, L, 4)."""
    inside: Tensor
    """(N, L) bool: the location lies in the image, not in the padding around it."""
    area: Tensor
    """(N, 1, 4) where in the frame the image lies."""


@dataclass
class Kept:
    """What is left of one image after suppression, best score first."""

    locations: Tensor
    """(B,) indices."""
    labels: Tensor
    """(B,)."""
    scores: Tensor
    """(B,)."""


@dataclass
class Fused:
    """The pool of M members, at all locations."""

    members: int
    probabilities: Tensor
    """(N, L, K + 1) mean over members."""
    expected_entropy: Tensor
    """(N, L) mean of the members' entropies."""
    scores: Tensor
    """(N, L, K) mean over members."""
    boxes: Tensor
    """(N, L, 4) mean over members, weighted by their best score there: one who sees nothing says no box."""
    std: Tensor
    """(N, L, 4) standard deviation under the same weights."""
    votes: Tensor
    """(N, L) members whose own best score there passes the threshold."""
    inside: Tensor
    """As in Prediction."""
    area: Tensor
    """As in Prediction."""
    settings: DetectionPredict

    @cached_property
    def kept(self) -> list[Kept]:
        """Suppressed once, from the metrics' threshold down; stored boxes are the first of them by score."""
        return [_suppress(self, n) for n in range(len(self.boxes))]


class Only:
    """The one prediction of a member."""

    def __init__(self) -> None:
        self._found: list[Prediction] = []

    def add(self, prediction: Prediction) -> None:
        """Take it in."""
        self._found.append(prediction)

    def result(self) -> Prediction:
        """The prediction."""
        (prediction,) = self._found
        return prediction


class Detection(Task):
    """``DetectionOutput`` and boxes."""

    name = "detection"
    label_column = "boxes"
    calibrates = False
    settings: DetectionPredict

    def _parse_predict(self, values: dict[str, Any]) -> Settings:
        return DetectionPredict.parse(values, "predict")

    def _set_loss(self, values: dict[str, Any]) -> None:
        self._loss = losses.DetectionLoss.parse(values, "loss")

    @property
    def inference(self) -> InferenceSettings:
        """Once, whole: views of boxes are not built yet."""
        return InferenceSettings(windows="never")

    @property
    def score(self) -> str:
        """Entropy summed over locations, before suppression."""
        return "entropy_sum"

    @property
    def num_outputs(self) -> int:
        """All classes but a background at the end of the list."""
        return len(self.classes) - (self.background == len(self.classes) - 1)

    @property
    def terms(self) -> list[str]:
        """Of the detection loss."""
        return ["box", "cls", "quality"]

    def _labels(self, column: pa.ChunkedArray, ids: list[str], sizes: list[tuple[int, int]]) -> dict[str, Any]:
        del sizes
        boxes, labels, crowd = _unpack(column)
        for image_id, each in zip(ids, labels, strict=True):
            if len(each) and not 0 <= each.min() <= each.max() < self.num_outputs:
                raise InputError(
                    f"boxes of image '{image_id}' have labels {int(each.min())} to {int(each.max())}, but "
                    f"there are {self.num_outputs} classes, from 0 on; use a dataset of the same classes"
                )
        return {"boxes": boxes, "labels": labels, "crowd": crowd}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Objects, by term."""
        assert batch.labels is not None, "a batch without boxes has no loss"
        return losses.counts(batch.labels, batch.crowd)

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
        """See ``pipeline.losses.detection``."""
        assert batch.boxes is not None, "a batch without boxes has no loss"
        assert batch.labels is not None, "a batch without boxes has no loss"
        return losses.detection(outputs, batch.boxes, batch.labels, batch.crowd, self._loss)

    def predict(self, outputs: Any, batch: Batch) -> Prediction:
        """Probabilities of raw outputs, in float32."""
        classes = outputs.logits.float().sigmoid()
        scores = classes * outputs.quality.float().sigmoid()[..., None]
        area = image_area(batch).to(classes.device)[:, None]
        x, y = outputs.centres.to(classes.device).unbind(1)
        inside = (x > area[..., 0]) & (x < area[..., 2]) & (y > area[..., 1]) & (y < area[..., 3])
        return Prediction(uncertainty.with_rest(classes), scores, outputs.boxes.float(), inside, area)

    def fuse(self, members: Iterable[Prediction]) -> Fused:
        """Means over members at each location; see ``Fused``."""
        pool, expected, scores = (uncertainty.RunningMean() for _ in range(3))
        boxes = uncertainty.RunningSpread()
        votes = inside = area = torch.zeros(())
        for member in members:
            pool.add(member.probabilities)
            expected.add(uncertainty.entropy(member.probabilities, -1))
            scores.add(member.scores)
            best = member.scores.amax(-1)
            boxes.add(member.boxes, best.clamp(min=_MIN_WEIGHT))
            votes = votes + (best >= self.settings.score_threshold).int()
            inside, area = member.inside, member.area
        return Fused(
            pool.count, pool.mean, expected.mean, scores.mean, boxes.mean, boxes.std, votes, inside, area,
            self.settings,
        )  # fmt: skip

    def average(self) -> Only:
        """Of one prediction: there are no views yet."""
        return Only()

    def uncalibrated(self, fused: Fused) -> Fused:
        """The pool itself."""
        return fused

    def sample(self, fused: Fused, batch: Batch, truth: pa.Table | None, sample: Any) -> None:
        """Not built yet."""
        raise InputError("calibration is for segmentation so far; leave the bundle of detectors as it is")

    def metric(self) -> DetectionMetric:
        """Empty."""
        return DetectionMetric(self.num_outputs)

    def measure(
        self, predicted: Prediction | Fused, batch: Batch, truth: pa.Table | None, metric: DetectionMetric
    ) -> None:
        """Boxes in each image's own pixels, from a low score on, against the true ones."""
        column = self._truth(truth)
        known = column.is_valid().to_pylist()
        boxes, labels, crowd = _unpack(column)
        fused = predicted if isinstance(predicted, Fused) else self.fuse([predicted])
        for n, (found, kept) in enumerate(zip(_own_boxes(fused, batch), fused.kept, strict=True)):
            if known[n]:
                found, scores, names = (each.cpu().numpy() for each in (found, kept.scores, kept.labels))
                metric.update(batch.image_ids[n], found, scores, names, boxes[n], labels[n], crowd[n])

    def to_columns(self, fused: Fused, batch: Batch) -> dict[str, list[Any]]:
        """Boxes in each image's own pixels; the image's doubt rests on all locations, not on kept boxes."""
        total = uncertainty.entropy(fused.probabilities, -1)
        mutual = uncertainty.mutual_information(total, fused.expected_entropy)
        summed = torch.where(fused.inside, total, 0).sum(1, dtype=torch.float64)
        rows = [
            self._box_rows(fused, n, found, batch, total[n], mutual[n])
            for n, found in enumerate(_own_boxes(fused, batch))
        ]
        missed = [sum((1 - row["votes"] / fused.members) * row["score"] for row in each) for each in rows]
        return {"uncertainty": summed.tolist(), "boxes": rows, "missed_votes": missed}

    def _box_rows(
        self, fused: Fused, n: int, boxes: Tensor, batch: Batch, total: Tensor, mutual: Tensor
    ) -> list[dict[str, Any]]:
        """Image n's rows of ``schema.PREDICTED_BOX``."""
        kept = fused.kept[n]
        stays = kept.scores >= self.settings.score_threshold
        at = kept.locations[stays]
        # The edges' own scales: frame pixels per image pixel, along x and y.
        scale = batch.matrices[n].to(boxes.device).diagonal()[[0, 1, 0, 1]].abs()
        count = len(at)
        numbers = [
            boxes[stays], kept.labels[stays][:, None], kept.scores[stays][:, None],
            total[at][:, None], mutual[at][:, None], fused.votes[n, at][:, None],
            fused.std[n, at] / scale, fused.probabilities[n, at],
        ]  # fmt: skip
        table = torch.cat([number.double() for number in numbers], 1).tolist() if count else []
        return [
            {
                "x1": row[0], "y1": row[1], "x2": row[2], "y2": row[3],
                "label": int(row[4]), "score": row[5], "probabilities": row[13:],
                "entropy": row[6], "mutual_information": row[7], "votes": int(row[8]),
                "std_x1": row[9], "std_y1": row[10], "std_x2": row[11], "std_y2": row[12],
            }
            for row in table
        ]  # fmt: skip


def _suppress(fused: Fused, n: int) -> Kept:
    """One image at a time: offsets between images cost precision, so the answer would depend on the batch."""
    settings = fused.settings
    scores, labels = fused.scores[n].max(-1)
    low = torch.maximum(fused.boxes[n, :, :2], fused.area[n, :, :2])
    high = torch.minimum(fused.boxes[n, :, 2:], fused.area[n, :, 2:])
    seen = fused.inside[n] & (high > low).all(1)
    at = (seen & (scores >= min(settings.score_threshold, MEASURED_FROM))).nonzero()[:, 0]
    best = scores[at].sort(descending=True, stable=True).indices[:_CANDIDATES]
    at = at[best]
    chosen = box_ops.batched_nms(fused.boxes[n, at], scores[at], labels[at], settings.nms_iou)
    at = at[chosen[: settings.max_boxes]]
    return Kept(at, labels[at], scores[at])


def _own_boxes(fused: Fused, batch: Batch) -> list[Tensor]:
    """Kept boxes (B, 4) of each image in its own pixels, clipped to it."""
    out: list[Tensor] = []
    for n, kept in enumerate(fused.kept):
        boxes, one = fused.boxes[n, kept.locations], slice(n, n + 1)
        out.append(unframe_boxes(boxes[None], batch.matrices[one], batch.sizes[one])[0])
    return out


def _unpack(column: pa.ChunkedArray) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Boxes (B, 4) float32, labels (B,) int64, crowd (B,) bool of each row; a null row has none."""
    lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    flat = lists.flatten()  # of this slice, without what lies behind nulls

    def field(name: str, kind: type) -> np.ndarray:
        return flat.field(name).to_numpy(zero_copy_only=False).astype(kind)

    boxes = np.stack([field(name, np.float32) for name in ("x1", "y1", "x2", "y2")], 1)
    crowd = flat.field("crowd").fill_null(False).to_numpy(zero_copy_only=False)
    ends, rows = np.cumsum(lengths)[:-1], len(lengths)
    columns = (boxes, field("label", np.int64), crowd)
    split = [np.split(column, ends)[:rows] for column in columns]
    return split[0], split[1], split[2]
