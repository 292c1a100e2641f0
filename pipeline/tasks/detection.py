"""Object detection: members pooled by location or by clustering, with the doubt of boxes and images."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from pipeline import losses
from pipeline.errors import InputError, nearest
from pipeline.images.batch import Batch
from pipeline.images.decode import Size
from pipeline.losses import Term
from pipeline.metrics import DetectionMetric, match
from pipeline.tasks.base import Task, image_area
from pipeline.tasks.box_columns import box_rows, measure_image
from pipeline.tasks.box_pooling import (
    ClusterPool,
    LocationPool,
    Prediction,
    SuppressionRule,
    same_locations,
    view_to_frame,
)
from pipeline.tasks.pooled_boxes import Fused, ImageBoxes, sides, unpack_boxes
from pipeline.uncertainty import calibration
from pipeline.uncertainty.box_fusion import DEFAULT_IOU
from pipeline.uncertainty.calibration import BoxSample
from pipeline.uncertainty.tta import InferenceSettings, View, inference_passes, tta_views

OPERATING = 0.3
"""Score from which a box counts as predicted, until a validation split chose another."""

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


class ViewPool:
    """One member's predictions on several views of a batch, pooled as members are."""

    def __init__(self, task: "Detection") -> None:
        self._task = task
        self._predictions: list[Prediction] = []

    def add(self, prediction: Prediction) -> None:
        """Add the prediction on one view."""
        self._predictions.append(prediction)

    def result(self) -> Prediction | Fused:
        """The prediction on a single view as it is, or the pool of several."""
        return self._predictions[0] if len(self._predictions) == 1 else self._task.fuse(self._predictions)


class Detection(Task):
    """``pipeline.models.Detections`` and boxes."""

    name = "detection"
    label_column = "boxes"
    calibrates = True
    calibrates_members = True
    settings: DetectionPredict
    _loss: losses.BoxLoss

    @classmethod
    def parse_loss(cls, values: dict[str, Any], where: str) -> losses.BoxLoss:
        """The loss of detectors named by ``name`` (default: ``aligned``), with its own settings."""
        name = values.get("name", "aligned")
        if name not in losses.DETECTION_LOSSES:
            hint = nearest(str(name), losses.DETECTION_LOSSES)
            raise InputError(f"{where}.name: {name!r} is no loss of detectors.{hint}")
        rest = {key: value for key, value in values.items() if key != "name"}
        return losses.DETECTION_LOSSES[name].parse(rest, where)

    @classmethod
    def parse_predict(cls, values: dict[str, Any], where: str) -> DetectionPredict:
        """See ``DetectionPredict``."""
        settings = DetectionPredict.parse(values, where)
        if settings.windows == "always":
            raise InputError(f"{where}.windows: always is for segmentation; detectors see images whole: leave it out")
        return settings

    @property
    def inference(self) -> InferenceSettings:
        """The views and dropout passes set under ``predict``; images are always seen whole."""
        return self.settings.model_copy(update={"windows": "never"})

    @property
    def uncertainty_measure(self) -> str:
        """A measure of ``Score``, as set under ``predict``."""
        return self.settings.uncertainty

    @property
    def operating(self) -> float:
        """Score from which a box counts as predicted."""
        return OPERATING if self.score_threshold is None else self.score_threshold

    @property
    def loss_terms(self) -> list[str]:
        """Names of the terms of the detector's loss."""
        return sorted(self._loss.terms)

    def read_labels(self, column: pa.ChunkedArray, ids: list[str], sizes: list[Size]) -> dict[str, Any]:
        """``boxes``: N arrays (B, 4) float32, ``labels``: (B,) int64, ``crowd``: (B,) bool."""
        boxes, labels, crowd = unpack_boxes(column)
        for image_id, image_labels in zip(ids, labels, strict=True):
            if len(image_labels) and not 0 <= image_labels.min() <= image_labels.max() < self.num_outputs:
                raise InputError(
                    f"boxes of image '{image_id}' have labels {int(image_labels.min())} to "
                    f"{int(image_labels.max())}, but "
                    f"there are {self.num_outputs} classes, from 0 on; use a dataset of the same classes"
                )
        return {"boxes": boxes, "labels": labels, "crowd": crowd}

    def forward(self, model: Any, batch: Batch) -> Any:
        """Raw outputs; a two-stage detector samples proposals by the targets, outside training always the same ones."""
        if not self._loss.takes_targets:
            return model(batch.images)
        assert batch.labels is not None, "a batch without boxes has no loss"
        assert batch.crowd is not None, "boxes come with their crowd flags"
        # A crowd region is no object: it is hidden as padding is.
        labels = batch.labels.masked_fill(batch.crowd, -1)
        if model.training:
            return model(batch.images, batch.boxes, labels)
        # A validation loss that changed with the random state could not be compared from one epoch to the next.
        with torch.random.fork_rng([batch.images.device] if batch.images.is_cuda else []):
            torch.manual_seed(0)
            return model(batch.images, batch.boxes, labels)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Objects or images, by term."""
        assert batch.labels is not None, "a batch without boxes has no loss"
        return self._loss.counts(batch.labels, batch.crowd)

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
        """Each term of the detector's loss; see ``pipeline.losses.DETECTION_LOSSES``."""
        assert batch.boxes is not None, "a batch without boxes has no loss"
        assert batch.labels is not None, "a batch without boxes has no loss"
        return self._loss(outputs, batch.boxes, batch.labels, batch.crowd)

    def predict(
        self, outputs: Any, batch: Batch, view: View | None = None, view_size: tuple[int, int] | None = None
    ) -> Prediction:
        """Class vectors and boxes of raw outputs, in float32; those of a view in the pixels of the frame."""
        size = (batch.images.shape[-2], batch.images.shape[-1])
        boxes, centres = outputs.boxes.float(), outputs.centres.to(outputs.boxes.device)
        if view is not None and view != View():
            boxes, centres = view_to_frame(boxes, centres, view, size, view_size or size)
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
        pool: LocationPool | ClusterPool | None = None
        for member in members:
            # How members are joined depends on where they predict, which only the first one shows.
            pool = pool or self._new_pool(member, (parameters or {}).get("members"))
            pool.add(member)
        assert pool is not None, "the pool of no members; add at least one"
        return Fused(**vars(pool.result()), parameters=parameters)

    def _new_pool(
        self, first: Prediction, member_calibrations: list[dict[str, Any]] | None
    ) -> LocationPool | ClusterPool:
        """An empty pool that members like ``first`` can be joined in.

        Args:
            first: The first member's prediction.
            member_calibrations: Of unlike members, score -> precision x IoU of each; None: not calibrated one by one.
        """
        settings = self.settings
        fusion = settings.fuse
        rule = SuppressionRule(settings.score_threshold, settings.nms_iou, settings.max_boxes)
        # By location wherever it is possible: it is exact, and needs no overlap threshold.
        if fusion in ("auto", "locations"):
            if self.same_model and same_locations(first, tta_views(settings.tta)):
                return LocationPool(rule)
            if fusion == "locations":
                raise InputError(
                    "predict.fuse: locations wants members and views that predict at the same places, and these do "
                    "not; set predict.fuse to auto, bsas or wbf"
                )
            fusion = "bsas"
        # A member is added once for each of its views and dropout passes: they share its calibration.
        passes = len(list(inference_passes(self.inference)))

        def calibrated(number: int, scores: Tensor) -> Tensor:
            return calibration.apply_isotonic(
                member_calibrations[number // passes] if member_calibrations else None, scores
            )

        return ClusterPool(rule, fusion, settings.cluster_iou or DEFAULT_IOU[fusion], calibrated)

    def new_view_mean(self) -> ViewPool:
        """An empty pool of one member's views and dropout passes."""
        return ViewPool(self)

    def without_calibration(self, fused: Fused) -> Fused:
        """The same boxes, with scores and spread as they were before calibration."""
        return fused.plain()

    def metric(self, calibrated: bool = True) -> DetectionMetric:
        """An empty metric.

        Uncalibrated scores count from the one that calibration turns into the operating score: the same boxes.
        """
        curve = None if calibrated or self.calibration is None else self.calibration["parameters"].get("pool")
        operating = self.operating if curve is None else float(np.interp(self.operating, curve["y"], curve["x"]))
        return DetectionMetric(self.num_outputs, operating)

    def new_calibration_sample(self) -> BoxSample:
        """An empty sample of boxes."""
        return BoxSample()

    def update_metric(
        self, predicted: Prediction | Fused, batch: Batch, truth: pa.Table | None, metric: DetectionMetric
    ) -> None:
        """Boxes in each image's own pixels, from a low score on, against the true ones; members uncalibrated."""
        for n, image, boxes, labels, crowd in self._labelled(predicted, batch, truth):
            tensors = (image.boxes, image.scores, image.kept.labels, image.std, image.kept.probabilities)
            predicted_boxes, scores, predicted_labels, std, probabilities = (tensor.cpu().numpy() for tensor in tensors)
            metric.update(
                batch.image_ids[n], predicted_boxes, scores, predicted_labels, boxes, labels, crowd,
                std=std, probabilities=probabilities,
                uncertainty=self._measures(image)[self.settings.uncertainty], size=tuple(batch.sizes[n].tolist()),
            )  # fmt: skip

    def update_sample(self, fused: Prediction | Fused, batch: Batch, truth: pa.Table | None, sample: BoxSample) -> None:
        """Scores of boxes before calibration, whether they are right, and how far their edges are off."""
        plain = fused.plain() if isinstance(fused, Fused) else fused
        for n, image, boxes, labels, crowd in self._labelled(plain, batch, truth):
            tensors = (image.boxes, image.scores, image.kept.labels, image.std)
            predicted_boxes, scores, predicted_labels, std = (tensor.cpu().numpy() for tensor in tensors)
            matches = match(predicted_boxes, scores, predicted_labels, boxes, labels, crowd)
            # How far each edge is off; 0 for a box that matches no object.
            error = np.zeros_like(predicted_boxes)
            hit = matches.index >= 0
            error[hit] = predicted_boxes[hit] - boxes[matches.index[hit]]
            size = sides(torch.from_numpy(predicted_boxes)).numpy()
            # Boxes on a crowd region are neither right nor wrong.
            keep = ~matches.ignored
            values = (scores, hit.astype(np.float64), matches.iou * hit, std, error, size)
            sample.update(batch.image_ids[n], *(value[keep] for value in values))

    def _labelled(
        self, predicted: Prediction | Fused, batch: Batch, truth: pa.Table | None
    ) -> Iterator[tuple[int, ImageBoxes, np.ndarray, np.ndarray, np.ndarray]]:
        """(row, predicted boxes, true boxes (T, 4), labels (T,), crowd (T,)) of images that are labelled."""
        column = self._require_labels(truth)
        is_labelled = column.is_valid().to_pylist()
        boxes, labels, crowd = unpack_boxes(column)
        fused = predicted if isinstance(predicted, Fused) else self._fuse([predicted], None)
        for n, image in enumerate(fused.in_image_pixels(batch)):
            if is_labelled[n]:
                yield n, image, boxes[n], labels[n], crowd[n]

    def to_columns(self, fused: Fused, batch: Batch) -> dict[str, list[Any]]:
        """Boxes in each image's own pixels; the image's uncertainty by all measures."""
        images = fused.in_image_pixels(batch)
        measures = [self._measures(image) for image in images]
        columns: dict[str, list[Any]] = {name: [values[name] for values in measures] for name in measures[0]}
        columns["uncertainty"] = columns[self.settings.uncertainty]
        columns["boxes"] = [box_rows(image, self.settings.score_threshold) for image in images]
        return columns

    def _measures(self, image: ImageBoxes) -> dict[str, float]:
        return measure_image(image, self.settings.score_threshold, self.operating)
