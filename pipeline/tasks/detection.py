"""Object detection: members pooled by location or by clustering, with the doubt of boxes and images."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from pipeline import losses
from pipeline.config import Settings
from pipeline.errors import InputError, nearest
from pipeline.images.batch import Batch
from pipeline.metrics import DetectionMetric, match
from pipeline.tasks.base import Task, Term, image_area
from pipeline.tasks.box_pooling import (
    ClusterPool,
    LocationPool,
    Prediction,
    SuppressionRule,
    same_locations,
    view_to_frame,
)
from pipeline.tasks.pooled_boxes import Fused, ImageBoxes, expected_error, sides, unpack_boxes
from pipeline.uncertainty import calibration
from pipeline.uncertainty.box_fusion import DEFAULT_IOU
from pipeline.uncertainty.calibration import BoxSample
from pipeline.uncertainty.tta import InferenceSettings, View, inference_passes, tta_views

OPERATING = 0.3
"""Score from which a box counts as said, until a validation split chose another."""
_STD = ("std_x1", "std_y1", "std_x2", "std_y2")

Score = Literal[
    "entropy_sum", "mutual_information_sum", "box_entropy_mean", "box_entropy_max", "missed_votes", "expected_error"
]


class DetectionPredict(InferenceSettings):
    """How members are asked and joined, and which boxes are kept. A score is class probability times quality."""

    score_threshold: float = Field(default=0.05, ge=0, le=1)
    """Boxes from this score on are written; a member votes for a location from its own score on."""
    nms_iou: float = Field(default=0.6, gt=0, le=1)
    """Of two boxes of one class that overlap more than this, the one with the lower score goes."""
    max_boxes: int = Field(default=100, ge=1)
    """Of one image; metrics count at most COCO's 100."""
    fuse: Literal["auto", "locations", "wbf", "bsas"] = "auto"
    """How members and views are joined: averaged at each location before one suppression, or their boxes
    clustered (weighted boxes fusion, or basic sequential clustering). ``auto``: by location where all members
    predict at the same places, else bsas."""
    cluster_iou: float | None = Field(default=None, gt=0, le=1)
    """Overlap from which boxes of different members are one object; null: 0.55 for wbf, 0.7 for bsas."""
    uncertainty: Score = "entropy_sum"
    """Which measure is an image's ``uncertainty``, that the review threshold acts on."""


class Views:
    """All that one member said of a batch, fused when it is asked for."""

    def __init__(self, task: "Detection") -> None:
        self._task = task
        self._said: list[Prediction] = []

    def add(self, prediction: Prediction) -> None:
        """Take in one."""
        self._said.append(prediction)

    def result(self) -> Prediction | Fused:
        """The prediction, or the pool of several."""
        return self._said[0] if len(self._said) == 1 else self._task.fuse(self._said)


class Detection(Task):
    """``pipeline.models.Detections`` and boxes."""

    name = "detection"
    label_column = "boxes"
    calibrates = True
    calibrates_members = True
    settings: DetectionPredict

    def _parse_predict(self, values: dict[str, Any]) -> Settings:
        settings = DetectionPredict.parse(values, "predict")
        if settings.windows == "always":
            raise InputError("predict.windows: always is for segmentation; detectors see images whole: leave it out")
        return settings

    def _set_loss(self, values: dict[str, Any]) -> None:
        name = values.get("name", "aligned")
        if name not in losses.DETECTION_LOSSES:
            hint = nearest(str(name), losses.DETECTION_LOSSES)
            raise InputError(f"loss.name: {name!r} is no loss of detectors.{hint}")
        rest = {key: value for key, value in values.items() if key != "name"}
        self._loss = losses.DETECTION_LOSSES[name].parse(rest, "loss")

    @property
    def inference(self) -> InferenceSettings:
        """As set under ``predict``, always whole."""
        return self.settings.model_copy(update={"windows": "never"})

    @property
    def uncertainty_measure(self) -> str:
        """One of the measures."""
        return self.settings.uncertainty

    @property
    def operating(self) -> float:
        """Score from which a box counts as said."""
        return OPERATING if self.score_threshold is None else self.score_threshold

    @property
    def num_outputs(self) -> int:
        """All classes but a background at the end of the list."""
        return len(self.classes) - (self.background == len(self.classes) - 1)

    @property
    def loss_terms(self) -> list[str]:
        """Of the loss."""
        return sorted(self._loss.terms)

    def _labels(self, column: pa.ChunkedArray, ids: list[str], sizes: list[tuple[int, int]]) -> dict[str, Any]:
        del sizes
        boxes, labels, crowd = unpack_boxes(column)
        for image_id, each in zip(ids, labels, strict=True):
            if len(each) and not 0 <= each.min() <= each.max() < self.num_outputs:
                raise InputError(
                    f"boxes of image '{image_id}' have labels {int(each.min())} to {int(each.max())}, but "
                    f"there are {self.num_outputs} classes, from 0 on; use a dataset of the same classes"
                )
        return {"boxes": boxes, "labels": labels, "crowd": crowd}

    def forward(self, model: Any, batch: Batch) -> Any:
        """A two-stage detector samples proposals by the targets; outside training always the same ones."""
        if not self._loss.takes_targets:
            return model(batch.images)
        assert batch.labels is not None, "a batch without boxes has no loss"
        assert batch.crowd is not None, "boxes come with their crowd flags"
        labels = batch.labels.masked_fill(batch.crowd, -1)
        if model.training:
            return model(batch.images, batch.boxes, labels)
        with torch.random.fork_rng([batch.images.device] if batch.images.is_cuda else []):
            torch.manual_seed(0)
            return model(batch.images, batch.boxes, labels)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Objects or images, by term."""
        assert batch.labels is not None, "a batch without boxes has no loss"
        return self._loss.counts(batch.labels, batch.crowd)

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
        """See ``pipeline.losses.DETECTION_LOSSES``."""
        assert batch.boxes is not None, "a batch without boxes has no loss"
        assert batch.labels is not None, "a batch without boxes has no loss"
        return self._loss(outputs, batch.boxes, batch.labels, batch.crowd)

    def predict(
        self, outputs: Any, batch: Batch, look: View | None = None, seen: tuple[int, int] | None = None
    ) -> Prediction:
        """Class vectors and boxes of raw outputs, in float32; those of a view in the pixels of the frame."""
        size = (batch.images.shape[-2], batch.images.shape[-1])
        boxes, centres = outputs.boxes.float(), outputs.centres.to(outputs.boxes.device)
        if look is not None and look != View():
            boxes, centres = view_to_frame(boxes, centres, look, size, seen or size)
        area = image_area(batch).to(boxes.device)[:, None]
        x, y = centres.unbind(-1)
        # Anchors may lie on the image's very edge.
        inside = (x >= area[..., 0]) & (x < area[..., 2]) & (y >= area[..., 1]) & (y < area[..., 3])
        return Prediction(
            outputs.probabilities(),
            outputs.scores(),
            boxes,
            inside,
            area,
            centres,
            outputs.strides,
            outputs.fixed,
            size,
        )

    def fuse(self, members: Iterable[Prediction]) -> Fused:
        """By location or by clustering, then calibrated; see ``pipeline.tasks.box_pooling``."""
        parameters = None if self.calibration is None else self.calibration["parameters"]
        return self._fuse(members, parameters)

    def _fuse(self, members: Iterable[Prediction], parameters: dict[str, Any] | None) -> Fused:
        joined: LocationPool | ClusterPool | None = None
        for member in members:
            joined = joined or self._join(member, (parameters or {}).get("members"))
            joined.add(member)
        assert joined is not None, "the pool of no members; add at least one"
        return Fused(**vars(joined.result()), parameters=parameters)

    def _join(self, first: Prediction, own: list[dict[str, Any]] | None) -> LocationPool | ClusterPool:
        """How these members can be joined; ``own``: the calibrations of unlike members' scores."""
        settings, kind = self.settings, self.settings.fuse
        rule = SuppressionRule(settings.score_threshold, settings.nms_iou, settings.max_boxes)
        if kind in ("auto", "locations"):
            if self.alike and same_locations(first, tta_views(settings.tta)):
                return LocationPool(rule)
            if kind == "locations":
                raise InputError(
                    "predict.fuse: locations wants members and views that predict at the same places, and these do "
                    "not; set predict.fuse to auto, bsas or wbf"
                )
            kind = "bsas"
        passes = len(list(inference_passes(self.inference)))

        def calibrated(number: int, scores: Tensor) -> Tensor:
            return calibration.apply_isotonic(own[number // passes] if own else None, scores)

        return ClusterPool(rule, kind, settings.cluster_iou or DEFAULT_IOU[kind], calibrated)

    def new_view_mean(self) -> Views:
        """The pool of a member's own views and dropout passes."""
        return Views(self)

    def without_calibration(self, fused: Fused) -> Fused:
        """The same boxes, with scores and spread as they came out."""
        return fused.plain()

    def metric(self, calibrated: bool = True) -> DetectionMetric:
        """Empty. Scores that are not calibrated are judged from the one that becomes the operating score."""
        curve = None if calibrated or self.calibration is None else self.calibration["parameters"].get("pool")
        operating = self.operating if curve is None else float(np.interp(self.operating, curve["y"], curve["x"]))
        return DetectionMetric(self.num_outputs, operating)

    def new_calibration_sample(self) -> BoxSample:
        """Empty."""
        return BoxSample()

    def update_metric(
        self, predicted: Prediction | Fused, batch: Batch, truth: pa.Table | None, metric: DetectionMetric
    ) -> None:
        """Boxes in each image's own pixels, from a low score on, against the true ones; members uncalibrated."""
        for n, own, boxes, labels, crowd in self._labelled(predicted, batch, truth):
            numbers = (own.boxes, own.scores, own.found.labels, own.std, own.found.probabilities)
            found, scores, names, std, probabilities = (each.cpu().numpy() for each in numbers)
            metric.update(
                batch.image_ids[n], found, scores, names, boxes, labels, crowd, std=std, probabilities=probabilities,
                uncertainty=self._measures(own)[self.settings.uncertainty], size=tuple(batch.sizes[n].tolist()),
            )  # fmt: skip

    def update_sample(self, fused: Prediction | Fused, batch: Batch, truth: pa.Table | None, sample: BoxSample) -> None:
        """Scores of boxes before calibration, whether they are right, and how far their edges are off."""
        plain = fused.plain() if isinstance(fused, Fused) else fused
        for n, own, boxes, labels, crowd in self._labelled(plain, batch, truth):
            numbers = (own.boxes, own.scores, own.found.labels, own.std)
            found, scores, names, std = (each.cpu().numpy() for each in numbers)
            made = match(found, scores, names, boxes, labels, crowd)
            error = np.zeros_like(found)
            hit = made.index >= 0
            error[hit] = found[hit] - boxes[made.index[hit]]
            size = sides(torch.from_numpy(found)).numpy()
            keep = ~made.ignored
            sample.update(
                batch.image_ids[n],
                *(each[keep] for each in (scores, hit.astype(np.float64), made.iou * hit, std, error, size)),
            )

    def _labelled(
        self, predicted: Prediction | Fused, batch: Batch, truth: pa.Table | None
    ) -> Iterator[tuple[int, ImageBoxes, np.ndarray, np.ndarray, np.ndarray]]:
        """(row, what was found, true boxes (T, 4), labels (T,), crowd (T,)) of images that are labelled."""
        column = self._truth(truth)
        known = column.is_valid().to_pylist()
        boxes, labels, crowd = unpack_boxes(column)
        fused = predicted if isinstance(predicted, Fused) else self._fuse([predicted], None)
        for n, own in enumerate(fused.own(batch)):
            if known[n]:
                yield n, own, boxes[n], labels[n], crowd[n]

    def to_columns(self, fused: Fused, batch: Batch) -> dict[str, list[Any]]:
        """Boxes in each image's own pixels; the image's doubt by all measures."""
        every = fused.own(batch)
        measures = [self._measures(own) for own in every]
        columns: dict[str, list[Any]] = {name: [each[name] for each in measures] for name in measures[0]}
        columns["uncertainty"] = columns[self.settings.uncertainty]
        columns["boxes"] = [self._rows(own) for own in every]
        return columns

    def _measures(self, own: ImageBoxes) -> dict[str, float]:
        """The image's doubt; see ``DetectionPredict.uncertainty``."""
        found, written = own.found, own.scores >= self.settings.score_threshold
        entropy, scores = found.entropy[written].double(), own.scores[written].double()
        absent = 1 - found.votes[written].double() / own.members
        columns = {
            "entropy_sum": own.entropy_sum,
            "mutual_information_sum": own.mutual_information_sum,
            "box_entropy_mean": entropy.sum() / written.sum().clamp(min=1),
            "box_entropy_max": entropy.max() if len(entropy) else entropy.sum(),
            "missed_votes": (absent * scores).sum(),
            "expected_error": expected_error(found.scores, own.scores >= self.operating),
        }
        return dict(zip(columns, torch.stack([each.double() for each in columns.values()]).tolist(), strict=True))

    def _rows(self, own: ImageBoxes) -> list[dict[str, Any]]:
        """Rows of ``schema.PREDICTED_BOX``."""
        at, found = own.scores >= self.settings.score_threshold, own.found
        numbers = [
            own.boxes[at], found.labels[at][:, None], own.scores[at][:, None], found.entropy[at][:, None],
            found.mutual_information[at][:, None], found.votes[at][:, None], own.std[at], found.probabilities[at],
        ]  # fmt: skip
        table = torch.cat([number.double() for number in numbers], 1).tolist()
        return [
            {
                "x1": row[0], "y1": row[1], "x2": row[2], "y2": row[3],
                "label": int(row[4]), "score": row[5], "probabilities": row[13:],
                "entropy": row[6], "mutual_information": row[7], "votes": int(row[8]),
            } | {name: None if math.isnan(value) else value for name, value in zip(_STD, row[9:13], strict=True)}
            for row in table
        ]  # fmt: skip
