"""What a task is: from rows to a batch, a loss, predictions, uncertainty, metrics and columns.

Predictions of one member and the fusion of several are opaque to everybody else: ``predict`` makes one, ``fuse``
joins them, ``update_metric``, ``update_sample`` and ``to_columns`` read them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.images import affine
from pipeline.images.batch import Batch
from pipeline.images.decode import DecodeError, Size
from pipeline.images.input_settings import InputSettings
from pipeline.losses import Term
from pipeline.models.outputs import num_outputs
from pipeline.tasks.collate import Collator, Failure
from pipeline.uncertainty.tta import InferenceSettings, View


class ViewMean(Protocol):
    """The predictions of one member on several views, joined into one; views are added one at a time."""

    def add(self, prediction: Any, /) -> None:
        """Add the prediction on one view."""
        ...

    def result(self) -> Any:
        """The mean over the views added so far: of the type that ``predict`` gives."""
        ...


class Task(ABC):
    """What a dataset, a model and a loop have in common for one kind of label.

    Args:
        classes: Names in label order.
        background: Label of the implicit background, if there is one.
        input: What the network sees.
        loss: Settings of the loss, as ``parse_loss`` gives them.
        predict: Settings of predictions, as ``parse_predict`` gives them.
        threads: CPU threads that decode and resize.
        multiple: Whole-image frames (``fit: crop``) are padded to a multiple of it: the model's stride.
        calibration: ``calibration`` of a bundle's manifest; None = the pool is not calibrated.
        score_threshold: Of detections: score from which a box counts as predicted; None = not chosen yet.
        same_model: Whether all members are of one model.

    Raises:
        InputError: Settings of the loss do not fit these classes.
    """

    name: ClassVar[str]
    label_column: ClassVar[str]
    """Column of a dataset that the task learns from."""
    calibrates: ClassVar[bool]
    """Whether the pool can be calibrated, and images accepted or sent to review."""
    calibrates_members: ClassVar[bool] = False
    """Whether members of different models are calibrated one by one, before they are joined."""

    def __init__(
        self,
        classes: list[str],
        background: int | None,
        input: InputSettings,
        loss: Any,
        predict: Any,
        threads: int = 1,
        multiple: int = 32,
        calibration: dict[str, Any] | None = None,
        score_threshold: float | None = None,
        same_model: bool = True,
    ) -> None:
        self.classes = list(classes)
        self.background = background
        self.input = input
        self.settings = predict
        self.multiple = multiple
        self.calibration = calibration
        self.score_threshold = score_threshold
        self.same_model = same_model
        self.collator = Collator(input, self.label_column, self.read_labels, threads, multiple)
        self._loss = loss

    @classmethod
    @abstractmethod
    def parse_loss(cls, values: dict[str, Any], where: str) -> Any:
        """Typed settings of the loss; {} = defaults.

        Raises:
            InputError: Unknown or wrong settings; ``where`` (file, key) is named in it.
        """

    @classmethod
    @abstractmethod
    def parse_predict(cls, values: dict[str, Any], where: str) -> Any:
        """Typed settings of predictions; {} = defaults.

        Raises:
            InputError: Unknown or wrong settings; ``where`` (file, key) is named in it.
        """

    @property
    @abstractmethod
    def inference(self) -> InferenceSettings:
        """Which views, windows and dropout passes each member predicts on."""

    @property
    @abstractmethod
    def uncertainty_measure(self) -> str:
        """Name of the measure that is ``uncertainty``, which the review threshold acts on."""

    @property
    def num_outputs(self) -> int:
        """Classes that the model tells apart, for its ``build``."""
        return num_outputs(self.name, self.classes, self.background)

    @property
    @abstractmethod
    def loss_terms(self) -> list[str]:
        """Names of the loss terms, sorted."""

    def collate(
        self,
        table: pa.Table,
        *,
        train: bool,
        seed: int,
        decoded: Sequence[np.ndarray | Tensor | DecodeError] | None = None,
    ) -> tuple[Batch, list[Failure]]:
        """The Batch of the rows of ``table`` that can be used, and the other rows; see ``Collator.collate``."""
        return self.collator.collate(table, train=train, seed=seed, decoded=decoded)

    @abstractmethod
    def read_labels(self, column: pa.ChunkedArray, ids: list[str], sizes: list[Size]) -> dict[str, Any]:
        """The label column as arguments of ``frame_labels``: ``masks``, or ``boxes, labels, crowd``.

        Args:
            column: N labels; a null row is all void, or has no boxes.
            ids: N names of the images, for errors.
            sizes: N heights and widths of the upright images.

        Raises:
            InputError: A label names no class.
        """

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Term -> scalar float32 that its sum is divided by; it follows from the targets alone."""

    def forward(self, model: Any, batch: Batch) -> Any:
        """A model's raw outputs for a batch that has labels: what ``loss`` wants."""
        return model(batch.images)

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
        """Term -> (weight, sum, count) of a model's raw outputs; sum and count are float32 scalars."""

    @abstractmethod
    def predict(
        self, outputs: Any, batch: Batch, view: View | None = None, view_size: tuple[int, int] | None = None
    ) -> Any:
        """One member's probabilities, on its device, in the batch's frame.

        Args:
            outputs: The model's raw outputs.
            batch: The batch that they were made from.
            view: The view of the frame that the model was shown; None = the frame as it is.
            view_size: Height and width of that view.
        """

    @abstractmethod
    def fuse(self, members: Iterable[Any]) -> Any:
        """The pool of members' predictions, taken one at a time: memory does not grow with their number."""

    @abstractmethod
    def new_view_mean(self) -> ViewMean:
        """An empty mean of one member's predictions on several views."""

    @abstractmethod
    def without_calibration(self, fused: Any) -> Any:
        """The pool as it was before calibration, for ``update_metric``."""

    @abstractmethod
    def metric(self, calibrated: bool = True) -> Any:
        """An empty ``pipeline.metrics.Metric``, of the calibrated pool or of members and pool before calibration."""

    @abstractmethod
    def new_calibration_sample(self) -> Any:
        """An empty sample: what a calibration is fitted on."""

    @abstractmethod
    def update_sample(self, fused: Any, batch: Batch, truth: pa.Table | None, sample: Any) -> None:
        """Add to ``sample`` what a calibration is fitted on, from the uncalibrated pool or from one member.

        Args:
            fused: What ``predict`` or ``fuse`` gave.
            batch: The batch that it was made from.
            truth: The rows of the batch with their label column; rows that are null there are not counted.
            sample: Updated.

        Raises:
            InputError: There is no label column.
        """

    @abstractmethod
    def update_metric(self, predicted: Any, batch: Batch, truth: pa.Table | None, metric: Any) -> None:
        """Count predictions against the truth at each image's own size.

        Args:
            predicted: What ``predict`` or ``fuse`` gave.
            batch: The batch that it was made from.
            truth: The rows of the batch with their label column; rows that are null there are not counted.
            metric: Updated.

        Raises:
            InputError: There is no label column.
        """

    @abstractmethod
    def to_columns(self, fused: Any, batch: Batch) -> dict[str, list[Any]]:
        """``uncertainty`` and the columns of ``schema.PREDICTIONS[name]`` beyond the common ones, by row."""

    def _require_labels(self, truth: pa.Table | None) -> pa.ChunkedArray:
        if truth is None or self.label_column not in truth.column_names:
            raise InputError(
                f"no column '{self.label_column}': metrics of {self.name} need a dataset with those labels"
            )
        return truth[self.label_column]


def image_area(batch: Batch) -> Tensor:
    """(N, 4) float32 x1, y1, x2, y2 of the images inside the batch's frame (upright: nothing was turned)."""
    height, width = batch.sizes.to(batch.matrices).unbind(1)
    zero = torch.zeros_like(height)
    corners = torch.stack([zero, zero, width, height], 1)
    return affine.transform_boxes(corners[:, None], batch.matrices)[:, 0]
