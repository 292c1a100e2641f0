"""The one interface of tasks: from rows to a batch, a loss, predictions, doubt, metrics, columns.

Predictions of one member and the fusion of several are opaque to everybody else:
``predict`` makes one, ``fuse`` joins them, ``measure`` and ``to_columns`` read them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.augment import InputSettings, crop_offsets
from pipeline.config import Settings
from pipeline.errors import InputError
from pipeline.images import affine
from pipeline.images.batch import Batch
from pipeline.images.buffer_pool import Buffers
from pipeline.images.decode import DecodeError, Reduced, decode_many
from pipeline.images.frame_labels import frame_labels
from pipeline.images.gpu_frames import frame_on_device
from pipeline.images.host_frames import Paster, paste_images
from pipeline.images.layout import lay_out
from pipeline.tasks.collate import FRAME, Failure, Usable, framed_rows, stored_sizes, unflatten, usable
from pipeline.uncertainty.tta import InferenceSettings, View

Term = tuple[float, Tensor, Tensor]
"""Weight, sum, count."""


class ViewMean(Protocol):
    """What one member says of several views, as one prediction, taken one at a time."""

    def add(self, prediction: Any, /) -> None:
        """Take in one."""
        ...

    def result(self) -> Any:
        """Their mean: as what ``predict`` gives."""
        ...


class Task(ABC):
    """What a dataset, a model and a loop have in common for one kind of label.

    Args:
        classes: Names in label order.
        background: Label of the implicit background, if there is one.
        input: What the network sees.
        loss: Settings of the loss; {} = defaults.
        predict: Settings of predictions; {} = defaults.
        threads: CPU threads that decode and resize.
        multiple: Whole-image frames (``fit: crop``) are padded to a multiple of it: the model's stride.
        calibration: As a bundle's manifest keeps it; None = the pool as it is.
        score_threshold: Of detections: score from which a box counts as said; None = not chosen yet.
        alike: Whether all members are of one model.

    Raises:
        InputError: Unknown or wrong settings.
    """

    name: ClassVar[str]
    label_column: ClassVar[str]
    """What it learns from."""
    calibrates: ClassVar[bool]
    """Whether the pool can be calibrated, and images accepted or sent to review."""
    calibrates_members: ClassVar[bool] = False
    """Whether unlike members are calibrated each, before they are joined."""

    def __init__(
        self,
        classes: list[str],
        background: int | None,
        input: InputSettings,
        loss: dict[str, Any],
        predict: dict[str, Any] | None = None,
        threads: int = 1,
        multiple: int = 32,
        calibration: dict[str, Any] | None = None,
        score_threshold: float | None = None,
        alike: bool = True,
    ) -> None:
        self.classes, self.background, self.input = list(classes), background, input
        self.threads, self.multiple, self.calibration = threads, multiple, calibration
        self.score_threshold, self.alike = score_threshold, alike
        self.buffers = Buffers()
        self.settings = self._parse_predict(predict or {})
        self._set_loss(loss)

    @abstractmethod
    def _parse_predict(self, values: dict[str, Any]) -> Settings: ...

    @abstractmethod
    def _set_loss(self, values: dict[str, Any]) -> None: ...

    @property
    @abstractmethod
    def inference(self) -> InferenceSettings:
        """How members are asked."""

    @property
    @abstractmethod
    def uncertainty_measure(self) -> str:
        """The kind of ``uncertainty``, that the review threshold acts on."""

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Classes that the model tells apart, for its ``build``."""

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
        """Decode and frame the rows of a table, on the CPU unless they were ``decoded`` elsewhere.

        Args:
            table: ``image_id, image``, perhaps ``height, width`` and the label column; with ``train`` also
                ``epoch, position``. Rows that were framed elsewhere have ``FRAME`` and ``FAULT`` instead of ``image``.
            train: Random windows where the input is cropped; every row must be labelled.
            seed: Of the windows.
            decoded: The images of the rows, where that has been done: arrays (H, W, 3), or tensors (3, H, W) on a
                device, on which all of them are framed then; the labels stay on the CPU.

        Returns:
            The Batch of the rows that could be decoded, in order (labels None when the table has no label
            column; a null label of a row is all void, or no boxes), and the other rows with the reason.

        Raises:
            InputError: With ``train``, a row is not labelled; a label names no class.
        """
        paster = None
        if FRAME in table.column_names:
            found = framed_rows(table)
        else:
            items = decoded
            if items is None:
                items, paster = self._decode(table, train, seed)
            labelled = self.label_column in table.column_names
            found = usable(items, stored_sizes(table) if labelled else [None] * len(items))
        kept = table.take(pa.array(found.rows, pa.int64())) if found.failures else table
        return self._batch(kept, found, paster, train=train, seed=seed), found.failures

    def _decode(
        self, table: pa.Table, train: bool, seed: int
    ) -> tuple[Sequence[np.ndarray | Reduced | DecodeError], Paster | None]:
        """Images, and who put them into their frames, where these have one size."""
        items = table["image"].to_pylist()
        if not Paster.fits(self.input, train):
            return decode_many(items, self.threads, buffers=self.buffers), None
        offsets = crop_offsets(seed, *_keys(table, train)) if train else None
        # Inference mode is a matter of threads: those that decode may not write to tensors made inside it.
        with torch.inference_mode(False):
            paster = Paster(len(items), self.input, train=train, offsets=offsets, buffers=self.buffers)
        return decode_many(items, self.threads, paster.target_size, self.buffers, paster), paster

    def _batch(self, table: pa.Table, found: Usable, paster: Paster | None, *, train: bool, seed: int) -> Batch:
        ids = table["image_id"].to_pylist()
        epochs, positions = _keys(table, train)
        labels = {"masks": None, "boxes": None, "labels": None, "crowd": None}
        if self.label_column in table.column_names:
            column = table[self.label_column]
            if train and column.null_count:
                row = column.is_null().to_pylist().index(True)
                raise InputError(
                    f"image '{ids[row]}' is in the train split but has no {self.label_column}; label it, "
                    f"or move it to another split and ingest again"
                )
            labels |= self._labels(column, ids, found.sizes)
        offsets = crop_offsets(seed, epochs, positions) if train else None
        layout = lay_out(found.sizes, self.input, train=train, offsets=offsets, multiple=self.multiple)
        with torch.inference_mode(False):  # as in _decode
            device = next((image.device for image in found.images if isinstance(image, Tensor)), None)
            if paster is not None:
                images = paster.images(found.rows)
            elif FRAME in table.column_names:
                images = unflatten(found.images, layout.canvas, self.buffers)
            elif device is not None:
                images = frame_on_device(found.images, layout, self.input, device)
            else:
                images = paste_images(found.images, layout, self.input, self.threads, self.buffers)
            framed = frame_labels(found.sizes, layout, **labels, threads=self.threads)
        keys = {"epochs": torch.from_numpy(epochs), "positions": torch.from_numpy(positions)}
        return Batch(image_ids=ids, images=images, **keys, **framed)

    @abstractmethod
    def _labels(self, column: pa.ChunkedArray, ids: list[str], sizes: list[tuple[int, int]]) -> dict[str, Any]:
        """Arguments of ``frame``, from this task's label column."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What each loss term is divided by: term -> scalar; of targets alone."""

    def forward(self, model: Any, batch: Batch) -> Any:
        """A model's raw outputs for a batch that has labels: what ``loss`` wants."""
        return model(batch.images)

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> dict[str, Term]:
        """Term -> (weight, sum, count) of a model's raw outputs."""

    @abstractmethod
    def predict(self, outputs: Any, batch: Batch, look: View | None = None, seen: tuple[int, int] | None = None) -> Any:
        """One member's probabilities, on its device, in the batch's frame.

        Args:
            outputs: What the model said.
            batch: What it was asked about.
            look: The view it was shown; None = the frame as it is.
            seen: Height and width of that view.
        """

    @abstractmethod
    def fuse(self, members: Iterable[Any]) -> Any:
        """The pool of members, taken one at a time: memory does not grow with their number."""

    @abstractmethod
    def new_view_mean(self) -> "ViewMean":
        """An empty mean of predictions."""

    @abstractmethod
    def without_calibration(self, fused: Any) -> Any:
        """The pool as it was before calibration, for ``measure``."""

    @abstractmethod
    def metric(self, calibrated: bool = True) -> Any:
        """A fresh ``pipeline.metrics.Metric``, of the calibrated pool or of members and pool as they are."""

    @abstractmethod
    def new_calibration_sample(self) -> Any:
        """An empty sample: what a calibration is fitted on."""

    @abstractmethod
    def update_sample(self, fused: Any, batch: Batch, truth: pa.Table | None, sample: Any) -> None:
        """Take from the uncalibrated pool, or from a member, what a calibration is fitted on, into ``sample``."""

    @abstractmethod
    def update_metric(self, predicted: Any, batch: Batch, truth: pa.Table | None, metric: Any) -> None:
        """Count predictions against the truth at each image's own size.

        Args:
            predicted: What ``predict`` or ``fuse`` gave.
            batch: What it was made from.
            truth: The rows of the batch with their label column; rows that are null there are not counted.
            metric: Updated.

        Raises:
            InputError: There is no label column.
        """

    @abstractmethod
    def to_columns(self, fused: Any, batch: Batch) -> dict[str, list[Any]]:
        """``uncertainty`` and the columns of ``schema.PREDICTIONS[name]`` beyond the common ones, by row."""

    def _truth(self, truth: pa.Table | None) -> pa.ChunkedArray:
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


def _keys(table: pa.Table, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and position of each row; zeros where only training has them."""
    missing = [name for name in ("epoch", "position") if name not in table.column_names]
    if missing and train:
        raise ValueError(f"a training table needs the column '{missing[0]}', found {table.column_names}")
    epochs, positions = (
        np.zeros(table.num_rows, np.int64) if name in missing else np.array(table[name].to_numpy(), np.int64)
        for name in ("epoch", "position")
    )
    return epochs, positions
