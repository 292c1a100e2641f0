"""Predictor: rows of encoded images in, prediction rows out, for one member or many; knows no Ray.

Each image is read and decoded once whatever the number of members: they run one after the other over the
same batch on the device, and the task keeps running sums over them. Calls from several threads overlap: while
one batch is in the members, the next is decoded and the one before is encoded.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import nn

from pipeline.augment import Augment
from pipeline.errors import InputError
from pipeline.images import decode
from pipeline.images.batch import Batch
from pipeline.images.gpu_decode import DeviceDecoder
from pipeline.models.bundle import Bundle, open_bundle
from pipeline.models.device import Compile, Precision, pick_device
from pipeline.scoring.batch_size import BatchSize, MeasurePeakMemory, out_of_memory
from pipeline.scoring.cuda_streams import ModelStreams
from pipeline.scoring.ensemble_metrics import EnsembleMetrics
from pipeline.scoring.member_forward import MemberForward, load_members, stride_of
from pipeline.scoring.prediction_rows import PredictionRows
from pipeline.tasks.base import Failure
from pipeline.tasks.build import task_for_bundle

Purpose = Literal["metrics", "sample"]
"""What is counted against labels: metrics of pool and members, or what a calibration is fitted on."""


@dataclass
class _ChunkResult:
    """What comes back of a chunk of rows, beside the rows themselves."""

    errors: list[Exception] = field(default_factory=list)
    """Raised by the model for images that failed alone."""
    metrics: list[EnsembleMetrics] = field(default_factory=list)
    """Counts of each batch that went through; empty where nothing is measured."""


class Predictor:
    """All members of a bundle, loaded once; then a table of images -> a table of predictions.

    Args:
        bundle: A bundle, or its URI.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        threads: Threads that decode images; None = one for each core.
        batch: Images that go through the members at once; None = as many as memory allows.
        precision: Of the members' arithmetic; probabilities and measures are float32 always.
        compile: Whether members are compiled; images seen at their own size never are.
        steps: About how many batches will come, of all members together, by which ``auto`` decides to compile.
        calls: Threads that will call it at a time.

    Raises:
        InputError: The bundle is missing, damaged, or of another version.
    """

    def __init__(
        self,
        bundle: str | Bundle,
        device: str = "auto",
        threads: int | None = None,
        *,
        batch: int | None = None,
        precision: Precision = "auto",
        compile: Compile = "auto",
        steps: int = 0,
        calls: int = 1,
    ) -> None:
        self.bundle = open_bundle(bundle) if isinstance(bundle, str) else bundle
        self.device = pick_device(device)
        modules = load_members(self.bundle, self.device)
        threads = threads or len(os.sched_getaffinity(0))
        # Frames in coarser steps than the model asks for, so that images of nearly one size share a batch.
        self.task = task_for_bundle(self.bundle, threads, math.lcm(32, stride_of(modules)))
        self.input = self.task.input
        self.forward = MemberForward(
            self.bundle,
            modules,
            self.device,
            input=self.input,
            inference=self.task.inference,
            precision=precision,
            compile=compile,
            steps=steps,
        )
        self.size = BatchSize(self.device, batch, calls)
        self.streams = ModelStreams(self.device, turns=self.task.inference.dropout_passes > 0)
        self._decoder = DeviceDecoder(self.device, threads) if self.device.type == "cuda" else None
        self._normalise = Augment(None, self.input, 0)
        self._worked = False
        """Whether any image was ever predicted: before that, errors are those of the model."""

    @property
    def members(self) -> list[nn.Module]:
        """The members' networks. What replaces one in this list is run in its place, unless they are compiled."""
        return self.forward.modules

    def new_metrics(self, purpose: Purpose) -> EnsembleMetrics:
        """Fresh counters."""
        if purpose == "sample":
            # Members of one model are calibrated by their pool; unlike ones each, before they are joined.
            num_samples = len(self.members) if self.task.calibrates_members and not self.bundle.same_model else 0
            return EnsembleMetrics(
                sample=self.task.new_calibration_sample(),
                member_samples=[self.task.new_calibration_sample() for _ in range(num_samples)],
            )
        return EnsembleMetrics(
            pool=self.task.metric(calibrated=True),
            members=[self.task.metric(calibrated=False) for _ in self.members],
            uncalibrated=self.task.metric(calibrated=False) if self.task.calibration else None,
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        """One row of ``schema.PREDICTIONS[task]`` for each row of ``table``, in its order.

        Args:
            table: ``image_id, uri, sha256, image`` (encoded bytes, may be null); where known, ``height, width``,
                and ``status, error`` of images that could not be fetched. An image that cannot be used gives a row
                with its status and nothing predicted.
        """
        predicted, _ = self._predict_table(table, None)
        return predicted

    def measure(self, table: pa.Table, purpose: Purpose = "metrics") -> tuple[pa.Table, EnsembleMetrics]:
        """The rows that a call gives, and what was counted against the label columns of ``table``."""
        predicted, metrics = self._predict_table(table, purpose)
        assert metrics is not None, "a purpose has metrics"
        return predicted, metrics

    def _predict_table(self, table: pa.Table, purpose: Purpose | None) -> tuple[pa.Table, EnsembleMetrics | None]:
        """(prediction rows, what was counted); nothing is counted without a purpose."""
        rows = PredictionRows(table, self.bundle, len(self.members) * len(self.forward.passes))
        total = None if purpose is None else self.new_metrics(purpose)
        errors: list[Exception] = []
        for chunk in self._chunks(table, rows.usable_rows()):
            with self.streams.thread_stream():
                result = self._predict_chunk(table, chunk, rows, purpose)
                # Added batch by batch: one that failed half-way has counted nothing.
                for metrics in result.metrics:
                    assert total is not None, "only a purpose is counted for"
                    total.merge(metrics)
            errors += result.errors
        self._worked = self._worked or rows.ok > 0
        if errors and not self._worked:
            # Not an odd image but a fault of the model or of this program: rows would hide it.
            raise errors[0]
        return rows.to_table(), total

    def _chunks(self, table: pa.Table, usable: Sequence[int]) -> Iterator[list[int]]:
        """Rows that go through the model together: of one shape, as many as the batch size is by then."""
        rows_by_shape: dict[tuple[int, int], list[int]] = {}
        for row in usable:
            rows_by_shape.setdefault(self._frame_shape(table, row), []).append(row)
        for (height, width), rows in rows_by_shape.items():
            start = 0
            while start < len(rows):
                # Asked anew for each chunk: the size is measured by the first, and halved when memory ran out.
                end = start + self.size.images(height, width)
                yield rows[start:end]
                start = end

    def _frame_shape(self, table: pa.Table, row: int) -> tuple[int, int]:
        """(H, W) of the frame that the row's image will have; (0, 0) where it is no image."""
        if self.input.fit != "crop":
            return self.input.size
        height, width = (
            table[name][row].as_py() if name in table.column_names else None for name in ("height", "width")
        )
        if not height or not width:
            try:
                info = decode.probe(table["image"][row].as_py())
            except decode.DecodeError:
                return 0, 0
            height, width = info.height, info.width
        multiple = self.task.multiple
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple

    def _collate(self, table: pa.Table) -> tuple[Batch, list[Failure]]:
        """Decoded and framed, on a GPU where that can be; copied there ahead of the model's turn."""
        if self._decoder is None:
            return self.task.collate(table, train=False, seed=0)
        try:
            decoded = self._decoder(table["image"].to_pylist())
            batch, failures = self.task.collate(table, train=False, seed=0, decoded=decoded)
        except RuntimeError:  # out of the device's memory, most likely: the host has more
            batch, failures = self.task.collate(table, train=False, seed=0)
        return batch.pin_memory().to(self.device, non_blocking=True), failures

    def _predict_chunk(
        self, table: pa.Table, chunk: list[int], rows: PredictionRows, purpose: Purpose | None
    ) -> _ChunkResult:
        """Fill the rows of one chunk. What cannot be done together is halved, until one image is at fault."""
        try:
            batch, failures = self._collate(table.take(chunk))
        except MemoryError:
            if len(chunk) == 1:
                rows.fail(chunk[0], "error", "MemoryError: the decoded image does not fit into this process's memory")
                return _ChunkResult()
            return self._predict_halves(table, chunk, rows, purpose)
        # Rows whose image could not be decoded are done; the batch holds the others.
        for position, reason, detail in failures:
            rows.fail(chunk[position], reason, detail)
        failed = {position for position, _, _ in failures}
        decoded = [row for position, row in enumerate(chunk) if position not in failed]
        if not decoded:
            return _ChunkResult()
        fault: Exception | None = None
        try:
            truth = None if purpose is None else table.take(decoded)
            columns, sizes, metrics = self._predict_batch(batch, truth, purpose)
            rows.fill(decoded, columns, sizes)
        except InputError:
            raise
        except Exception as error:  # out of memory, or an image that some library chokes on: find it
            fault = error.with_traceback(None)  # which would keep the tensors alive
        else:
            return _ChunkResult(metrics=[] if metrics is None else [metrics])
        height, width = batch.images.shape[-2:]
        if len(decoded) == 1:
            # Frames of one size all take as much: no fault of the image, and a row would hide it.
            if out_of_memory(fault) and self.input.fit != "crop":
                raise InputError(
                    f"image '{batch.image_ids[0]}': one image of {height}x{width} does not fit into the memory of this "
                    "process together with what else is in hand; run fewer actors, or lower predict.window_overlap, "
                    "predict.tta or the members' input.size, or give it more memory"
                )
            rows.fail(decoded[0], "error", f"{type(fault).__name__}: {fault}")
            return _ChunkResult(errors=[fault])
        if out_of_memory(fault):
            self.size.halve(len(decoded) * height * width)
        del batch  # its memory is for the halves
        return self._predict_halves(table, decoded, rows, purpose)

    def _predict_halves(
        self, table: pa.Table, chunk: list[int], rows: PredictionRows, purpose: Purpose | None
    ) -> _ChunkResult:
        middle = len(chunk) // 2
        first = self._predict_chunk(table, chunk[:middle], rows, purpose)
        second = self._predict_chunk(table, chunk[middle:], rows, purpose)
        return _ChunkResult(first.errors + second.errors, first.metrics + second.metrics)

    @torch.inference_mode()
    def _predict_batch(
        self, batch: Batch, truth: pa.Table | None, purpose: Purpose | None
    ) -> tuple[dict[str, list[Any]], list[list[int]], EnsembleMetrics | None]:
        """(columns of ``to_columns``, [[height, width], ...], what was counted against ``truth``) of one batch."""
        metrics = None if purpose is None else self.new_metrics(purpose)
        with self.streams.model_stream(), MeasurePeakMemory(self.size, batch.images[:, 0].numel()):
            batch = self._normalise(batch.to(self.device))
            fused = self.task.fuse(self._member_predictions(batch, truth, metrics))
        if metrics is not None:
            self._measure_pool(fused, batch, truth, metrics)
        return self.task.to_columns(fused, batch), batch.sizes.tolist(), metrics

    def _member_predictions(
        self, batch: Batch, truth: pa.Table | None, metrics: EnsembleMetrics | None
    ) -> Iterator[Any]:
        """Predictions of every member, one at a time, for each view and dropout pass.

        ``Task.fuse`` takes one after the other, so that memory does not grow with their number; for the same reason a
        member is measured as soon as its last prediction was taken.
        """
        images = batch.images.contiguous(memory_format=torch.channels_last)
        measured = metrics is not None and bool(metrics.members or metrics.member_samples)
        for k in range(len(self.members)):
            view_mean = self.task.new_view_mean() if measured else None
            for outputs, view, canvas in self.forward.outputs_by_view(k, images, batch.image_ids, self.size.images):
                prediction = self.task.predict(outputs, batch, view, canvas)
                del outputs
                if view_mean is not None:
                    view_mean.add(prediction)
                yield prediction
            if view_mean is not None and metrics is not None:
                self._measure_member(k, view_mean.result(), batch, truth, metrics)

    def _measure_member(
        self, k: int, prediction: Any, batch: Batch, truth: pa.Table | None, metrics: EnsembleMetrics
    ) -> None:
        """Count one member's figures: those of the mean over its views and passes."""
        if metrics.members:
            self.task.update_metric(prediction, batch, truth, metrics.members[k])
        else:
            self.task.update_sample(prediction, batch, truth, metrics.member_samples[k])

    def _measure_pool(self, fused: Any, batch: Batch, truth: pa.Table | None, metrics: EnsembleMetrics) -> None:
        """Count the pool's figures, with calibration and without."""
        if metrics.pool is not None:
            self.task.update_metric(fused, batch, truth, metrics.pool)
        if metrics.uncalibrated is not None:
            self.task.update_metric(self.task.without_calibration(fused), batch, truth, metrics.uncalibrated)
        if metrics.sample is not None:
            self.task.update_sample(fused, batch, truth, metrics.sample)
